// Routing of one token on the CPU, in double: what jax_router.RoutingSpec defines, and how far float32 may be from it.
// Part of the standalone check (check.cu); host code only.
//
// Where logits are compared, with or without a correction bias, every step is one float32 operation and one order is
// right: the highest first, ties to the lowest expert, NaN above infinity. Where scores are compared, a choice is an
// interval as docs/numerics.md derives it, and an order is wrong where an expert stands before one that certainly comes
// first. Experts with the same logit and the same correction tie there too.
#include "check_route_reference.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <string.h>

#include <algorithm>

namespace jax_router_check {
namespace {

const double kUnitSpacing = ldexp(1, -23), kRounding = ldexp(1, -24), kFlushed = ldexp(1, -126);

// What a float32 value may be. NaN and infinity have no neighbours.
struct Range {
  double low, high;
};

Range around(Range r, double relative, double absolute) {
  return {isfinite(r.low) ? r.low - fabs(r.low) * relative - absolute : r.low,
          isfinite(r.high) ? r.high + fabs(r.high) * relative + absolute : r.high};
}

std::vector<Range> softmax(const std::vector<float>& logits) {
  double highest = -INFINITY, sum = 0;
  for (const float l : logits) highest = l > highest ? l : highest;
  for (const float l : logits) sum += exp(l - highest);
  const double count = double(logits.size());
  std::vector<Range> result;
  for (const float l : logits) {
    const double below = highest - l, exact = exp(-below) / sum;
    const double relative = (6 + 1.5 * below + 1.5 * log(count) + count / 2) * kUnitSpacing;
    result.push_back(isinf(below) ? Range{exact, exact} : around({exact, exact}, relative, kFlushed));
  }
  return result;
}

Range sigmoid(double logit) {
  const double exact = 1 / (1 + exp(-logit));
  return isinf(logit) ? Range{exact, exact} : around({exact, exact}, (5 + fabs(logit)) * kUnitSpacing, kFlushed);
}

Range sqrtsoftplus(double logit) {
  const double softplus = isnan(logit) ? logit : fmax(logit, 0) + log1p(exp(-fabs(logit)));
  if (!isfinite(logit)) return {sqrt(softplus), sqrt(softplus)};
  const Range under_root = around({softplus, softplus}, (5 + fabs(logit)) * kUnitSpacing, 3 * kUnitSpacing);
  return around({sqrt(fmax(under_root.low, 0)), sqrt(under_root.high)}, kUnitSpacing, kFlushed);
}

std::vector<Range> scores_of(int function, const std::vector<float>& logits) {
  if (function == JR_SOFTMAX) return softmax(logits);
  std::vector<Range> result;
  for (const float l : logits)
    result.push_back(function == JR_SIGMOID ? sigmoid(l) : function == JR_SQRTSOFTPLUS ? sqrtsoftplus(l) : Range{l, l});
  return result;
}

// Orders as jax.lax.top_k orders floats.
uint64_t key(double value) {
  uint64_t bits;
  memcpy(&bits, &value, 8);
  return isnan(value) ? ~uint64_t(0) : bits ^ (bits >> 63 != 0 ? ~uint64_t(0) : uint64_t(1) << 63);
}
bool higher(double a, double b) { return key(a) > key(b); }

// What is compared: the ends of an expert's or a group's interval, and what it was made of.
struct Choice {
  uint64_t low, high;
  float logit = 0, correction = 0;
  int kept = 0;  // 0: certainly; else 1 + the group that is kept or not

