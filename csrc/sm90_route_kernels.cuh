// The kernels that route, as the launcher sees them.
#pragma once

#include <type_traits>
#include <utility>

#include "sm90_route.cuh"
#include "sm90_router_gemm.cuh"

namespace jax_router {

struct RoutedProblem {
  Problem problem;
  Routing routing;
};

// Kernels are compiled for a score function and for what is compared: 2 * jr_score_function, and 1 more where neither a
// correction bias nor groups move the choice away from the logits.
constexpr int kRoutingKinds = 8;

// Fills a list by kind: kernel_of(std::integral_constant<int, kScore>, std::bool_constant<kPlain>) is one kernel.
template <typename KernelOf>
constexpr void list_kinds(const void* (&kernel)[kRoutingKinds], const KernelOf& kernel_of) {
  const auto add = [&]<int... kKind>(std::integer_sequence<int, kKind...>) {
    ((kernel[kKind] = kernel_of(std::integral_constant<int, kKind / 2>(), std::bool_constant<kKind % 2 != 0>())), ...);
  };
  add(std::make_integer_sequence<int, kRoutingKinds>());
}

constexpr int kSelectWarps = 4;  // tokens of a block
constexpr int kSelectKernels = 6;
struct SelectKernel {
  int per_lane;  // logits_per_lane() of the experts it takes
  const void* kernel[kRoutingKinds];
};
extern const SelectKernel select_kernels[kSelectKernels];

// One launch from x to experts: a cluster of 16 takes block_tokens tokens and all experts.
constexpr int kFusedConfigs = 3;
struct FusedConfig {
  const char* name;
  int block_tokens, block_experts, cluster;
  const void* kernel[2][kRoutingKinds];  // by jr_dtype: JR_BFLOAT16, JR_FLOAT16
  int threads;
  int (*shared_bytes)(int hidden);
};
extern const FusedConfig fused_configs[kFusedConfigs];

}  // namespace jax_router
