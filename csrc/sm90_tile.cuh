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
  float* parts;  // where blocks that share a tile leave their sums (sm90_sum_parts.cuh). Null: they add up
  int64_t tokens;
  int hidden, experts;
  int bias_dtype, out_dtype;  // jr_dtype
  int expert_tiles;           // tiles of the launched kernel along experts
  int box_tokens;             // rows of x that one copy brings
  int part_row;               // experts rounded up to four
  bool followed;              // by another launch of the same call, which starts early
};

// What the kernels that use the copy engine take: boxes are one unit wide with the 128-byte swizzle, so that 16-byte
// chunk c of row r lies at c ^ (r % 8). Boxes of weights [hidden, experts] are one unit high and up to 64 experts wide,
// 32 with the 64-byte swizzle. The engine writes zeros for elements outside the matrix.
struct TiledProblem {
  Problem problem;
  CUtensorMap x, weight;
};
constexpr int kRowBytes = kUnit * 2;
constexpr int kMaxBoxExperts = 64;  // of weights [hidden, experts]
constexpr int kSwizzleAlignment = 1024;

__device__ __forceinline__ float to_float(bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
template <typename Element>
__device__ __forceinline__ Element from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
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
__device__ __forceinline__ void store_one(const Problem& p, uint64_t index, float v) {
  if (p.out_dtype == JR_FLOAT32) {
    static_cast<float*>(p.out)[index] = v;
  } else {
    static_cast<Element*>(p.out)[index] = from_float<Element>(v);
  }
}

// Where one quad's logits go and what bias they get: worked out before the quad's total is there.
struct QuadPlace {
  uint64_t index;                // of the first token's logit; the second token's lies 8 * experts further
  bool both_experts, tokens[2];  // what exists
  float2 bias;
};

// `bias` is that of the quad's two experts. Tokens and experts are far below 2^32.
__device__ __forceinline__ QuadPlace place_quad(const Problem& p, unsigned tile_token, unsigned tile_expert,
                                                unsigned lane, float2 bias) {
  const unsigned token = tile_token + lane / 4, expert = tile_expert + lane % 4 * 2;
  const unsigned tokens = unsigned(p.tokens), experts = unsigned(p.experts);
  const bool exists = expert < experts;
  return {uint64_t(token) * experts + expert,
          expert + 1 < experts,
          {exists && token < tokens, exists && token + 8 < tokens},
          bias};
}

// Adds the bias to the totals of one quad and stores its logits. In pairs where pairs are aligned: the first expert is
// even, so that takes an even row length.
template <typename Element>
__device__ __forceinline__ void store_quad(const Problem& p, const QuadPlace& place, float4 total) {
  if (p.bias_dtype != JR_NONE) total = total + make_float4(place.bias.x, place.bias.y, place.bias.x, place.bias.y);
  const uint64_t second = place.index + 8 * unsigned(p.experts);
  if (p.out_dtype == JR_FLOAT32 && p.experts % 2 == 0) {
    float* const out = static_cast<float*>(p.out);
    if (place.tokens[0]) *reinterpret_cast<float2*>(out + place.index) = make_float2(total.x, total.y);
    if (place.tokens[1]) *reinterpret_cast<float2*>(out + second) = make_float2(total.z, total.w);
    return;
  }
  if (place.tokens[0]) store_one<Element>(p, place.index, total.x);
  if (place.tokens[0] && place.both_experts) store_one<Element>(p, place.index + 1, total.y);
  if (place.tokens[1]) store_one<Element>(p, second, total.z);
  if (place.tokens[1] && place.both_experts) store_one<Element>(p, second + 1, total.w);
}

}  // namespace jax_router
