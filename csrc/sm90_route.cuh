// Routing of one token by one warp: from its logits to its experts and weights. All kernels that route call this one
// function, with the same number of logits per lane for the same number of experts, so their bits are the same.
//
// Lane i holds the logits of experts [i * n, (i + 1) * n). Selection takes top_k rounds: every lane knows the best of
// its choices, the warp finds the highest, and who has it takes it out. Choices are compared as 32-bit keys that order
// as jax.lax.top_k orders floats. Equal ones leave together, which is seen at the end; then the rounds are repeated
// with one expert at a time, the lowest first. Round i's expert goes to lane i, which works out its weight.
//
// Order of additions, by the number of experts and top_k alone: the exponentials of a lane in ascending order, then
// lanes by halves; the weights of a token by halves of the next power of two of top_k.
#pragma once

#include "route.h"
#include "sm90_tile.cuh"

namespace jax_router {

constexpr int kMaxTopK = 32, kMaxGroups = 32, kMaxRoutedExperts = 1024;

// Logits per lane.
__host__ __device__ constexpr int logits_per_lane(int experts) {
  return experts <= 64 ? 2 : experts <= 128 ? 4 : experts <= 256 ? 8 : experts <= 384 ? 12 : experts <= 512 ? 16 : 32;
}

// What the kernels that route take, besides a Problem.
struct Routing {
  jr_routing_spec spec;
  const void* correction_bias;
  const void* expert_scale;
  int correction_bias_dtype, expert_scale_dtype, dtype;  // dtype is that of x
  const int32_t* replay;
  float* weights;
  int32_t* experts;
  float* logits;      // where to store them, or null
  int group_experts;  // of a group; 0 without groups
};

// An order-preserving key of a choice. NaN, whatever its sign, is the highest; 0 is below all keys.
__device__ __forceinline__ uint32_t choice_key(float choice) {
  const uint32_t bits = __float_as_uint(choice);
  return choice != choice ? ~0u : bits ^ (uint32_t(int32_t(bits) >> 31) | 1u << 31);
}
__device__ __forceinline__ float choice_of_key(uint32_t key) {
  return __uint_as_float(key ^ (~uint32_t(int32_t(key) >> 31) | 1u << 31));
}

// A warp's sum in every lane: of `lanes` neighbours, a power of two.
__device__ __forceinline__ float sum_lanes(float value, int lanes) {
#pragma unroll 1
  for (int half = lanes / 2; half > 0; half /= 2) value += __shfl_xor_sync(~0u, value, half);
  return value;
}

__device__ __forceinline__ float load_per_expert(const void* values, int dtype, int expert) {
  if (dtype == JR_FLOAT32) return static_cast<const float*>(values)[expert];
  return dtype == JR_BFLOAT16 ? to_float(static_cast<const bfloat16*>(values)[expert])
                              : to_float(static_cast<const float16*>(values)[expert]);
}

// The logits of a token as softmax needs them.
struct Softmax {
  float highest, inverse_sum;
};

// Replaces logits by scores, function by function: one branch for all.
template <int kCount>
__device__ __forceinline__ void score(int function, const Softmax& softmax, float (&values)[kCount]) {
  if (function == JR_SIGMOID) {
#pragma unroll
    for (float& v : values) v = reciprocal(1.f + expf(-v));
  } else if (function == JR_SOFTMAX) {
#pragma unroll
    for (float& v : values) v = expf(v - softmax.highest) * softmax.inverse_sum;
  } else if (function == JR_SQRTSOFTPLUS) {
#pragma unroll
    for (float& v : values) v = sqrtf(fmaxf(v, 0.f) + log1pf(expf(-fabsf(v))));
  }
}

// The highest of a few keys, in a tree.
template <int kCount>
__device__ __forceinline__ uint32_t highest_key(const uint32_t* keys) {
  if constexpr (kCount == 1) {
    return keys[0];
  } else {
    return max(highest_key<kCount / 2>(keys), highest_key<kCount - kCount / 2>(keys + kCount / 2));
  }
}

template <int kPerLane>
struct TokenRouter {
  struct Scratch {  // of a warp, in shared memory
    alignas(16) float logits[32 * kPerLane];
    alignas(16) uint32_t keys[32 * kPerLane];
    int selected[kMaxTopK];
  };
  float correction[kPerLane];

