// Routing between neighbours that write x, the weights and the correction bias right before and read weights and
// experts right after (check_neighbours.cu). Part of the standalone check (check.cu).
//
// What is expected comes from two launches run alone, for each of a few variants, and is right by the CPU
// (check_route_reference.cu). Logits and workspace, which a launch may use as scratch, are never cleared: they hold
// what the launch of another variant left there. So a kernel that reads an input or another launch's logits too early
// takes those of the variant before, and this is shown beforehand to give other experts.
#include "check_neighbours.h"
#include "check_overlap.h"
#include "check_route_reference.h"
#include "check_support.h"
#include "route.h"

namespace jax_router_check {
namespace {

constexpr size_t kVariants = 4, kMaxTokens = 512;

struct Model {
  const char* name;
  int experts, hidden;
  bool corrected;
  jr_routing_spec spec;
};

std::vector<Model> models() {
  jr_routing_spec gpt_oss = {};
  gpt_oss.top_k = 4;
  gpt_oss.score_function = JR_SOFTMAX_TOPK;
  gpt_oss.scaling_factor = 1;
  gpt_oss.masked_choice = -INFINITY;
  jr_routing_spec deepseek_v3 = gpt_oss;
  deepseek_v3.top_k = 8;
  deepseek_v3.score_function = JR_SIGMOID;
  deepseek_v3.renormalize = 1;
  deepseek_v3.renormalize_epsilon = 1e-20f;
  deepseek_v3.scaling_factor = 2.5;
  deepseek_v3.num_groups = 8;
  deepseek_v3.group_topk = 4;
  deepseek_v3.group_score = JR_TOP2_SUM;
  jr_routing_spec olmoe = gpt_oss;
  olmoe.top_k = 8;
  olmoe.score_function = JR_SOFTMAX;
  return {{"gpt-oss", 128, 2880, false, gpt_oss},
          {"DeepSeek-V3", 256, 7168, true, deepseek_v3},
          {"OLMoE", 64, 2048, false, olmoe}};
}

// Which variant each input is of.
struct Of {
  size_t x, weight, correction;
};

struct Outputs {
  std::vector<float> weights, logits;
  std::vector<int32_t> experts;
};

// Everything of one model on the device: the buffers that launches use, and the variants of what is written to them.
struct Buffers {
  const Model& model;
  const size_t row_bytes = size_t(model.hidden) * 2, x_bytes = kMaxTokens * row_bytes,
               weight_bytes = size_t(model.experts) * row_bytes,
               correction_bytes = model.corrected ? size_t(model.experts) * 4 : 0,
               routed_bytes = kMaxTokens * size_t(model.spec.top_k) * 4,
               logit_bytes = kMaxTokens * size_t(model.experts) * 4;
  const DeviceBuffer x{x_bytes}, weight{weight_bytes}, correction{correction_bytes}, workspace{kWorkspaceBytes};
  const DeviceBuffer logits{logit_bytes}, weights{routed_bytes}, experts{routed_bytes};
  const DeviceBuffer xs{kVariants * x_bytes}, all_weights{kVariants * weight_bytes},
      corrections{kVariants * correction_bytes}, expected_weights{kVariants * routed_bytes},
      expected_experts{kVariants * routed_bytes};
  std::vector<float> host_corrections;

  explicit Buffers(const Model& of_model) : model(of_model) {
    fill_bfloat16(xs.data, kVariants * x_bytes / 2, 1u);
    fill_bfloat16(all_weights.data, kVariants * weight_bytes / 2, 2u);
    std::mt19937 random(3);
    for (size_t i = 0; i < kVariants * correction_bytes / 4; ++i)
      host_corrections.push_back(ldexpf(float(random() % 4096), -12) - 0.5f);
    corrections.write(host_corrections.data(), host_corrections.size() * 4);
  }

