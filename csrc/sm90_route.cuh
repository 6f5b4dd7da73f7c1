// Routing of one token by one warp: from its logits to its experts and weights. All kernels that route call this one
// function, with the same number of logits per lane for the same number of experts, so their bits are the same.
//
// Lane i holds the logits of experts [i * n, (i + 1) * n). Selection: every lane sorts its choices, and in each of
// top_k rounds the warp finds the highest and the lane that has it moves on to its next. Choices are compared as 32-bit
// keys that order as jax.lax.top_k orders floats. Equal ones are noticed; then the rounds are repeated with one expert
// at a time, the lowest first. Round i's expert goes to lane i, which works out its weight.
//
// The score function, and whether logits themselves are compared, are fixed at compile time: otherwise they would be
// branches over code that does not run, and a single warp waits at each.
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

// The sum of `lanes` neighbouring lanes, a power of two, in each of them.
__device__ __forceinline__ float sum_lanes(float value, int lanes) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    if (half < lanes) value += __shfl_xor_sync(~0u, value, half);
  }
  return value;
}

__device__ __forceinline__ float load_per_expert(const void* values, int dtype, int expert) {
  if (dtype == JR_FLOAT32) return static_cast<const float*>(values)[expert];
  return dtype == JR_BFLOAT16 ? to_float(static_cast<const bfloat16*>(values)[expert])
                              : to_float(static_cast<const float16*>(values)[expert]);
}

// The values of this lane's experts, all loaded at once and not looked at before they are needed. Experts past the end
// repeat the last; without values they are zeros.
template <int kPerLane>
struct PerExpert {
  uint32_t raw[kPerLane];

  __device__ __forceinline__ void load(const void* values, int dtype, int experts, unsigned lane) {
    const int first = int(lane) * kPerLane, last = experts - 1;
    if (dtype == JR_NONE) {
#pragma unroll
      for (uint32_t& each : raw) each = 0;
    } else if (dtype == JR_FLOAT32) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) raw[j] = static_cast<const uint32_t*>(values)[min(first + j, last)];
    } else {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) raw[j] = static_cast<const uint16_t*>(values)[min(first + j, last)];
    }
  }
  __device__ __forceinline__ float value(int j, int dtype) const {
    if (dtype == JR_FLOAT32 || dtype == JR_NONE) return __uint_as_float(raw[j]);
    return dtype == JR_BFLOAT16 ? __uint_as_float(raw[j] << 16) : to_float(__ushort_as_half(uint16_t(raw[j])));
  }
};

// Stores the logits of this lane's experts.
template <int kPerLane>
__device__ __forceinline__ void store_logits(const Problem& p, float* to, unsigned token, unsigned lane,
                                             const float (&logits)[kPerLane]) {
  const int first = int(lane) * kPerLane;
  float* const row = to + uint64_t(token) * unsigned(p.experts);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (first + j < p.experts) row[first + j] = logits[j];
  }
}

// The logits of a token as softmax needs them.
struct Softmax {
  float highest, inverse_sum;
};

template <int kScore>
__device__ __forceinline__ float score(const Softmax& softmax, float logit) {
  if constexpr (kScore == JR_SOFTMAX) return expf(logit - softmax.highest) * softmax.inverse_sum;
  if constexpr (kScore == JR_SIGMOID) return reciprocal(1.f + expf(-logit));
  if constexpr (kScore == JR_SQRTSOFTPLUS) return sqrtf(fmaxf(logit, 0.f) + log1pf(expf(-fabsf(logit))));
  return logit;
}

