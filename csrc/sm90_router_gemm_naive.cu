// The readable answer: one warp computes one tile of 16 tokens x 8 experts and walks the whole reduction tree alone.
// Same bits as every other kernel, no exchange between threads, no cluster. Slow: it reads x once per 8 experts, 4
// bytes at a time.
#include "sm90_float32.cuh"
#include "sm90_router_gemm.cuh"

namespace jax_router {

// Two neighbouring elements of `row` at element k, or zeros outside the matrix.
template <typename Element>
__device__ uint32_t load_two(const void* matrix, int64_t row, int64_t rows, int k, int hidden) {
  if (row >= rows || k >= hidden) return 0;
  return *reinterpret_cast<const uint32_t*>(static_cast<const Element*>(matrix) + row * hidden + k);
}

// The same of column `expert` of weights that are stored [hidden, experts].
__device__ uint32_t load_two_of_column(const Problem& p, int expert, int k) {
  if (expert >= p.experts || k >= p.hidden) return 0;
  const uint16_t* const first = static_cast<const uint16_t*>(p.weight) + int64_t(k) * p.experts + expert;
  return uint32_t(first[0]) | uint32_t(first[p.experts]) << 16;
}

template <typename Element, bool kHiddenExperts>
__global__ void __launch_bounds__(32) sm90_router_gemm_naive(const Problem p) {
  grid_dependency_wait();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const unsigned token = blockIdx.x / unsigned(p.expert_tiles) * kTileTokens;
  const int expert = blockIdx.x % p.expert_tiles * kTileExperts;
  const int units = units_of(p.hidden);

  __shared__ float4 group_sums[kGroups][32];
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const int end = group_begin(units, group + 1);
    for (int slice = group_begin(units, group); slice < end; slice += kUnitsPerSlice) {
      float4 slice_sum = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int k16 = slice * kUnit; k16 < min(slice + kUnitsPerSlice, end) * kUnit; k16 += 16) {
        const int k = k16 + 2 * t;  // this lane's elements: k, k+1 and k+8, k+9 of each row
        const uint32_t a[4] = {load_two<Element>(p.x, token + g, p.tokens, k, p.hidden),
                               load_two<Element>(p.x, token + g + 8, p.tokens, k, p.hidden),
                               load_two<Element>(p.x, token + g, p.tokens, k + 8, p.hidden),
                               load_two<Element>(p.x, token + g + 8, p.tokens, k + 8, p.hidden)};
        const auto weights = [&](int k) {
          return kHiddenExperts ? load_two_of_column(p, expert + g, k)
                                : load_two<Element>(p.weight, expert + g, p.experts, k, p.hidden);
        };
        mma_m16n8k16(slice_sum, a, weights(k), weights(k + 8), slice_sum, Element());
      }
      sum = sum + slice_sum;
    }
    group_sums[group][lane] = sum;
  }
  const float4 total = tree_sum<kGroups>(0, [&](int group) { return group_sums[group][lane]; });
  const float2 bias = make_float2(load_bias<Element>(p, expert + 2 * t), load_bias<Element>(p, expert + 2 * t + 1));
  store_quad<Element>(p, place_quad(p, token, expert, lane, bias), total);
}

// Two neighbouring elements of K of a float32 matrix, of its row or, stored transposed, of its column.
__device__ float2 load_two_floats(const void* matrix, int64_t row, int64_t rows, int k, int hidden, bool transposed) {
  if (row >= rows || k >= hidden) return make_float2(0.f, 0.f);
  const float* const first = static_cast<const float*>(matrix) + (transposed ? k * rows + row : row * hidden + k);
  return make_float2(first[0], first[transposed ? rows : 1]);
}

// The same with float32 weights, of which a slice is one unit.
template <typename X, bool kHiddenExperts>
__global__ void __launch_bounds__(32) sm90_router_gemm_naive_float32(const Problem p) {
  grid_dependency_wait();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const unsigned token = blockIdx.x / unsigned(p.expert_tiles) * kTileTokens;
  const int expert = blockIdx.x % p.expert_tiles * kTileExperts;
  const int units = units_of(p.hidden);

  __shared__ float4 group_sums[kGroups][32];
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int unit = group_begin(units, group); unit < group_begin(units, group + 1); ++unit) {
      SliceSum slice = {};
      for (int k16 = unit * kUnit; k16 < (unit + 1) * kUnit; k16 += 16) {
        const int k = k16 + 2 * t;
        Fragment<X, 4> x;
        Fragment<float, 2> weight;
        for (int i = 0; i < 4; ++i) {
          const int64_t row = token + g + i % 2 * 8;
          if constexpr (sizeof(X) == 4) {
            x.set(i, load_two_floats(p.x, row, p.tokens, k + i / 2 * 8, p.hidden, false));
          } else {
            x.terms[0][i] = load_two<X>(p.x, row, p.tokens, k + i / 2 * 8, p.hidden);
          }
        }
        for (int i = 0; i < 2; ++i)
          weight.set(i, load_two_floats(p.weight, expert + g, p.experts, k + i * 8, p.hidden, kHiddenExperts));
        slice.multiply(x, weight);
      }
      sum = sum + slice.total();
    }
    group_sums[group][lane] = sum;
  }
  const float4 total = tree_sum<kGroups>(0, [&](int group) { return group_sums[group][lane]; });
  const float2 bias = make_float2(load_bias<X>(p, expert + 2 * t), load_bias<X>(p, expert + 2 * t + 1));
  store_quad<X>(p, place_quad(p, token, expert, lane, bias), total);
}

cudaError_t launch_naive(int weight_layout, int operands, const Problem& p, cudaStream_t stream) {
  constexpr void (*kKernels[2][kOperands])(Problem) = {
      {sm90_router_gemm_naive<bfloat16, false>, sm90_router_gemm_naive<float16, false>,
       sm90_router_gemm_naive_float32<float, false>, sm90_router_gemm_naive_float32<bfloat16, false>},
      {sm90_router_gemm_naive<bfloat16, true>, sm90_router_gemm_naive<float16, true>,
       sm90_router_gemm_naive_float32<float, true>, sm90_router_gemm_naive_float32<bfloat16, true>}};
  const unsigned blocks = unsigned((p.tokens + kTileTokens - 1) / kTileTokens * p.expert_tiles);
  kKernels[weight_layout][operands]<<<blocks, 32, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace jax_router
