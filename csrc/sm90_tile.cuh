// Pieces every sm90 kernel shares: the problem as the device sees it, and how a finished
// fragment becomes logits.
//
// A quad is the float4 one lane holds of a 16-token x 8-expert tile: with g = lane / 4 and t = lane % 4, x and y are
// token g, experts 2t and 2t+1; z and w are token g + 8, the same experts. mma.sync and wgmma both accumulate this way.
#pragma once

#include "reduction_tree.cuh"
#include "router_gemm.h"
#include "sm90_primitives.cuh"

namespace jax_router {

constexpr int kTileTokens = 16;
constexpr int kTileExperts = 8;

struct Problem {
  const void* x;
  const void* weight;
  const void* bias;
  void* out;
  int64_t tokens;
  int hidden, experts;
  int bias_dtype, out_dtype;  // jr_dtype
  int expert_tiles;           // tiles of the launched kernel along experts
  int box_tokens;             // rows of x that one copy brings
};

// What the kernels that use the copy engine take: boxes are one unit wide with the 128-byte swizzle, so that 16-byte
// chunk c of row r lies at c ^ (r % 8). The engine writes zeros for elements outside the matrix.
struct TiledProblem {
  Problem problem;
  CUtensorMap x, weight;
};
constexpr int kRowBytes = kUnit * 2;
constexpr int kSwizzleAlignment = 1024;

__device__ __forceinline__ float to_float(bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float16 v) { return __half2float(v); }
template <typename Element>
__device__ __forceinline__ Element from_float(float v);
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float v) {
  return __float2half_rn(v);
}

template <typename Element>
__device__ __forceinline__ float load_bias(const Problem& p, int expert) {
  if (p.bias_dtype == JR_NONE || expert >= p.experts) return 0.0f;
  if (p.bias_dtype == JR_FLOAT32) return static_cast<const float*>(p.bias)[expert];
  return to_float(static_cast<const Element*>(p.bias)[expert]);
}

template <typename Element>
__device__ __forceinline__ void store_one(const Problem& p, int64_t index, float v) {
  if (p.out_dtype == JR_FLOAT32) {
    static_cast<float*>(p.out)[index] = v;
  } else {
    static_cast<Element*>(p.out)[index] = from_float<Element>(v);
  }
}

// Logits of two neighbouring experts of one token; `expert` is even, so with an even row length the pair is aligned.
template <typename Element>
__device__ __forceinline__ void store_pair(const Problem& p, int64_t token, int expert, float first, float second) {
  if (token >= p.tokens || expert >= p.experts) return;
  const int64_t index = token * p.experts + expert;
  if (p.out_dtype == JR_FLOAT32 && p.experts % 2 == 0) {
    *reinterpret_cast<float2*>(static_cast<float*>(p.out) + index) = make_float2(first, second);
    return;
  }
  store_one<Element>(p, index, first);
  if (expert + 1 < p.experts) store_one<Element>(p, index + 1, second);
}

// Adds the bias to the totals of one quad and stores its logits. first_bias and second_bias are those of its two
// experts.
template <typename Element>
__device__ __forceinline__ void store_quad(const Problem& p, int64_t tile_token, int tile_expert, int lane,
                                           float4 total, float first_bias, float second_bias) {
  const int64_t token = tile_token + lane / 4;
  const int expert = tile_expert + lane % 4 * 2;
  if (p.bias_dtype != JR_NONE) total = total + make_float4(first_bias, second_bias, first_bias, second_bias);
  store_pair<Element>(p, token, expert, total.x, total.y);
  store_pair<Element>(p, token + 8, expert, total.z, total.w);
}

}  // namespace jax_router