  Choice(Range r) : low(key(r.low)), high(key(r.high)) {}
};

bool same_bits(float a, float b) { return memcmp(&a, &b, sizeof(a)) == 0; }

bool tie(const Choice& a, const Choice& b, bool made_of_the_same) {
  if (a.low == a.high && b.low == b.high && a.low == b.low) return true;
  return made_of_the_same && a.kept == b.kept && same_bits(a.logit, b.logit) && same_bits(a.correction, b.correction);
}

// Whether choices[a] certainly comes before choices[b].
bool comes_first(const std::vector<Choice>& choices, int a, int b, bool made_of_the_same) {
  const Choice &first = choices[size_t(a)], &second = choices[size_t(b)];
  return first.low > second.high || (a < b && tie(first, second, made_of_the_same));
}

// The sum of the highest two, or the highest.
double group_score(std::vector<double> of_group, const jr_routing_spec& spec, bool exact) {
  std::sort(of_group.begin(), of_group.end(), higher);
  if (spec.group_score == JR_GROUP_MAX) return of_group[0];
  return exact ? double(float(of_group[0]) + float(of_group[1])) : of_group[0] + of_group[1];
}

// Masks the experts of groups that are not kept. Those of a group that may be kept or not count as both.
void keep_groups(std::vector<Choice>& choices, const std::vector<Range>& values, const jr_routing_spec& spec,
                 bool exact) {
  const size_t groups = size_t(spec.num_groups), members = values.size() / groups;
  std::vector<Choice> group_choices;
  for (size_t group = 0; group < groups; ++group) {
    std::vector<double> low, high;
    for (size_t i = group * members; i < (group + 1) * members; ++i)
      low.push_back(values[i].low), high.push_back(values[i].high);
    const Range score = {group_score(low, spec, exact), group_score(high, spec, exact)};
    group_choices.push_back(exact ? score : around(score, kRounding, kFlushed));
  }
  const uint64_t masked = key(spec.masked_choice);
  for (int group = 0; group < spec.num_groups; ++group) {
    int certainly_before = 0, possibly_before = 0;
    for (int other = 0; other < spec.num_groups; ++other) {
      if (other == group) continue;
      certainly_before += comes_first(group_choices, other, group, false);
      possibly_before += !comes_first(group_choices, group, other, false);
    }
    if (possibly_before < spec.group_topk) continue;
    const bool certain = certainly_before >= spec.group_topk;
    for (size_t i = size_t(group) * members; i < size_t(group + 1) * members; ++i) {
      Choice& choice = choices[i];
      choice.low = certain ? masked : std::min(choice.low, masked);
      choice.high = certain ? masked : std::max(choice.high, masked);
      choice.kept = 1 + group;
    }
  }
}

std::vector<Choice> choices_of(const RoutingRule& rule, const std::vector<float>& logits) {
  const jr_routing_spec& spec = rule.spec;
  const bool exact = spec.select_on_logits != 0 || spec.score_function == JR_SOFTMAX_TOPK ||
                     (rule.correction.empty() && spec.num_groups == 0);
  std::vector<Range> values = scores_of(exact ? int(JR_SOFTMAX_TOPK) : spec.score_function, logits);
  std::vector<Choice> choices;
  for (size_t i = 0; i < values.size(); ++i) {
    const float correction = rule.correction.empty() ? 0 : rule.correction[i];
    Range& r = values[i];
    if (!rule.correction.empty() && exact) {
      r.low = r.high = logits[i] + correction;
    } else if (!rule.correction.empty()) {
      r = around({r.low + correction, r.high + correction}, kRounding, kFlushed);
    }
    choices.push_back(r);
    choices.back().logit = logits[i], choices.back().correction = correction;
  }
  if (spec.num_groups != 0) keep_groups(choices, values, spec, exact);
  return choices;
}

// The weights of given experts.
std::vector<Range> weights_of(const RoutingRule& rule, const std::vector<float>& logits, const int32_t* experts) {
  const jr_routing_spec& spec = rule.spec;
  const auto exists = [&](int i) { return experts[i] >= 0 && experts[i] < rule.experts; };
  std::vector<float> selected;
  for (int i = 0; i < spec.top_k; ++i) selected.push_back(exists(i) ? logits[size_t(experts[i])] : NAN);
  std::vector<Range> weights;
  if (spec.score_function == JR_SOFTMAX) {
    const std::vector<Range> all = softmax(logits);
    for (int i = 0; i < spec.top_k; ++i) weights.push_back(exists(i) ? all[size_t(experts[i])] : Range{NAN, NAN});
  } else {
    weights = spec.score_function == JR_SOFTMAX_TOPK ? softmax(selected) : scores_of(spec.score_function, selected);
  }
  if (spec.renormalize != 0) {
    std::vector<Range> parts = weights;
    for (Range& part : parts) part.low = part.low < 0 ? 0 : part.low;
    const auto divisor = [&](double total) {
      return (total < spec.renormalize_min ? spec.renormalize_min : total) + double(spec.renormalize_epsilon);
    };
    for (size_t i = 0; i < parts.size(); ++i) {  // each against all the others at their other end
      double with_low = parts[i].low, with_high = parts[i].high;
      for (size_t j = 0; j < parts.size(); ++j) {
        if (j != i) with_low += parts[j].high, with_high += parts[j].low;
      }
      weights[i] = {parts[i].low / divisor(with_low), parts[i].high / divisor(with_high)};
    }
  }
  for (int i = 0; i < spec.top_k; ++i) {
    const double scale =
        spec.scaling_factor * (rule.scale.empty() || !exists(i) ? 1.0 : rule.scale[size_t(experts[i])]);
    const double a = weights[size_t(i)].low * scale, b = weights[size_t(i)].high * scale;
    // A sum of top_k in any order, the epsilon, a division, two scales.
    weights[size_t(i)] = around({scale < 0 ? b : a, scale < 0 ? a : b}, (spec.top_k / 2. + 5) * kUnitSpacing, kFlushed);
  }
  return weights;
}

}  // namespace

Verdict judge_routing(const RoutingRule& rule, const float* of_token, const int32_t* replay, const float* weights,
                      const int32_t* experts, RoutingFault& fault) {
  std::vector<float> logits(of_token, of_token + rule.experts);
  if (rule.spec.round_logits != 0 && rule.dtype != JR_FLOAT32) {
    for (float& l : logits)
      l = rule.dtype == JR_BFLOAT16 ? __bfloat162float(__float2bfloat16_rn(l)) : __half2float(__float2half_rn(l));
  }
  Verdict verdict = Verdict::kRight;
  const std::vector<Choice> choices = replay == nullptr ? choices_of(rule, logits) : std::vector<Choice>();
  std::vector<char> taken(size_t(rule.experts), 0);
  for (int place = 0; place < rule.spec.top_k; ++place) {
    const int expert = experts[place];
    if (replay != nullptr) {
      if (expert == replay[place]) continue;
      fault = {"expert is not the recorded one", place, double(replay[place]), double(expert)};
      return Verdict::kWrong;
    }
    const bool exists = expert >= 0 && expert < rule.experts && !taken[size_t(expert)];
    int first = -1;  // that certainly comes before it
    for (int other = 0; other < rule.experts; ++other) {
      if (taken[size_t(other)] || other == expert) continue;
      if (!exists || comes_first(choices, other, expert, true)) {
        if (first < 0 || comes_first(choices, other, first, true)) first = other;
      } else if (!comes_first(choices, expert, other, true)) {
        verdict = Verdict::kOpen;
      }
    }
    if (!exists || first >= 0) {
      fault = {exists ? "another expert comes first" : "no expert, or twice the same", place, double(first),
               double(expert)};
      return Verdict::kWrong;
    }
    taken[size_t(expert)] = 1;
  }
  const std::vector<Range> expected = weights_of(rule, logits, experts);
  for (int place = 0; place < rule.spec.top_k; ++place) {
    const Range& range = expected[size_t(place)];
    const double got = weights[place];
    // One end is NaN, 0 / 0, where scores that may all be 0 are divided by their sum.
    const bool may_be_nan = isnan(range.low) || isnan(range.high), is_nan = isnan(range.low) && isnan(range.high);
    if (isnan(got) ? may_be_nan : !is_nan && !(got < range.low) && !(got > range.high)) continue;
    fault = {"weight is outside its bound", place, (range.low + range.high) / 2, got};
    return Verdict::kWrong;
  }
  return verdict;
}

}  // namespace jax_router_check
