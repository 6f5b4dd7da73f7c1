// Routing behind a launch of the router GEMM: one warp reads the float32 logits of one token and routes it.
//
// What limits it: latency for few tokens (launch, one read, top_k rounds of about a hundred cycles), instructions for
// many. Bytes: experts * 4 and top_k * 8 per token.
//
// Work: grid.x = tokens / kSelectWarps. Memory: logits [tokens, experts] of the launch before. Shared memory: a token's
// logits per warp.
#include "sm90_route_kernels.cuh"

namespace jax_router {

template <typename Element, int kPerLane>
__global__ void __launch_bounds__(32 * kSelectWarps) sm90_route_select(const RoutedProblem routed) {
  const Problem& p = routed.problem;
  using Router = TokenRouter<Element, kPerLane>;
  __shared__ float scratch[kSelectWarps][Router::kScratch];
  const unsigned warp = threadIdx.x / 32, token = blockIdx.x * kSelectWarps + warp;
  const int first = int(threadIdx.x % 32) * kPerLane;
  grid_dependency_wait();
  if (token >= unsigned(p.tokens)) return;

  const float* const row = static_cast<const float*>(p.out) + uint64_t(token) * unsigned(p.experts) + first;
  float logits[kPerLane];
  if (kPerLane % 4 == 0 && p.experts % 4 == 0) {
#pragma unroll
    for (int j = 0; j + 3 < kPerLane; j += 4) {
      float4 four = {};
      if (first + j < p.experts) four = *reinterpret_cast<const float4*>(row + j);
      logits[j] = four.x, logits[j + 1] = four.y, logits[j + 2] = four.z, logits[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) logits[j] = first + j < p.experts ? row[j] : 0.f;
  }
  Router router;
  router.fetch(p, routed.routing);
  router.route(p, routed.routing, token, logits, scratch[warp]);
}

const SelectKernel select_kernels[kSelectKernels] = {
#define JR_SELECT(PER_LANE)                                                    \
  {                                                                            \
    PER_LANE, {                                                                \
      reinterpret_cast<const void*>(&sm90_route_select<bfloat16, PER_LANE>),   \
          reinterpret_cast<const void*>(&sm90_route_select<float16, PER_LANE>) \
    }                                                                          \
  }
    JR_SELECT(2), JR_SELECT(4), JR_SELECT(8), JR_SELECT(12), JR_SELECT(16), JR_SELECT(32),
#undef JR_SELECT
};

}  // namespace jax_router