// Batcher's odd-even merge sort of keys [kFirst, kFirst + kSize), the highest first; those past kCount count as 0.
template <int kFirst, int kSize, int kStep, int kCount>
__device__ __forceinline__ void merge_keys(uint32_t (&keys)[kCount]) {
  const auto order = [&](int i, int j) {
    if (j >= kCount) return;
    const uint32_t low = min(keys[i], keys[j]);
    keys[i] = max(keys[i], keys[j]), keys[j] = low;
  };
  if constexpr (2 * kStep < kSize) {
    merge_keys<kFirst, kSize, 2 * kStep>(keys);
    merge_keys<kFirst + kStep, kSize, 2 * kStep>(keys);
#pragma unroll
    for (int i = kFirst + kStep; i + kStep < kFirst + kSize; i += 2 * kStep) order(i, i + kStep);
  } else {
    order(kFirst, kFirst + kStep);
  }
}
template <int kFirst, int kSize, int kCount>
__device__ __forceinline__ void sort_keys(uint32_t (&keys)[kCount]) {
  if constexpr (kSize > 1) {
    sort_keys<kFirst, kSize / 2>(keys);
    sort_keys<kFirst + kSize / 2, kSize / 2>(keys);
    merge_keys<kFirst, kSize, 1>(keys);
  }
}

// kPlain: neither a correction bias nor groups, so logits are compared.
template <int kPerLane, int kScore, bool kPlain>
struct TokenRouter {
  struct Scratch {  // of a warp, in shared memory
    alignas(16) float logits[32 * kPerLane];
    alignas(16) uint32_t keys[32 * kPerLane];
  };
  const int lane;
  PerExpert<kPerLane> correction;

  __device__ __forceinline__ explicit TokenRouter(unsigned lane_) : lane(int(lane_)) {}

  // Fetches what does not depend on logits, while these are on their way.
  __device__ __forceinline__ void fetch(const Problem& p, const Routing& r) {
    if constexpr (!kPlain) correction.load(r.correction_bias, r.correction_bias_dtype, p.experts, unsigned(lane));
  }

