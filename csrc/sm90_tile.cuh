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
  float4* workspace;
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

// Where one quad's logits go and what bias they get: worked out before the quad's total is there.
struct QuadPlace {
  int64_t index;                 // of the first token's logit; the second token's lies 8 * experts further
  bool both_experts, tokens[2];  // what exists
  float2 bias;
};

// `bias` is that of the quad's two experts.
__device__ __forceinline__ QuadPlace place_quad(const Problem& p, int64_t tile_token, int tile_expert, int lane,
                                                float2 bias) {
  const int64_t token = tile_token + lane / 4;
  const int expert = tile_expert + lane % 4 * 2;
  const bool exists = expert < p.experts;
  return {token * p.experts + expert,
          expert + 1 < p.experts,
          {exists && token < p.tokens, exists && token + 8 < p.tokens},
          bias};
}

// Logits of two neighbouring experts of one token. The first expert is even, so with an even row length the pair is
// aligned.
template <typename Element>
__device__ __forceinline__ void store_pair(const Problem& p, int64_t index, bool both, float first, float second) {
  if (p.out_dtype == JR_FLOAT32 && p.experts % 2 == 0) {
    *reinterpret_cast<float2*>(static_cast<float*>(p.out) + index) = make_float2(first, second);
    return;
  }
  store_one<Element>(p, index, first);
  if (both) store_one<Element>(p, index + 1, second);
}

// Adds the bias to the totals of one quad and stores its logits.
template <typename Element>
__device__ __forceinline__ void store_quad(const Problem& p, const QuadPlace& place, float4 total) {
  if (p.bias_dtype != JR_NONE) total = total + make_float4(place.bias.x, place.bias.y, place.bias.x, place.bias.y);
  if (place.tokens[0]) store_pair<Element>(p, place.index, place.both_experts, total.x, total.y);
  if (place.tokens[1]) {
    store_pair<Element>(p, place.index + 8 * int64_t(p.experts), place.both_experts, total.z, total.w);
  }
}

}  // namespace jax_router
