// The second launch of a router GEMM that is split without clusters: adds up what its blocks left in the workspace.
//
// What limits it: bytes, and the launch. Work: one thread per four logits. Bytes: (kSplits + 1) * tokens * experts * 4.
#include "sm90_sum_parts.cuh"

namespace jax_router {

template <typename Element>
__global__ void __launch_bounds__(kSumPartsThreads) sm90_router_gemm_sum_parts(const Problem p) {
  const unsigned quads = unsigned(p.part_row) / 4, i = blockIdx.x * kSumPartsThreads + threadIdx.x;
  const unsigned token = i / quads, expert = i % quads * 4;
  grid_dependency_wait();
  if (token >= unsigned(p.tokens)) return;
  float4 total = sum_parts(p, token, expert);
  if (p.bias_dtype != JR_NONE) {
    total = total + make_float4(load_bias<Element>(p, expert), load_bias<Element>(p, expert + 1),
                                load_bias<Element>(p, expert + 2), load_bias<Element>(p, expert + 3));
  }
  const uint64_t index = uint64_t(token) * unsigned(p.experts) + expert;
  if (p.out_dtype == JR_FLOAT32 && p.experts % 4 == 0) {
    *reinterpret_cast<float4*>(static_cast<float*>(p.out) + index) = total;
    return;
  }
  const float logits[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (expert + j < unsigned(p.experts)) store_one<Element>(p, index + j, logits[j]);
  }
}

const void* const sum_parts_kernels[2] = {reinterpret_cast<const void*>(&sm90_router_gemm_sum_parts<bfloat16>),
                                          reinterpret_cast<const void*>(&sm90_router_gemm_sum_parts<float16>)};

}  // namespace jax_router