  // All lanes of the warp. `logits` of experts that do not exist may be anything.
  __device__ __forceinline__ void route(const Problem& p, const Routing& r, unsigned token, float (&logits)[kPerLane],
                                        Scratch& scratch) const {
    const jr_routing_spec& spec = r.spec;
    const int exist = p.experts - lane * kPerLane;  // of this lane
    const bool mine = lane < spec.top_k;
    if (spec.round_logits != 0) {
#pragma unroll
      for (float& l : logits)
        l = r.dtype == JR_BFLOAT16 ? to_float(from_float<bfloat16>(l)) : to_float(from_float<float16>(l));
    }
    const bool replays = r.replay != nullptr;
    if (!kPlain || kScore == JR_SOFTMAX) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) logits[j] = j < exist ? logits[j] : -INFINITY;
    }
    if (!kPlain || replays) store(scratch.logits, logits);  // where logits are compared, a winner's key is its logit

    Softmax softmax = {};
    if constexpr (kScore == JR_SOFTMAX) {
      uint32_t highest = 0;
#pragma unroll
      for (const float l : logits) highest = max(highest, choice_key(l));
      softmax.highest = choice_of_key(__reduce_max_sync(~0u, highest));
      float sum = 0.f;
#pragma unroll
      for (const float l : logits) sum += expf(l - softmax.highest);
      softmax.inverse_sum = 1.f / sum_lanes(sum, 32);
    }

    int expert = -1;
    uint32_t key = ~0u;
    if (!replays) {
      expert = select(p, r, softmax, logits, scratch, key);
    } else {
      if (mine) expert = r.replay[uint64_t(token) * unsigned(spec.top_k) + lane];
      __syncwarp();
    }

    // The weights, one per lane. An expert that does not exist has NaN.
    const bool exists = unsigned(expert) < unsigned(p.experts);
    float logit = choice_of_key(key);
    if (!kPlain || replays) logit = mine && exists ? scratch.logits[expert] : choice_of_key(~0u);
    const int lanes = 1 << (32 - __clz(spec.top_k - 1));  // the next power of two
    float weight;
    if constexpr (kScore == JR_SOFTMAX_TOPK) {
      const float highest = choice_of_key(kPlain && !replays ? __shfl_sync(~0u, key, 0)
                                                             : __reduce_max_sync(~0u, mine ? choice_key(logit) : 0u));
      weight = mine ? expf(logit - highest) : 0.f;
      weight *= reciprocal(sum_lanes(weight, lanes));
    } else {
      weight = score<kScore>(softmax, logit);
    }
    if (spec.renormalize != 0) {
      const float total = sum_lanes(mine ? weight : 0.f, lanes);
      weight /= (total < spec.renormalize_min ? spec.renormalize_min : total) + spec.renormalize_epsilon;
    }
    weight *= spec.scaling_factor;
    if (!mine) return;
    if (exists && r.expert_scale_dtype != JR_NONE)
      weight *= load_per_expert(r.expert_scale, r.expert_scale_dtype, expert);
    const uint64_t out = uint64_t(token) * unsigned(spec.top_k) + unsigned(lane);
    r.weights[out] = weight;
    r.experts[out] = expert;
  }

 private:
  // The expert of round `lane`, and its key.
  __device__ __forceinline__ int select(const Problem& p, const Routing& r, const Softmax& softmax,
                                        const float (&logits)[kPerLane], Scratch& scratch, uint32_t& key) const {
    const jr_routing_spec& spec = r.spec;
    const int exist = p.experts - lane * kPerLane;
    const bool mine = lane < spec.top_k;
    uint32_t keys[kPerLane];
    if constexpr (kPlain) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) keys[j] = j < exist ? choice_key(logits[j]) : 0u;
    } else {
      float choices[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) choices[j] = logits[j];
      if (spec.select_on_logits == 0) {
#pragma unroll
        for (float& choice : choices) choice = score<kScore>(softmax, choice);
      }
      if (r.correction_bias_dtype != JR_NONE) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) choices[j] += correction.value(j, r.correction_bias_dtype);
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) keys[j] = j < exist ? choice_key(choices[j]) : 0u;
      if (r.group_experts != 0) keep_groups(r, exist, keys, scratch);
    }
    store(scratch.keys, keys);
    sort_keys<0, kPerLane == 12 ? 16 : kPerLane>(keys);

    uint32_t last = 0, winners = 0;  // key of the round before, lanes that have this lane's
    bool equal = false;
