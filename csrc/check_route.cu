// Routing of awkward shapes (route.h): every configuration must give the same bits for a token, whatever the batch,
// with the logits returned or not, selecting or replaying; the logits must be those of the router GEMM; and experts and
// weights must be what the CPU makes of these logits (check_route_reference.cu). Part of the standalone check
// (check.cu).
//
// Among the tokens are ties (all of x zero; equal rows of weights), NaN and infinities. Outputs and workspace are
// poisoned before each launch and followed by a canary.
#include "check_route.h"

#include <math.h>

#include "check_route_reference.h"
#include "check_support.h"
#include "route.h"

namespace jax_router_check {
namespace {

constexpr int kMaxTokens = 1024, kMaxExperts = 1024, kMaxTopK = 32;
constexpr int kJudged = 256;  // tokens of a case, or all that there are: sixteen of every kind

struct Inputs {
  int hidden;
  HostArray x, weight;

  Inputs(int of_hidden, int dtype, int weight_dtype, std::mt19937& random)
      : hidden(of_hidden),
        x(size_t(kMaxTokens) * of_hidden, dtype, 1.0, 0.0, random),
        weight(size_t(kMaxExperts) * of_hidden, weight_dtype, 1 / sqrt(of_hidden), 0.0, random) {
    const size_t row = size_t(hidden);
    for (size_t token = 0; token < kMaxTokens; ++token) {
      for (size_t k = 0; k < row; ++k) {
        if (token % 16 == 3) x.set(token * row + k, 0.f);
        if (token % 16 == 11) x.set(token * row + k, float(8 * x.values[token * row + k]));
      }
      if (token % 16 == 5) x.set(token * row + token % row, NAN);
      if (token % 16 == 7) x.set(token * row, INFINITY);
      if (token % 16 == 9) x.set(token * row, -INFINITY);
    }
    for (size_t expert = 0; expert < kMaxExperts; ++expert) {
      const size_t twin = expert % 7 == 3 ? expert - 1 : expert % 11 == 5 && expert >= 37 ? expert - 37 : expert;
      for (size_t k = 0; k < row; ++k) weight.set(expert * row + k, float(weight.values[twin * row + k]));
      if (expert % 5 == 0) weight.set(expert * row, 0.f);  // NaN with an infinity
    }
  }
};

struct Case {
  jr_routing_spec spec;
  int experts, hidden, dtype, weight_dtype, bias_dtype, correction_dtype, scale_dtype;
};

int one_of(std::initializer_list<int> values, std::mt19937& random) { return values.begin()[random() % values.size()]; }

// Values of a few kinds, so that some are equal; by expert, or empty.
HostArray few_values(int experts, int dtype, double middle, std::mt19937& random) {
  HostArray values(dtype == JR_NONE ? 0 : size_t(experts), dtype == JR_NONE ? int(JR_FLOAT32) : dtype, 1, 0, random);
  for (size_t i = 0; i < values.values.size(); ++i) values.set(i, float(middle + (int(random() % 9) - 4) / 16.));
  return values;
}

Case draw_case(int experts, const Inputs& inputs, int variant, std::mt19937& random) {
  jr_routing_spec s = {};
  s.score_function = variant % 4;
  do {
    s.top_k = one_of({1, 2, 3, 4, 6, 8, 10, 16, 17, 22, 31, 32}, random);
  } while (s.top_k > experts);
  s.renormalize = one_of({0, 1}, random);
  s.renormalize_epsilon = s.renormalize != 0 && one_of({0, 1}, random) != 0 ? 1e-20f : 0.f;
  s.renormalize_min = s.renormalize != 0 && one_of({0, 0, 1}, random) != 0 ? 0.75f : 0.f;
  s.scaling_factor = one_of({0, 1}, random) != 0 ? 2.5f : 1.f;
  s.select_on_logits = one_of({0, 0, 0, 1}, random);
  s.round_logits = one_of({0, 0, 0, 1}, random);
  s.masked_choice = one_of({0, 1}, random) != 0 ? 0.f : -INFINITY;
  s.group_score = one_of({JR_TOP2_SUM, JR_GROUP_MAX}, random);
  const int groups = one_of({2, 3, 4, 5, 8, 16, 32}, random), kept = 1 + int(random() % unsigned(groups));
  if (variant % 8 >= 4 && experts % groups == 0 && experts / groups >= 2 && kept * (experts / groups) >= s.top_k)
    s.num_groups = groups, s.group_topk = kept;
  const int dtype = inputs.x.dtype;
  return {s,
          experts,
          inputs.hidden,
          dtype,
          inputs.weight.dtype,
          one_of({JR_NONE, JR_FLOAT32, dtype}, random),
          one_of({JR_NONE, JR_FLOAT32, dtype}, random),
          one_of({JR_NONE, JR_NONE, JR_FLOAT32, dtype}, random)};
}

// What a launch wrote, as words, and what is checked of it: the logits only if they were asked for.
struct Outputs {
  std::vector<uint32_t> weights, experts, logits;
};

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct RouteChecker {
  const Extent extent;
  const int max_tokens = max_tokens_of(extent);  // of the reference
  const DeviceBuffer workspace{kWorkspaceBytes + kCanaryBytes};
  const DeviceBuffer weights{kMaxTokens * kMaxTopK * 4 + kCanaryBytes};
  const DeviceBuffer experts{kMaxTokens * kMaxTopK * 4 + kCanaryBytes};
  const DeviceBuffer logits{size_t(kMaxTokens) * kMaxExperts * 4 + kCanaryBytes};
  std::vector<bool> checked = std::vector<bool>(size_t(jr_route_num_configs()));
  long cases = 0, launches = 0, failures = 0, judged = 0, open = 0;

  // Counts a failure; true if it is to be described too.
  bool fail(const Case& c, const char* what, const char* kernel, int tokens) {
    if (++failures > 20) return false;
    const jr_routing_spec& s = c.spec;
    printf(
        "FAILED routing, %s: %s experts=%d hidden=%d dtype=%d weight=%d bias=%d correction=%d scale=%d tokens=%d "
        "top_k=%d "
        "score=%d renormalize=%d,%g,%g scaling=%g on_logits=%d round=%d groups=%d,%d,%d masked=%g\n",
        what, kernel, c.experts, c.hidden, c.dtype, c.weight_dtype, c.bias_dtype, c.correction_dtype, c.scale_dtype,
        tokens, s.top_k, s.score_function, s.renormalize, double(s.renormalize_epsilon), double(s.renormalize_min),
        double(s.scaling_factor), s.select_on_logits, s.round_logits, s.num_groups, s.group_topk, s.group_score,
        double(s.masked_choice));
    return true;
  }

  static const char* name(int config) { return config < 0 ? "auto" : jr_route_config_name(config); }

  std::vector<uint32_t> read(const Case& c, const char* what, const jr_route_args& args, const DeviceBuffer& from,
                             size_t columns) {
    const size_t words = size_t(args.gemm.tokens) * columns;
    std::vector<uint32_t> result(words + kCanaryBytes / 4);
    from.read(result.data(), result.size() * 4);
    if (!poisoned(reinterpret_cast<const uint8_t*>(&result[words]), kCanaryBytes))
      fail(c, what, name(args.config), int(args.gemm.tokens));
    result.resize(words);
    return result;
  }

  Outputs run(const Case& c, const jr_route_args& args) {
    char message[512] = "";
    const size_t tokens = size_t(args.gemm.tokens), top_k = size_t(c.spec.top_k), row = size_t(c.experts);
    weights.poison(tokens * top_k * 4 + kCanaryBytes);
    experts.poison(tokens * top_k * 4 + kCanaryBytes);
    logits.poison(tokens * row * 4 + kCanaryBytes);
    workspace.poison(kWorkspaceBytes + kCanaryBytes);
    launch_ok(jr_route(&args, nullptr, message, sizeof(message)), message);
    CUDA_OK(cudaDeviceSynchronize());
    ++launches;
    uint8_t past_workspace[kCanaryBytes];
    workspace.read(past_workspace, kCanaryBytes, kWorkspaceBytes);
    if (!poisoned(past_workspace, kCanaryBytes)) fail(c, "wrote past the workspace", name(args.config), int(tokens));
    Outputs outputs = {read(c, "wrote past the weights", args, weights, top_k),
                       read(c, "wrote past the experts", args, experts, top_k),
                       read(c, "wrote past the logits", args, logits, row)};
    if (args.return_logits == 0) outputs.logits.clear();
    return outputs;
  }

  // Row by row the words of `got` are those of `expected` from row `start` on.
  void compare(const Case& c, const char* what, const char* kernel, const std::vector<uint32_t>& got,
               const std::vector<uint32_t>& expected, int start, int tokens) {
    const size_t columns = got.size() / size_t(tokens), offset = size_t(start) * columns;
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i] == expected[offset + i]) continue;
      if (fail(c, what, kernel, tokens))
        printf("  token %zu (%d of the data), element %zu: expected 0x%08x (%d, %.9g), got 0x%08x (%d, %.9g)\n",
               i / columns, start + int(i / columns), i % columns, expected[offset + i], int(expected[offset + i]),
               double(as_float(expected[offset + i])), got[i], int(got[i]), double(as_float(got[i])));
      return;
    }
  }

  void judge(const Case& c, const RoutingRule& rule, const std::vector<int32_t>& replay, const Outputs& got) {
    const size_t top_k = size_t(c.spec.top_k);
    for (size_t token = 0; token < size_t(std::min(kJudged, max_tokens)); ++token) {
      RoutingFault fault;
      const Verdict verdict =
          judge_routing(rule, reinterpret_cast<const float*>(&got.logits[token * size_t(c.experts)]),
                        replay.empty() ? nullptr : &replay[token * top_k],
                        reinterpret_cast<const float*>(&got.weights[token * top_k]),
                        reinterpret_cast<const int32_t*>(&got.experts[token * top_k]), fault);
      ++judged;
      open += verdict == Verdict::kOpen;
      if (verdict != Verdict::kWrong) continue;
      if (fail(c, fault.what, replay.empty() ? "two_launches" : "two_launches, replay", max_tokens))
        printf("  token %zu, place %d: expected %.9g, got %.9g\n", token, fault.place, fault.expected, fault.got);
      return;
    }
  }

  void check(const Case& c, const DeviceBuffer& device_x, const DeviceBuffer& device_weight,
             const std::vector<int>& tokens_list, std::mt19937& random) {
    // What an expert has, in buffers that end with the last expert, where compute-sanitizer sees reads beyond it.
    const HostArray bias = few_values(c.experts, c.bias_dtype, 0, random);
    const HostArray correction = few_values(c.experts, c.correction_dtype, 0, random);
    const HostArray scale = few_values(c.experts, c.scale_dtype, 1, random);
    const DeviceBuffer device_bias(bias.bytes.size()), device_correction(correction.bytes.size()),
        device_scale(scale.bytes.size());
    device_bias.write(bias.bytes.data(), bias.bytes.size());
    device_correction.write(correction.bytes.data(), correction.bytes.size());
    device_scale.write(scale.bytes.data(), scale.bytes.size());
    std::vector<int32_t> replay(size_t(max_tokens) * size_t(c.spec.top_k));
    for (int32_t& id : replay) id = int32_t(random() % unsigned(c.experts));
    for (size_t i = 0; i < replay.size(); i += 101) replay[i] = i % 2 == 0 ? -1 : c.experts;  // no experts
    const DeviceBuffer device_replay(replay.size() * 4);
    device_replay.write(replay.data(), replay.size() * 4);

    jr_route_args args = {};
    args.gemm = {device_x.data,
                 device_weight.at(size_t(kMaxExperts - c.experts) * size_t(c.hidden) * bytes_of(c.weight_dtype)),
                 c.bias_dtype == JR_NONE ? nullptr : device_bias.data,
                 logits.data,
                 workspace.data,
                 kWorkspaceBytes,
                 max_tokens,
                 c.hidden,
                 c.experts,
                 c.dtype,
                 c.bias_dtype,
                 JR_FLOAT32,
                 -1,
                 JR_EXPERTS_HIDDEN,
                 c.weight_dtype};
    args.spec = c.spec;
    args.correction_bias = c.correction_dtype == JR_NONE ? nullptr : device_correction.data;
    args.correction_bias_dtype = c.correction_dtype;
    args.expert_scale = c.scale_dtype == JR_NONE ? nullptr : device_scale.data;
    args.expert_scale_dtype = c.scale_dtype;
    args.weights = static_cast<float*>(weights.data);
    args.experts = static_cast<int32_t*>(experts.data);
    args.config = jr_route_num_configs() - 1;  // two launches, which take everything

    char message[512] = "";
    logits.poison(size_t(max_tokens) * size_t(c.experts) * 4 + kCanaryBytes);
    launch_ok(jr_router_gemm(&args.gemm, nullptr, message, sizeof(message)), message);
    const std::vector<uint32_t> gemm = read(c, "wrote past the logits", args, logits, size_t(c.experts));
    args.return_logits = 1;
    const Outputs selected = run(c, args);
    args.replay = static_cast<const int32_t*>(device_replay.data);
    const Outputs replayed = run(c, args);
    RoutingRule rule = {c.spec, c.experts, c.dtype, {}, {}};
    rule.correction.assign(correction.values.begin(), correction.values.end());
    rule.scale.assign(scale.values.begin(), scale.values.end());
    compare(c, "logits are not the router GEMM's", "two_launches", selected.logits, gemm, 0, max_tokens);
    judge(c, rule, {}, selected);
    judge(c, rule, replay, replayed);

    for (args.config = -1; args.config < jr_route_num_configs(); ++args.config) {
      int start = 0;
      for (const int tokens : tokens_list) {
        start = (tokens + args.config) % 2 == 0 ? max_tokens - tokens : (start + 37) % (max_tokens - tokens + 1);
        args.gemm.tokens = tokens;
        args.gemm.x = device_x.at(size_t(start) * size_t(c.hidden) * bytes_of(c.dtype));
        if (args.config >= 0 && !jr_route_config_fits(args.config, &args)) continue;
        if (args.config >= 0) checked[size_t(args.config)] = true;
        for (const int mode : {0, 1, 2}) {
          if (extent == Extent::kTiny && mode != 1 + (cases + cases / 4) % 2) continue;
          args.return_logits = mode % 2;
          args.replay = mode < 2 ? nullptr : static_cast<const int32_t*>(device_replay.data) + start * c.spec.top_k;
          const Outputs got = run(c, args), &expected = mode < 2 ? selected : replayed;
          const char* const kernel = name(args.config);
          compare(c, mode < 2 ? "bits of the experts" : "replayed experts", kernel, got.experts, expected.experts,
                  start, tokens);
          compare(c, mode < 2 ? "bits of the weights" : "bits of replayed weights", kernel, got.weights,
                  expected.weights, start, tokens);
          compare(c, "logits are not the router GEMM's", kernel, got.logits, gemm, start, tokens);
        }
      }
    }
    ++cases;
  }
};

}  // namespace

