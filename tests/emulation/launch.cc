// Launches on the CPU what csrc/router_gemm.cu launches on a GPU, and the memory that `extern __shared__` names.
#include <stdio.h>

#include "sm90_route_kernels.cuh"

namespace jax_router {

thread_local __align__(1024) uint8_t shared[emulation::kSharedBytes], dynamic_shared[emulation::kSharedBytes];

}  // namespace jax_router

void emulation::poison_shared_memory() {
  memset(jax_router::shared, 0xFF, kSharedBytes);
  memset(jax_router::dynamic_shared, 0xFF, kSharedBytes);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  using namespace jax_router;
  emulation::Grid grid;
  grid.blocks = config->gridDim;
  grid.threads = config->blockDim;
  grid.shared_bytes = config->dynamicSmemBytes;
  grid.cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) grid.cluster = config->attrs[i].val.clusterDim.x;
  }
  if (grid.cluster > 8 && clusters_of_16() <= 0) emulation::fail("a cluster that this GPU cannot run");
  const auto is_one_of = [=](const auto& kernels) {
    return std::find(std::begin(kernels), std::end(kernels), kernel) != std::end(kernels);
  };
  const auto is = [=](const auto& c) { return is_one_of(c.kernel[0]) || is_one_of(c.kernel[1]); };
  const auto routes = [=](const SelectKernel& c) { return is_one_of(c.kernel); };
  const auto run_with = [&]<typename Parameter>(const Parameter& parameter, const Problem& p) {
    const auto of_kind = [=](int operands) {
      const auto takes = [=](const Config& c) {
        return c.kernel[0][operands] == kernel || c.kernel[1][operands] == kernel;
      };
      return std::any_of(std::begin(float32_configs), std::end(float32_configs), takes) ||
             std::any_of(std::begin(float32_one_token_configs), std::end(float32_one_token_configs), takes);
    };
    const int of_x = of_kind(JR_FLOAT32) ? 4 : 2, of_weight = of_x == 4 || of_kind(kFloat32Weight) ? 4 : 2;
    grid.x = {static_cast<const uint8_t*>(p.x), p.tokens * p.hidden * of_x};
    grid.weight = {static_cast<const uint8_t*>(p.weight), int64_t(p.experts) * p.hidden * of_weight};
    const auto run = reinterpret_cast<void (*)(Parameter)>(const_cast<void*>(kernel));
    grid.kernel = [=] { run(parameter); };
  };
  if (std::any_of(std::begin(many_tokens_configs), std::end(many_tokens_configs), is)) {
    const auto& tiled = *static_cast<const TiledProblem*>(arguments[0]);
    run_with(tiled, tiled.problem);
  } else if (std::any_of(std::begin(select_kernels), std::end(select_kernels), routes) ||
             std::any_of(std::begin(fused_configs), std::end(fused_configs),
                         is)) {
    const auto& routed = *static_cast<const RoutedProblem*>(arguments[0]);
    run_with(routed, routed.problem);
  } else {
    const auto& problem = *static_cast<const Problem*>(arguments[0]);
    run_with(problem, problem);
  }
  emulation::launch(grid);
  return cudaSuccess;
}
