// The launcher of routing: checks a problem, picks one launch or two, launches. The bits are the same.
#include "route.h"

#include "launch.cuh"
#include "sm90_route_kernels.cuh"

namespace jax_router {
namespace {

constexpr int kTwoLaunches = kFusedConfigs;  // the router GEMM, then a launch that routes
constexpr int kConfigs = kFusedConfigs + 1;

// ---- What is taken -------------------------------------------------------------------------------------------------

int check_spec(const jr_route_args& a, const Report& report) {
  const jr_routing_spec& s = a.spec;
  const int experts = int(a.gemm.experts);
  if (a.gemm.out_dtype != JR_FLOAT32)
    return report.fail(JR_UNSUPPORTED, "out_dtype is %d; routing needs logits in float32 (2)", a.gemm.out_dtype);
  if (experts > kMaxRoutedExperts)
    return report.fail(JR_UNSUPPORTED, "experts is %d; expected 1 to %d", experts, kMaxRoutedExperts);
  if (s.top_k < 1 || s.top_k > kMaxTopK || s.top_k > experts)
    return report.fail(JR_UNSUPPORTED, "top_k is %d; expected 1 to %d, and no more than the %d experts", s.top_k,
                       kMaxTopK, experts);
  if (s.score_function < JR_SOFTMAX || s.score_function > JR_SQRTSOFTPLUS)
    return report.fail(JR_UNSUPPORTED, "score_function is %d; expected 0 to 3", s.score_function);
  if (s.group_score != JR_TOP2_SUM && s.group_score != JR_GROUP_MAX)
    return report.fail(JR_UNSUPPORTED, "group_score is %d; expected 0 or 1", s.group_score);
  if (s.num_groups != 0) {
    const bool divides = s.num_groups > 0 && s.num_groups <= kMaxGroups && experts % s.num_groups == 0;
    if (!divides || s.group_topk < 1 || s.group_topk > s.num_groups ||
        s.group_topk * (experts / s.num_groups) < s.top_k)
      return report.fail(JR_UNSUPPORTED,
                         "num_groups is %d and group_topk %d; expected at most %d groups that divide the %d experts, "
                         "and kept ones that hold top_k=%d",
                         s.num_groups, s.group_topk, kMaxGroups, experts, s.top_k);
    if (s.group_score == JR_TOP2_SUM && experts / s.num_groups < 2)
      return report.fail(JR_UNSUPPORTED,
                         "group_score is the sum of two but groups have %d experts; expected two or more",
                         experts / s.num_groups);
  }
  for (const int dtype : {a.correction_bias_dtype, a.expert_scale_dtype}) {
    if (dtype != JR_NONE && dtype != JR_FLOAT32 && dtype != a.gemm.dtype)
      return report.fail(
          JR_UNSUPPORTED,
          "correction_bias_dtype is %d and expert_scale_dtype %d; expected none (-1), float32 (2) or x's "
          "dtype (%d)",
          a.correction_bias_dtype, a.expert_scale_dtype, a.gemm.dtype);
  }
  if ((a.correction_bias == nullptr) != (a.correction_bias_dtype == JR_NONE) ||
      (a.expert_scale == nullptr) != (a.expert_scale_dtype == JR_NONE) || a.weights == nullptr || a.experts == nullptr)
    return report.fail(JR_UNSUPPORTED,
                       "correction_bias is %p (dtype %d), expert_scale %p (dtype %d), weights %p, experts %p; expected "
                       "device memory",
                       a.correction_bias, a.correction_bias_dtype, a.expert_scale, a.expert_scale_dtype,
                       static_cast<void*>(a.weights), static_cast<void*>(a.experts));
  return JR_OK;
}

int64_t token_tiles(const FusedConfig& config, const jr_route_args& a) {
  return (a.gemm.tokens + config.block_tokens - 1) / config.block_tokens;
}

// Whether a configuration takes this problem, on a GPU that can run its clusters.
bool fits(int index, const jr_route_args& a) {
  if (index == kTwoLaunches) return true;
  const FusedConfig& config = fused_configs[index];
  // Another width would add up scores in another order.
  return a.gemm.weight_layout == JR_EXPERTS_HIDDEN && a.gemm.weight_dtype != JR_FLOAT32 &&
         logits_per_lane(int(a.gemm.experts)) == config.block_experts / 32 &&
         config.shared_bytes(int(a.gemm.hidden)) <= kMaxSharedBytes && token_tiles(config, a) < (1 << 27);
}

// ---- Which configuration -------------------------------------------------------------------------------------------

// An H200 runs seven clusters of 16 at once. Up to there one launch takes as long for many tiles as for one; two take
// less for few tokens of more than 64 experts, where 16 multiprocessors read what all of them read in two
// (docs/kernels_routing.md).
int pick(const jr_route_args& a) {
  constexpr int kClustersAtOnce = 7;
  for (int i = 0; i < kFusedConfigs; ++i) {
    const FusedConfig& config = fused_configs[i];
    if (!fits(i, a) || token_tiles(config, a) > kClustersAtOnce) continue;
    const int fewest = config.block_experts <= 64 ? 1 : config.block_experts <= 128 ? 17 : 65;
    const int64_t weight_bytes = a.gemm.experts * a.gemm.hidden * 2;
    if (a.gemm.tokens >= fewest && weight_bytes <= (int64_t(2) << 20)) return i;
  }
  return kTwoLaunches;
}

// ---- Launch --------------------------------------------------------------------------------------------------------

// Sets up the kernels and finds out whether the current device runs clusters of 16: part of a GPU (MIG) may not.
int prepare_current_device(bool* runs_fused, const Report& report) {
  static OncePerDevice once;
  static bool runs[OncePerDevice::kMaxDevices];
  const int status = once.run(report, [&](int device) -> int {
    for (const FusedConfig& config : fused_configs) {
      for (const auto& kernels : config.kernel) {
        for (const void* kernel : kernels) {
          JR_CHECK(report, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
          JR_CHECK(report, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        }
      }
    }
    for (const SelectKernel& select : select_kernels) {
      for (const void* kernel : select.kernel) {
        cudaFuncAttributes loaded;  // now, and not during a capture
        JR_CHECK(report, cudaFuncGetAttributes(&loaded, kernel));
      }
    }
    const FusedConfig& one = fused_configs[0];
    const Launch launch(dim3(unsigned(one.cluster)), one.threads, kMaxSharedBytes, one.cluster, nullptr);
    int clusters = 0;
    const cudaError_t refused = cudaOccupancyMaxActiveClusters(&clusters, one.kernel[JR_BFLOAT16][0], &launch.shape);
    if (refused != cudaSuccess) cudaGetLastError();  // a size that the device cannot have is no failure
    runs[device] = refused == cudaSuccess && clusters > 0;
    return JR_OK;
  });
  int device = 0;
  if (status == JR_OK) JR_CHECK(report, cudaGetDevice(&device));
  *runs_fused = status == JR_OK && runs[device];
  return status;
}

int kind(const jr_route_args& a) {
  return 2 * a.spec.score_function + (a.correction_bias_dtype == JR_NONE && a.spec.num_groups == 0);
}

Routing device_routing(const jr_route_args& a) {
  jr_routing_spec spec = a.spec;
  if (a.gemm.dtype == JR_FLOAT32) spec.round_logits = 0;  // to x's dtype, which they have
  return {spec,
          a.correction_bias,
          a.expert_scale,
          a.correction_bias_dtype,
          a.expert_scale_dtype,
          a.gemm.dtype,
          a.replay,
          a.weights,
          a.experts,
          a.return_logits != 0 ? static_cast<float*>(a.gemm.out) : nullptr,
          a.spec.num_groups == 0 ? 0 : int(a.gemm.experts) / a.spec.num_groups};
}

int launch_fused(const FusedConfig& config, const jr_route_args& a, cudaStream_t stream, const Report& report) {
  RoutedProblem routed = {device_problem(a.gemm, config.block_experts), device_routing(a)};
  const dim3 blocks(unsigned(token_tiles(config, a) * config.cluster));
  return enqueue(Launch(blocks, config.threads, config.shared_bytes(int(a.gemm.hidden)), config.cluster, stream),
                 config.kernel[a.gemm.dtype][kind(a)], &routed, config.name, a.gemm, report);
}

int launch_two(const jr_route_args& a, cudaStream_t stream, const Report& report) {
  RoutedProblem routed = {{}, device_routing(a)};
  const SelectKernel* select = select_kernels;
  while (select->per_lane != logits_per_lane(int(a.gemm.experts))) ++select;
  if (const int status = enqueue_gemm(a.gemm, &routed.problem, stream, report); status != JR_OK) return status;
  if (routed.problem.parts == nullptr) routed.routing.logits = nullptr;  // they are there
  const dim3 blocks(unsigned((a.gemm.tokens + kSelectWarps - 1) / kSelectWarps));
  return enqueue(Launch(blocks, 32 * kSelectWarps, 0, 1, stream), select->kernel[kind(a)], &routed, "route_select",
                 a.gemm, report);
}

}  // namespace
}  // namespace jax_router

using namespace jax_router;

int jr_route_num_configs(void) { return kConfigs; }

const char* jr_route_config_name(int config) {
  return config == kTwoLaunches ? "two_launches" : config >= 0 && config < kConfigs ? fused_configs[config].name : "";
}

int jr_route_config_fits(int config, const jr_route_args* args) {
  return config >= 0 && config < kConfigs && check_gemm(args->gemm, Report{}) == JR_OK &&
         check_spec(*args, Report{}) == JR_OK && fits(config, *args);
}

int jr_route_pick_config(const jr_route_args* args) {
  return check_gemm(args->gemm, Report{}) == JR_OK && check_spec(*args, Report{}) == JR_OK ? pick(*args) : -1;
}

int jr_route(const jr_route_args* args, void* stream, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  if (const int status = check_gemm(args->gemm, report); status != JR_OK) return status;
  if (const int status = check_spec(*args, report); status != JR_OK) return status;
  if (args->gemm.tokens == 0) return JR_OK;
  bool runs_fused = false;
  if (const int status = prepare_current_device(&runs_fused, report); status != JR_OK) return status;
  const int config = args->config != -1 ? args->config : runs_fused ? pick(*args) : kTwoLaunches;
  if (config < 0 || config >= kConfigs || !fits(config, *args))
    return report.fail(JR_UNSUPPORTED,
                       "config is %d; expected -1 or one of 0 to %d that fits tokens=%lld hidden=%lld experts=%lld and "
                       "weight_layout=%d",
                       config, kConfigs - 1, static_cast<long long>(args->gemm.tokens),
                       static_cast<long long>(args->gemm.hidden), static_cast<long long>(args->gemm.experts),
                       args->gemm.weight_layout);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return config == kTwoLaunches ? launch_two(*args, on, report)
                                : launch_fused(fused_configs[config], *args, on, report);
}