  // Fetches what does not depend on logits, while these are on their way.
  __device__ __forceinline__ void fetch(const Problem& p, const Routing& r) {
    const int first = int(threadIdx.x % 32) * kPerLane, last = p.experts - 1;
#pragma unroll
    for (float& c : correction) c = 0.f;
    if (r.correction_bias_dtype == JR_FLOAT32) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        correction[j] = static_cast<const float*>(r.correction_bias)[min(first + j, last)];
    } else if (r.correction_bias_dtype != JR_NONE) {
#pragma unroll 1
      for (int j = 0; j < kPerLane; ++j) {
        const float loaded = load_per_expert(r.correction_bias, r.correction_bias_dtype, min(first + j, last));
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) correction[i] = i == j ? loaded : correction[i];
      }
    }
  }

  // All lanes of the warp. `logits` of experts that do not exist may be anything.
  __device__ __forceinline__ void route(const Problem& p, const Routing& r, unsigned token, float (&logits)[kPerLane],
                                        Scratch& scratch) const {
    const jr_routing_spec& spec = r.spec;
    const int lane = int(threadIdx.x % 32), exist = p.experts - lane * kPerLane;  // of this lane
    const bool mine = lane < spec.top_k;
    if (spec.round_logits != 0) {
#pragma unroll
      for (float& l : logits)
        l = r.dtype == JR_BFLOAT16 ? to_float(from_float<bfloat16>(l)) : to_float(from_float<float16>(l));
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) logits[j] = j < exist ? logits[j] : choice_of_key(0x007FFFFF);  // -inf
    store(scratch.logits, logits);

    Softmax softmax = {};
    if (spec.score_function == JR_SOFTMAX) {
      uint32_t keys[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) keys[j] = choice_key(logits[j]);
      softmax.highest = choice_of_key(__reduce_max_sync(~0u, highest_key<kPerLane>(keys)));
      float sum = 0.f;
#pragma unroll
      for (float l : logits) sum += expf(l - softmax.highest);
      softmax.inverse_sum = 1.f / sum_lanes(sum, 32);
    }

    if (r.replay == nullptr) {
      select(p, r, softmax, logits, scratch);
    } else if (mine) {
      scratch.selected[lane] = r.replay[uint64_t(token) * unsigned(spec.top_k) + lane];
    }
    __syncwarp();

    // The weights, one per lane. An expert that does not exist has NaN.
    const int expert = mine ? scratch.selected[lane] : -1;
    const bool exists = unsigned(expert) < unsigned(p.experts);
    float weight[1] = {exists ? scratch.logits[expert] : choice_of_key(~0u)};
    const int lanes = 1 << (32 - __clz(spec.top_k - 1));  // the next power of two
    if (spec.score_function == JR_SOFTMAX_TOPK) {
      const float highest = choice_of_key(__reduce_max_sync(~0u, mine ? choice_key(weight[0]) : 0u));
      weight[0] = expf(weight[0] - highest);
      weight[0] = weight[0] / sum_lanes(mine ? weight[0] : 0.f, lanes);
    } else {
      score(spec.score_function, softmax, weight);
    }
    if (spec.renormalize != 0) {
      const float total = sum_lanes(mine ? weight[0] : 0.f, lanes);
      weight[0] =
          weight[0] / ((total < spec.renormalize_min ? spec.renormalize_min : total) + spec.renormalize_epsilon);
    }
    weight[0] *= spec.scaling_factor;
    if (!mine) return;
    if (exists && r.expert_scale_dtype != JR_NONE)
      weight[0] *= load_per_expert(r.expert_scale, r.expert_scale_dtype, expert);
    const uint64_t out = uint64_t(token) * unsigned(spec.top_k) + unsigned(lane);
    r.weights[out] = weight[0];
    r.experts[out] = expert;
  }

 private:
  // Leaves the experts in scratch.selected, the best first.
  static __device__ __forceinline__ void select_rounds(int top_k, uint32_t (&keys)[kPerLane], int* selected) {
    const int first = int(threadIdx.x % 32) * kPerLane;
    uint32_t best = highest_key<kPerLane>(keys);
#pragma unroll 1
    for (int round = 0; round < top_k; ++round) {
      const uint32_t highest = __reduce_max_sync(~0u, best);
      int expert = first;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (keys[j] == highest) expert = first + j, keys[j] = 0;
      }
      if (best == highest) selected[round] = expert;
      best = highest_key<kPerLane>(keys);
    }
  }

  // The same, of equal choices the lowest expert first.
  static __device__ __noinline__ void select_rounds_with_ties(int top_k, const uint32_t* saved, int* selected) {
    const int lane = int(threadIdx.x % 32);
    uint32_t taken = 0;  // of this lane, by bits
    __syncwarp();
    for (int round = 0; round < top_k; ++round) {
      uint32_t best = 0;
      int best_j = 0;
      for (int j = kPerLane - 1; j >= 0; --j) {
        const uint32_t key = taken >> j & 1 ? 0u : saved[lane * kPerLane + j];
        if (key >= best) best = key, best_j = j;
      }
      const uint32_t winners = __ballot_sync(~0u, best == __reduce_max_sync(~0u, best));
      if (lane == __ffs(int(winners)) - 1) {
        taken |= 1u << best_j;
        selected[round] = lane * kPerLane + best_j;
      }
    }
  }

  __device__ __forceinline__ void select(const Problem& p, const Routing& r, const Softmax& softmax,
                                         const float (&logits)[kPerLane], Scratch& scratch) const {
    const jr_routing_spec& spec = r.spec;
    const int exist = p.experts - int(threadIdx.x % 32) * kPerLane;
    float choices[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) choices[j] = logits[j];
    if (spec.select_on_logits == 0 && (r.correction_bias_dtype != JR_NONE || r.group_experts != 0))
      score(spec.score_function, softmax, choices);
    if (r.correction_bias_dtype != JR_NONE) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) choices[j] += correction[j];
    }
    uint32_t keys[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) keys[j] = j < exist ? choice_key(choices[j]) : 0u;
    if (r.group_experts != 0) keep_groups(r, exist, keys, scratch);

    store(scratch.keys, keys);
    select_rounds(spec.top_k, keys, scratch.selected);
    int left = 0;
