// Routing of one token by one warp: from its logits to its experts and weights. All kernels that route call this one
// function, with the same number of logits per lane for the same number of experts, so their bits are the same.
//
// Lane i holds the logits of experts [i * n, (i + 1) * n). Selection takes top_k rounds: every lane knows the best of
// its choices, the warp finds the highest and the lowest lane that has it, and that lane takes its best one out. Keys
// are 32-bit integers that order as jax.lax.top_k orders floats; lanes and their experts ascend, so ties go to the
// lowest expert. Round i's expert goes to lane i, which works out its weight.
//
// Order of additions, by the number of experts and top_k alone: the scores of a lane in ascending order, then lanes by
// halves; the weights of a token by halves of the next power of two of top_k.
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
  int correction_bias_dtype, expert_scale_dtype;
  const int32_t* replay;
  float* weights;
  int32_t* experts;
  float* logits;           // where to store them, or null
  unsigned group_inverse;  // ceil(2^22 / experts of a group): expert * it >> 22 is the expert's group, up to 1024
};

// An order-preserving key of a choice. NaN, whatever its sign, is the highest; 0 is below all keys.
__device__ __forceinline__ uint32_t choice_key(float choice) {
  const uint32_t bits = __float_as_uint(choice);
  if (choice != choice) return ~0u;
  return bits ^ (bits >> 31 != 0 ? ~0u : 1u << 31);
}
__device__ __forceinline__ float choice_of_key(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 1u << 31 : ~0u));
}

// A warp's sum in every lane, of the first `lanes` (a power of two) and the lanes congruent to them.
__device__ __forceinline__ float sum_lanes(float value, int lanes) {
  for (int half = lanes / 2; half > 0; half /= 2) value += __shfl_xor_sync(~0u, value, half);
  return value;
}

template <typename Element>
__device__ __forceinline__ float load_per_expert(const void* values, int dtype, int expert) {
  if (dtype == JR_FLOAT32) return static_cast<const float*>(values)[expert];
  return to_float(static_cast<const Element*>(values)[expert]);
}

// The score of one logit; of softmax, with the highest logit and the sum of exponentials of the token.
__device__ __forceinline__ float score(int function, float logit, float highest, float sum) {
  if (function == JR_SIGMOID) return 1.f / (1.f + expf(-logit));
  if (function == JR_SQRTSOFTPLUS) return sqrtf(fmaxf(logit, 0.f) + log1pf(expf(-fabsf(logit))));
  if (function == JR_SOFTMAX) return expf(logit - highest) / sum;
  return logit;
}

template <typename Element, int kPerLane>
struct TokenRouter {
  // Shared memory of a warp: a token's logits, then its choices; one float in 32 is left free of bank conflicts.
  static constexpr int kScratch = 32 * kPerLane + kPerLane;
  static __device__ __forceinline__ int place(int expert) { return expert + expert / 32; }

  // What can be fetched while the logits are on their way.
  float correction[kPerLane];