int check_route(Extent extent) {
  struct Shapes {
    int hidden, dtype, weight_dtype, variants;
  };
  const int variants = extent == Extent::kFull ? 8 : 4;
  std::vector<Shapes> shapes = {{264, JR_FLOAT16, JR_FLOAT16, variants}};
  std::vector<int> experts_list = {3, 65, 256}, tokens_list = {17};
  if (extent != Extent::kTiny) {
    shapes.insert(
        shapes.end(),
        {{8, JR_BFLOAT16, JR_BFLOAT16, variants}, {264, JR_BFLOAT16, JR_FLOAT32, 2}, {72, JR_FLOAT32, JR_FLOAT32, 2}});
    tokens_list = {1, 17, 65};
  }
  if (extent == Extent::kFull) {
    shapes.insert(
        shapes.end(),
        {{264, JR_BFLOAT16, JR_BFLOAT16, 8}, {2880, JR_BFLOAT16, JR_BFLOAT16, 4}, {7168, JR_BFLOAT16, JR_BFLOAT16, 4}});
    experts_list = {1, 3, 8, 64, 65, 100, 128, 160, 256, 384, 512, 1024};
    tokens_list = {1, 2, 15, 16, 17, 63, 64, 65, 255, 1024};
  }
  std::mt19937 random(20261126);
  RouteChecker checker{extent};
  int variant = 0;
  for (const Shapes& shape : shapes) {
    const Inputs inputs(shape.hidden, shape.dtype, shape.weight_dtype, random);
    const DeviceBuffer x(inputs.x.bytes.size()), weight(inputs.weight.bytes.size());
    x.write(inputs.x.bytes.data(), inputs.x.bytes.size());
    weight.write(inputs.weight.bytes.data(), inputs.weight.bytes.size());
    for (const int experts : experts_list) {
      for (int i = 0; i < shape.variants; ++i, ++variant)
        checker.check(draw_case(experts, inputs, variant, random), x, weight, tokens_list, random);
    }
  }
  for (int config = 0; config < jr_route_num_configs(); ++config) {
    if (checker.checked[size_t(config)]) continue;
    printf("FAILED routing: no case fits %s\n", jr_route_config_name(config));
    ++checker.failures;
  }
  if (checker.open > checker.judged / 10) {
    printf("FAILED routing: more than one order of experts is right for %ld of %ld tokens: this checks little\n",
           checker.open, checker.judged);
    ++checker.failures;
  }
  printf(
      "routed %ld cases, %ld launches: %ld tokens judged, %ld of them with more than one right order, %ld failures\n",
      checker.cases, checker.launches, checker.judged, checker.open, checker.failures);
  return checker.failures == 0 ? 0 : 1;
}

}  // namespace jax_router_check
