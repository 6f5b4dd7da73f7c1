// Routing behind a launch of the router GEMM: one warp reads the float32 logits of one token, or adds them up where
// that one left parts of them, and routes it.
//
// What limits it: latency for few tokens (launch, one read, top_k rounds of about a hundred cycles), instructions for
// many. Bytes: experts * 4 and top_k * 8 per token.
//
// Work: grid.x = tokens / kSelectWarps. Memory: logits [tokens, experts] or parts (sm90_sum_parts.cuh) of the launch
// before. Shared memory: per warp what selection needs.
#include "sm90_route_kernels.cuh"
#include "sm90_sum_parts.cuh"

namespace jax_router {

template <int kPerLane, int kScore, bool kPlain>
__global__ void __launch_bounds__(32 * kSelectWarps) sm90_route_select(const RoutedProblem routed) {
  const Problem& p = routed.problem;
  using Router = TokenRouter<kPerLane, kScore, kPlain>;
  __shared__ typename Router::Scratch scratch[kSelectWarps];
  const unsigned lane = settled(threadIdx.x % 32), warp = uniform_warp(), token = blockIdx.x * kSelectWarps + warp;
  const int first = int(lane) * kPerLane, last = p.experts - 1;
  const float* const row = static_cast<const float*>(p.out) + uint64_t(token) * unsigned(p.experts);
  grid_dependency_wait();
  if (token >= unsigned(p.tokens)) return;

  Router router(lane);
  float logits[kPerLane];
  router.fetch(p, routed.routing);
  if (p.parts != nullptr) {
    PerExpert<kPerLane> bias;
    bias.load(p.bias, p.bias_dtype, p.experts, lane);
    if constexpr (kPerLane % 4 == 0) {
#pragma unroll
      for (int j = 0; j < kPerLane; j += 4) {
        const float4 four = sum_parts(p, token, unsigned(min(first + j, p.part_row - 4)));
        logits[j] = four.x, logits[j + 1] = four.y, logits[j + 2] = four.z, logits[j + 3] = four.w;
      }
    } else {
      const float4 four = sum_parts(p, token, unsigned(min(first, last)) / 4 * 4);
      logits[0] = lane % 2 == 0 ? four.x : four.z, logits[1] = lane % 2 == 0 ? four.y : four.w;
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      logits[j] = p.bias_dtype == JR_NONE ? logits[j] : logits[j] + bias.value(j, p.bias_dtype);
    if (routed.routing.logits != nullptr) store_logits(p, routed.routing.logits, token, lane, logits);
  } else if (kPerLane % 4 == 0 && p.experts % 4 == 0) {
#pragma unroll
    for (int j = 0; j + 3 < kPerLane; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + min(first + j, last - 3));
      logits[j] = four.x, logits[j + 1] = four.y, logits[j + 2] = four.z, logits[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) logits[j] = row[min(first + j, last)];
  }
  router.route(p, routed.routing, token, logits, scratch[warp]);
}

namespace {

template <int kPerLane>
constexpr SelectKernel kernels() {
  SelectKernel select = {.per_lane = kPerLane, .kernel = {}};
  list_kinds(select.kernel,
             []<int kScore, bool kPlain>(std::integral_constant<int, kScore>, std::bool_constant<kPlain>) {
               return reinterpret_cast<const void*>(&sm90_route_select<kPerLane, kScore, kPlain>);
             });
  return select;
}

}  // namespace

const SelectKernel select_kernels[kSelectKernels] = {kernels<2>(),  kernels<4>(),  kernels<8>(),
                                                     kernels<12>(), kernels<16>(), kernels<32>()};

}  // namespace jax_router
