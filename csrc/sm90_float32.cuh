// Float32 operands on the tensor cores, exact to float32: every element is the sum of three bfloat16 terms, each the
// nearest to what the terms before it leave, and of the products of terms those that float32 would notice are added up.
//
//   x bfloat16   x*w1 | x*w2 + x*w3
//   x float32    x1*w1 | x1*w2 + x2*w1 + x1*w3 + x2*w2 + x3*w1
//
// A slice is one unit of four k16 steps. Of what stands before the bar every step is a sum of its own by the tensor
// core, and `high` adds these up in float32, to nearest: a tensor core that goes on from a sum truncates it. What
// stands behind it, about 2^-7 as large, is one chain over the slice in this order, `low`; the slice's sum is high +
// low. What is left out is at most 2^-23 of a product. The terms of an infinite float32 are an infinity and NaN, so its
// logits are NaN; those of an infinite bfloat16 are infinite where the terms of the weight have one sign, else NaN too.
#pragma once

#include "sm90_tile.cuh"

namespace jax_router {

constexpr int kTerms = 3;

// Two neighbouring elements of K as pairs of terms.
__device__ __forceinline__ void split(float2 v, uint32_t (&terms)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = pack_bfloat16(v);
    v.x -= __uint_as_float(terms[i] << 16);
    v.y -= __uint_as_float(terms[i] & 0xFFFF0000u);
  }
}

// Rows of one unit of a float32 matrix in shared memory: chunk c of row r lies at c ^ (r % 4 * 2), so that neither
// copies of whole lines nor loads of pairs meet in a bank. pair_of() is the pair that a lane takes of row lane / 4 in
// the first half of the unit's first k16 step; in bits of the address the second half differs by kHalf, a step by
// kStep.
constexpr int kFloatRowBytes = kUnit * 4;
constexpr uint32_t kHalf = 32, kStep = 64;
__device__ __forceinline__ uint32_t pair_of(uint32_t rows, unsigned lane) {
  const unsigned g = lane / 4, t = lane % 4;
  return rows + g * kFloatRowBytes + (t / 2 ^ g % 4 * 2) * 16 + t % 2 * 8;
}

// One operand of a k16 step, as mma.sync takes it: `kRegisters` pairs of elements for each term.
template <typename Element, int kRegisters>
struct Fragment {
  static constexpr int kTermsOf = sizeof(Element) == 4 ? kTerms : 1;
  uint32_t terms[kTermsOf][kRegisters];

  // Float32: sets pair `i` of every term.
  __device__ __forceinline__ void set(int i, float2 v) {
    uint32_t parts[kTerms];
    split(v, parts);
#pragma unroll
    for (int term = 0; term < kTerms; ++term) terms[term][i] = parts[term];
  }
};

// The two sums of a slice, of 16 rows of A and 8 columns of B.
struct SliceSum {
  float4 high, low;

  // Adds one k16 step: of x as A and the weight as B, or the other way round.
  template <typename X, int kRegistersOfX, int kRegistersOfWeight>
  __device__ __forceinline__ void multiply(const Fragment<X, kRegistersOfX>& x,
                                           const Fragment<float, kRegistersOfWeight>& weight) {
    const auto add = [&](float4& sum, const float4& before, int of_x, int of_weight) {
      const auto& x_term = x.terms[of_x];
      const auto& weight_term = weight.terms[of_weight];
      if constexpr (kRegistersOfX == 4) {
        mma_m16n8k16(sum, x_term, weight_term[0], weight_term[1], before, bfloat16());
      } else {
        mma_m16n8k16(sum, weight_term, x_term[0], x_term[1], before, bfloat16());
      }
    };
    float4 step;
    add(step, {}, 0, 0);
    high = high + step;  // never -0, as it begins with +0
    if constexpr (sizeof(X) == 4) {
      add(low, low, 0, 1);
      add(low, low, 1, 0);
      add(low, low, 0, 2);
      add(low, low, 1, 1);
      add(low, low, 2, 0);
    } else {
      add(low, low, 0, 1);
      add(low, low, 0, 2);
    }
  }
  __device__ __forceinline__ float4 total() const { return high + low; }
};

__host__ __device__ constexpr int units_per_group(int hidden) { return ceil_div(units_of(hidden), kGroups); }

}  // namespace jax_router