  jr_route_args args() const {
    jr_route_args a = {};
    a.gemm = {x.data,          weight.data, nullptr,      logits.data,       workspace.data,
              kWorkspaceBytes, kMaxTokens,  model.hidden, model.experts,     JR_BFLOAT16,
              JR_NONE,         JR_FLOAT32,  -1,           JR_EXPERTS_HIDDEN, JR_BFLOAT16};
    a.spec = model.spec;
    a.correction_bias = model.corrected ? correction.data : nullptr;
    a.correction_bias_dtype = model.corrected ? JR_FLOAT32 : JR_NONE;
    a.expert_scale_dtype = JR_NONE;
    a.weights = static_cast<float*>(weights.data);
    a.experts = static_cast<int32_t*>(experts.data);
    return a;
  }

  // Runs `a` alone on these inputs.
  Outputs alone(jr_route_args a, Of of) const {
    char message[512] = "";
    a.gemm.x = xs.at(of.x * x_bytes);
    a.gemm.weight = all_weights.at(of.weight * weight_bytes);
    if (model.corrected) a.correction_bias = corrections.at(of.correction * correction_bytes);
    weights.poison(routed_bytes);
    experts.poison(routed_bytes);
    launch_ok(jr_route(&a, nullptr, message, sizeof(message)), message);
    CUDA_OK(cudaDeviceSynchronize());
    const size_t tokens = size_t(a.gemm.tokens), routed = tokens * size_t(model.spec.top_k);
    Outputs out = {std::vector<float>(routed), std::vector<float>(tokens * size_t(model.experts)),
                   std::vector<int32_t>(routed)};
    weights.read(out.weights.data(), routed * 4);
    experts.read(out.experts.data(), routed * 4);
    logits.read(out.logits.data(), out.logits.size() * 4);
    return out;
  }
};

// The routing of one variant is right by the CPU, and another one than with any input of the variant before.
int check_variant(const Buffers& buffers, const jr_route_args& args, size_t v, const Outputs& right) {
  const Model& model = buffers.model;
  const size_t top_k = size_t(model.spec.top_k), experts = size_t(model.experts),
               before = (v + kVariants - 1) % kVariants;
  RoutingRule rule = {model.spec, model.experts, JR_BFLOAT16, {}, {}};
  if (model.corrected)
    rule.correction.assign(&buffers.host_corrections[v * experts], &buffers.host_corrections[v * experts] + experts);
  for (size_t token = 0; token < kMaxTokens; ++token) {
    RoutingFault fault;
    if (judge_routing(rule, &right.logits[token * experts], nullptr, &right.weights[token * top_k],
                      &right.experts[token * top_k], fault) != Verdict::kWrong)
      continue;
    printf(
        "FAILED overlap of routing: two_launches alone, %s, variant %zu, token %zu, place %d: %s: expected %.9g, "
        "got %.9g\n",
        model.name, v, token, fault.place, fault.what, fault.expected, fault.got);
    return 1;
  }
  std::vector<Of> stale = {{before, v, v}, {v, before, v}, {before, before, v}};
  if (model.corrected) stale.insert(stale.end(), {{v, v, before}, {v, before, before}, {before, v, before}});
  for (const Of of : stale) {
    const Outputs wrong = buffers.alone(args, of);
    if (!std::equal(wrong.experts.begin(), wrong.experts.begin() + long(top_k), right.experts.begin())) continue;
    printf(
        "FAILED overlap of routing: %s: x of variant %zu, weights of %zu and correction bias of %zu route token 0 as "
        "those of %zu do: this check would not see them\n",
        model.name, of.x, of.weight, of.correction, v);
    return 1;
  }
  return 0;
}

struct Overlap {
  Neighbours neighbours;
  int launches_per_case;
  long launches = 0, bad_cases = 0;