  __device__ __forceinline__ void fetch(const Problem& p, const Routing& r) {
    const int first = int(threadIdx.x % 32) * kPerLane;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      correction[j] = 0.f;
      if (r.correction_bias_dtype != JR_NONE && first + j < p.experts)
        correction[j] = load_per_expert<Element>(r.correction_bias, r.correction_bias_dtype, first + j);
    }
  }

  // All lanes of the warp. `logits` of experts that do not exist are ignored.
  __device__ __forceinline__ void route(const Problem& p, const Routing& r, unsigned token, float (&logits)[kPerLane],
                                        float* scratch) const {
    const jr_routing_spec& spec = r.spec;
    const int lane = int(threadIdx.x % 32), first = lane * kPerLane;
    const bool mine = lane < spec.top_k;
    if (r.logits != nullptr) {
      float* const out = r.logits + uint64_t(token) * unsigned(p.experts) + first;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (first + j < p.experts) out[j] = logits[j];
      }
    }
    if (spec.round_logits != 0) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) logits[j] = to_float(from_float<Element>(logits[j]));
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) scratch[place(first + j)] = logits[j];

    float highest = 0.f, sum = 0.f;
    if (spec.score_function == JR_SOFTMAX) {
      uint32_t key = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (first + j < p.experts) key = max(key, choice_key(logits[j]));
      }
      highest = choice_of_key(__reduce_max_sync(~0u, key));
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (first + j < p.experts) sum += expf(logits[j] - highest);
      }
      sum = sum_lanes(sum, 32);
    }

    int expert = -1;  // of this lane's round
    if (r.replay == nullptr) {
      expert = select(p, r, logits, highest, sum, scratch);
    } else if (mine) {
      expert = r.replay[uint64_t(token) * unsigned(spec.top_k) + lane];
    }
    __syncwarp();  // the token's logits are in `scratch`

    // The weights, one per lane. An expert that does not exist has NaN.
    const bool exists = unsigned(expert) < unsigned(p.experts);
    const float logit = mine && exists ? scratch[place(expert)] : __uint_as_float(0x7FC00000u);
    const int lanes = 1 << (32 - __clz(spec.top_k - 1));  // the next power of two
    float weight;
    if (spec.score_function == JR_SOFTMAX_TOPK) {
      highest = choice_of_key(__reduce_max_sync(~0u, mine ? choice_key(logit) : 0u));
      weight = expf(logit - highest);
      weight = weight / sum_lanes(mine ? weight : 0.f, lanes);
    } else {
      weight = score(spec.score_function, logit, highest, sum);
    }
    if (spec.renormalize != 0) {
      const float total = sum_lanes(mine ? weight : 0.f, lanes);
      weight = weight / ((total < spec.renormalize_min ? spec.renormalize_min : total) + spec.renormalize_epsilon);
    }
    weight *= spec.scaling_factor;
    if (!mine) return;
    if (r.expert_scale_dtype != JR_NONE)
      weight *= exists ? load_per_expert<Element>(r.expert_scale, r.expert_scale_dtype, expert) : logit;
    const uint64_t out = uint64_t(token) * unsigned(spec.top_k) + unsigned(lane);
    r.weights[out] = weight;
    r.experts[out] = expert;
  }

 private:
  // The expert of round `lane`; `scratch` holds the logits before and after.
  __device__ __forceinline__ int select(const Problem& p, const Routing& r, const float (&logits)[kPerLane],
                                        float highest, float sum, float* scratch) const {
    const jr_routing_spec& spec = r.spec;
    const int lane = int(threadIdx.x % 32), first = lane * kPerLane;
    const bool by_score = spec.select_on_logits == 0 && (r.correction_bias_dtype != JR_NONE || spec.num_groups != 0);
    uint32_t keys[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      float choice = logits[j];
      if (by_score) choice = score(spec.score_function, choice, highest, sum);
      if (r.correction_bias_dtype != JR_NONE) choice += correction[j];
      keys[j] = first + j < p.experts ? choice_key(choice) : 0u;
    }
    if (spec.num_groups != 0) keep_groups(p, r, logits, keys, scratch);

    int selected = -1;
    for (int round = 0; round < spec.top_k; ++round) {
      uint32_t best = keys[0];
      int best_j = 0;
#pragma unroll
      for (int j = 1; j < kPerLane; ++j) {
        if (keys[j] > best) best = keys[j], best_j = j;
      }
      const uint32_t winners = __ballot_sync(~0u, best == __reduce_max_sync(~0u, best));
      const int winner = __ffs(int(winners)) - 1;
      const int expert = __shfl_sync(~0u, first + best_j, winner);
      if (lane == round) selected = expert;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (lane == winner && j == best_j) keys[j] = 0;
      }
    }
    return selected;
  }

  // Replaces the choices outside the best groups. Lane g scores group g.
  __device__ __forceinline__ void keep_groups(const Problem& p, const Routing& r, const float (&logits)[kPerLane],
                                              uint32_t (&keys)[kPerLane], float* scratch) const {
    const jr_routing_spec& spec = r.spec;
    const int lane = int(threadIdx.x % 32), first = lane * kPerLane, size = p.experts / spec.num_groups;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) scratch[place(first + j)] = __uint_as_float(keys[j]);
    __syncwarp();
    uint32_t highest = 0, second = 0;
    if (lane < spec.num_groups) {
      for (int i = 0; i < size; ++i) {
        const uint32_t key = __float_as_uint(scratch[place(lane * size + i)]);
        second = max(second, min(key, highest));
        highest = max(highest, key);
      }
      if (spec.group_score == JR_TOP2_SUM) highest = choice_key(choice_of_key(highest) + choice_of_key(second));
    }
    int rank = 0;
    for (int group = 0; group < spec.num_groups; ++group) {
      const uint32_t other = __shfl_sync(~0u, highest, group);
      rank += other > highest || (other == highest && group < lane);
    }
    const uint32_t kept = __ballot_sync(~0u, lane < spec.num_groups && rank < spec.group_topk);
    const uint32_t masked = choice_key(spec.masked_choice);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const unsigned group = unsigned(first + j) * r.group_inverse >> 22;
      if (first + j < p.experts && (kept >> group & 1) == 0) keys[j] = masked;
      scratch[place(first + j)] = logits[j];
    }
  }
};

}  // namespace jax_router