#pragma unroll 4
    for (int round = 0; round < spec.top_k; ++round) {
      const uint32_t highest = __reduce_max_sync(~0u, keys[0]);
      const bool wins = keys[0] == highest;
      const uint32_t win = __ballot_sync(~0u, wins);
#pragma unroll
      for (int j = 0; j + 1 < kPerLane; ++j) keys[j] = wins ? keys[j + 1] : keys[j];
      keys[kPerLane - 1] = wins ? 0u : keys[kPerLane - 1];
      equal = equal || (win & (win - 1)) != 0 || highest == last;
      last = highest;
      if (lane == round) key = highest, winners = win;
    }
    __syncwarp();
    int expert = -1;
    if (equal) {
      expert = select_of_equals(spec.top_k, scratch);
      if (mine) key = scratch.keys[expert];
    } else if (mine) {
      // The lowest of those with the key: the last round may have taken one of several in its lane.
      const int first = (__ffs(int(winners)) - 1) * kPerLane;
#pragma unroll
      for (int j = kPerLane - 1; j >= 0; --j) expert = scratch.keys[first + j] == key ? first + j : expert;
    }
    return expert;
  }

  // The same where some are equal.
  static __device__ __noinline__ int select_of_equals(int top_k, const Scratch& scratch) {
    const int lane = int(threadIdx.x % 32);
    uint32_t taken = 0;  // of this lane, by bits
    int expert = -1;
    for (int round = 0; round < top_k; ++round) {
      uint32_t best = 0;
      int best_j = 0;
      for (int j = kPerLane - 1; j >= 0; --j) {
        const uint32_t key = taken >> j & 1 ? 0u : scratch.keys[lane * kPerLane + j];
        if (key >= best) best = key, best_j = j;
      }
      const uint32_t winners = __ballot_sync(~0u, best == __reduce_max_sync(~0u, best));
      const int winner = __ffs(int(winners)) - 1;
      if (lane == winner) taken |= 1u << best_j;
      const int selected = __shfl_sync(~0u, lane * kPerLane + best_j, winner);
      if (lane == round) expert = selected;
    }
    return expert;
  }

  // Replaces the choices outside the best groups.
  __device__ __forceinline__ void keep_groups(const Routing& r, int exist, uint32_t (&keys)[kPerLane],
                                              Scratch& scratch) const {
    const jr_routing_spec& spec = r.spec;
    const int group_lanes = r.group_experts / kPerLane;
    const bool whole_lanes = group_lanes * kPerLane == r.group_experts && (group_lanes & (group_lanes - 1)) == 0;
    uint32_t highest = 0, second = 0;
    int scorers = 1, group = lane;  // neighbouring lanes that have a group's score, from lane `scorers * group` on
    if (whole_lanes) {
      scorers = group_lanes;
      group = lane >> (31 - __clz(group_lanes));
#pragma unroll
      for (const uint32_t key : keys) second = max(second, min(key, highest)), highest = max(highest, key);
      for (int half = 1; half < group_lanes; half *= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, highest, half), other_second = __shfl_xor_sync(~0u, second, half);
        second = max(max(second, other_second), min(highest, other));
        highest = max(highest, other);
      }
    } else {
      store(scratch.keys, keys);
      __syncwarp();
      if (lane < spec.num_groups) {
#pragma unroll 1
        for (int i = 0; i < r.group_experts; ++i) {
          const uint32_t key = scratch.keys[lane * r.group_experts + i];
          second = max(second, min(key, highest)), highest = max(highest, key);
        }
      }
      __syncwarp();
    }
    if (spec.group_score == JR_TOP2_SUM) highest = choice_key(choice_of_key(highest) + choice_of_key(second));
    int place = 0;  // how many groups are better; every scorer looks at others
    for (int first = 0; first < spec.num_groups; first += scorers) {
      const int other_group = first + (lane & (scorers - 1));
      const uint32_t other = __shfl_sync(~0u, highest, other_group * scorers);
      const bool better = other > highest || (other == highest && other_group < group);
      const uint32_t lanes = __ballot_sync(~0u, better && other_group < spec.num_groups);
      place += __popc(lanes >> (lane & ~(scorers - 1)) & ~0u >> (32 - scorers));
    }
    const uint32_t masked = choice_key(spec.masked_choice);
    if (whole_lanes) {
#pragma unroll
      for (uint32_t& key : keys) key = place < spec.group_topk || exist <= 0 ? key : masked;
    } else {
      const uint32_t kept = __ballot_sync(~0u, lane < spec.num_groups && place < spec.group_topk);
#pragma unroll 1
      for (int j = 0; j < kPerLane; ++j) {
        const bool replaced = j < exist && (kept >> (lane * kPerLane + j) / r.group_experts & 1) == 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) keys[i] = i == j && replaced ? masked : keys[i];
      }
    }
  }

  // Lane by lane, as wide as it goes.
  template <typename Value>
  __device__ __forceinline__ void store(Value* to, const Value (&values)[kPerLane]) const {
    constexpr int kWidth = kPerLane % 4 == 0 ? 4 : 2;
    struct alignas(kWidth * 4) Wide {
      Value values[kWidth];
    };
#pragma unroll
    for (int j = 0; j < kPerLane; j += kWidth) {
      Wide wide;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) wide.values[i] = values[j + i];
      *reinterpret_cast<Wide*>(to + lane * kPerLane + j) = wide;
    }
  }
};

}  // namespace jax_router