#pragma unroll
    for (uint32_t key : keys) left += key != 0;
    if (__reduce_add_sync(~0u, unsigned(left)) != unsigned(p.experts - spec.top_k))
      select_rounds_with_ties(spec.top_k, scratch.keys, scratch.selected);
  }

  // Replaces the choices outside the best groups.
  static __device__ __forceinline__ void keep_groups(const Routing& r, int exist, uint32_t (&keys)[kPerLane],
                                                     Scratch& scratch) {
    const jr_routing_spec& spec = r.spec;
    const int lane = int(threadIdx.x % 32);
    const int group_lanes = r.group_experts / kPerLane;
    const bool whole_lanes = group_lanes * kPerLane == r.group_experts && (group_lanes & (group_lanes - 1)) == 0;
    uint32_t highest = 0, second = 0;
    int scorer = 1, group = lane;  // lane `scorer * g` scores group g
    if (whole_lanes) {
      scorer = group_lanes;
      group = lane >> (31 - __clz(group_lanes));
#pragma unroll
      for (const uint32_t key : keys) second = max(second, min(key, highest)), highest = max(highest, key);
#pragma unroll 1
      for (int half = 1; half < group_lanes; half *= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, highest, half), other_second = __shfl_xor_sync(~0u, second, half);
        second = max(max(second, other_second), min(highest, other));
        highest = max(highest, other);
      }
    } else {
      store(scratch.keys, keys);
      __syncwarp();
      if (lane < spec.num_groups) {
        for (int i = 0; i < r.group_experts; ++i) {
          const uint32_t key = scratch.keys[lane * r.group_experts + i];
          second = max(second, min(key, highest)), highest = max(highest, key);
        }
      }
      __syncwarp();
    }
    if (spec.group_score == JR_TOP2_SUM) highest = choice_key(choice_of_key(highest) + choice_of_key(second));
    int rank = 0;
    for (int other_group = 0; other_group < spec.num_groups; ++other_group) {
      const uint32_t other = __shfl_sync(~0u, highest, other_group * scorer);
      rank += other > highest || (other == highest && other_group < group);
    }
    const uint32_t masked = choice_key(spec.masked_choice);
    if (whole_lanes) {
#pragma unroll
      for (uint32_t& key : keys) key = rank < spec.group_topk || exist <= 0 ? key : masked;
    } else {
      const uint32_t kept = __ballot_sync(~0u, lane < spec.num_groups && rank < spec.group_topk);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (j < exist && (kept >> (lane * kPerLane + j) / r.group_experts & 1) == 0) keys[j] = masked;
      }
    }
  }

  // Lane by lane, as wide as it goes.
  template <typename Value>
  static __device__ __forceinline__ void store(Value* to, const Value (&values)[kPerLane]) {
    constexpr int kWidth = kPerLane % 4 == 0 ? 4 : 2;
    struct alignas(kWidth * 4) Wide {
      Value values[kWidth];
    };
#pragma unroll
    for (int j = 0; j < kPerLane; j += kWidth) {
      Wide wide;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) wide.values[i] = values[j + i];
      *reinterpret_cast<Wide*>(to + int(threadIdx.x % 32) * kPerLane + j) = wide;
    }
  }
};

}  // namespace jax_router