  // One configuration, and of two launches one of the first, on so many tokens.
  void check_case(const Buffers& buffers, const jr_route_args& args, const std::vector<Outputs>& right) {
    const Model& model = buffers.model;
    const size_t tokens = size_t(args.gemm.tokens), top_k = size_t(model.spec.top_k), routed = tokens * top_k;
    char kernel[128];
    snprintf(kernel, sizeof(kernel), "%s%s%s", jr_route_config_name(args.config),
             args.gemm.config < 0 ? "" : " behind ",
             args.gemm.config < 0 ? "" : jr_router_gemm_config_name(args.gemm.config));
    std::vector<Variant> variants;
    for (size_t v = 0; v < kVariants; ++v) {
      const Outputs got = buffers.alone(args, {v, v, v});
      for (size_t i = 0; i < routed; ++i) {
        if (got.experts[i] == right[v].experts[i] && memcmp(&got.weights[i], &right[v].weights[i], 4) == 0) continue;
        printf(
            "FAILED overlap of routing: %s alone, %s, tokens=%zu variant=%zu token=%zu place=%zu: expected expert %d "
            "with %.9g, got %d with %.9g\n",
            kernel, model.name, tokens, v, i / top_k, i % top_k, right[v].experts[i], double(right[v].weights[i]),
            got.experts[i], double(got.weights[i]));
        ++bad_cases;
        return;
      }
      variants.push_back(
          {{{buffers.x.data, buffers.xs.at(v * buffers.x_bytes), tokens * buffers.row_bytes},
            {buffers.weight.data, buffers.all_weights.at(v * buffers.weight_bytes), buffers.weight_bytes},
            {buffers.correction.data, buffers.corrections.at(v * buffers.correction_bytes), buffers.correction_bytes}},
           {{"expert", buffers.experts.data, buffers.expected_experts.at(v * buffers.routed_bytes), routed * 4},
            {"weight", buffers.weights.data, buffers.expected_weights.at(v * buffers.routed_bytes), routed * 4}}});
    }
    const std::string wrong = neighbours.run(launches_per_case, variants, top_k, [&](cudaStream_t stream) {
      char message[512] = "";
      launch_ok(jr_route(&args, stream, message, sizeof(message)), message);
    });
    launches += launches_per_case;
    if (wrong.empty()) return;
    ++bad_cases;
    printf("FAILED overlap of routing: %s, %s, experts=%d hidden=%d tokens=%zu: %s\n", kernel, model.name,
           model.experts, model.hidden, tokens, wrong.c_str());
  }

  void check_model(const Model& model) {
    const Buffers buffers(model);
    const int two_launches = jr_route_num_configs() - 1;
    jr_route_args args = buffers.args();
    args.config = two_launches;
    args.return_logits = 1;
    std::vector<Outputs> right;
    for (size_t v = 0; v < kVariants; ++v) {
      right.push_back(buffers.alone(args, {v, v, v}));
      bad_cases += check_variant(buffers, args, v, right[v]);
      buffers.expected_weights.write(right[v].weights.data(), buffers.routed_bytes, v * buffers.routed_bytes);
      buffers.expected_experts.write(right[v].experts.data(), buffers.routed_bytes, v * buffers.routed_bytes);
    }
    args.return_logits = 0;
    for (const int tokens : {1, 16, 64, 100, int(kMaxTokens)}) {
      args.gemm.tokens = tokens;
      for (args.config = 0; args.config < jr_route_num_configs(); ++args.config) {
        if (!jr_route_config_fits(args.config, &args)) continue;
        const int last = args.config == two_launches ? jr_router_gemm_num_configs() : 0;
        for (args.gemm.config = -1; args.gemm.config < last; ++args.gemm.config) {
          if (args.gemm.config >= 0 && !jr_router_gemm_config_fits(args.gemm.config, &args.gemm)) continue;
          check_case(buffers, args, right);
        }
        args.gemm.config = -1;
      }
    }
  }
};

}  // namespace

int check_overlap_route(int launches_per_case) {
  Overlap overlap = {{}, launches_per_case};
  for (const Model& model : models()) overlap.check_model(model);
  printf("overlapped %ld routings with their neighbours under copies: %ld failed cases\n", overlap.launches,
         overlap.bad_cases);
  return overlap.bad_cases == 0 ? 0 : 1;
}

}  // namespace jax_router_check
