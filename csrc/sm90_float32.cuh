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

// The two sums of a slice, of one tile of 16 tokens x 8 experts.
struct SliceSum {
  float4 high, low;

  template <typename X>
  __device__ __forceinline__ void multiply(const Fragment<X, 4>& x, const Fragment<float, 2>& weight) {
    const auto add = [&](float4& sum, const float4& before, int of_x, int of_weight) {
      mma_m16n8k16(sum, x.terms[of_x], weight.terms[of_weight][0], weight.terms[of_weight][1], before, bfloat16());
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
