// The router GEMM between neighbours that write x and the weights right before and read the logits right after
// (check_neighbours.cu): they must have the naive kernel's bits. Part of the standalone check (check.cu).
#include "check_overlap.h"

#include "check_neighbours.h"
#include "check_support.h"
#include "router_gemm.h"

namespace jax_router_check {

int check_overlap(int launches_per_case) {
  constexpr int kVariants = 4, kMaxTokens = 512;
  const int shapes[][2] = {{128, 2880}, {256, 7168}}, tokens_list[] = {1, 16, 64, 100, kMaxTokens};
  Neighbours neighbours;
  const DeviceBuffer workspace(kWorkspaceBytes);
  char message[512] = "";
  long launches = 0, bad_cases = 0;
  for (const auto& [experts, hidden] : shapes) {
    const size_t row_bytes = size_t(hidden) * 2, x_bytes = kMaxTokens * row_bytes, weight_bytes = experts * row_bytes;
    const size_t out_bytes = size_t(kMaxTokens) * experts * 4;
    const DeviceBuffer x(x_bytes), weight(weight_bytes), xs(kVariants * x_bytes), weights(kVariants * weight_bytes);
    const DeviceBuffer out(out_bytes), expected(kVariants * out_bytes);
    fill_bfloat16(xs.data, kVariants * x_bytes / 2, 1u);
    fill_bfloat16(weights.data, kVariants * weight_bytes / 2, 2u);
    jr_router_gemm_args args = {x.data,          weight.data, nullptr, out.data,         workspace.data,
                                kWorkspaceBytes, kMaxTokens,  hidden,  experts,          JR_BFLOAT16,
                                JR_NONE,         JR_FLOAT32,  -1,      JR_EXPERTS_HIDDEN};
    for (int variant = 0; variant < kVariants; ++variant) {
      jr_router_gemm_args reference = args;
      reference.x = xs.at(variant * x_bytes);
      reference.weight = weights.at(variant * weight_bytes);
      reference.out = expected.at(variant * out_bytes);
      launch_ok(jr_router_gemm_naive(&reference, nullptr, message, sizeof(message)), message);
    }
    for (const int tokens : tokens_list) {
      args.tokens = tokens;
      std::vector<Variant> variants;
      for (size_t v = 0; v < kVariants; ++v)
        variants.push_back({{{x.data, xs.at(v * x_bytes), tokens * row_bytes},
                             {weight.data, weights.at(v * weight_bytes), weight_bytes}},
                            {{"logit", out.data, expected.at(v * out_bytes), size_t(tokens) * size_t(experts) * 4}}});
      for (args.config = 0; args.config < jr_router_gemm_num_configs(); ++args.config) {
        if (!jr_router_gemm_config_fits(args.config, &args)) continue;
        const std::string wrong = neighbours.run(
            launches_per_case, variants, size_t(experts),
            [&](cudaStream_t stream) { launch_ok(jr_router_gemm(&args, stream, message, sizeof(message)), message); });
        launches += launches_per_case;
        if (wrong.empty()) continue;
        ++bad_cases;
        printf("FAILED overlap: %s experts=%d hidden=%d tokens=%d: %s\n", jr_router_gemm_config_name(args.config),
               experts, hidden, tokens, wrong.c_str());
      }
    }
  }
  printf("overlapped %ld launches with their neighbours under copies: %ld failed cases\n", launches, bad_cases);
  return bad_cases == 0 ? 0 : 1;
}

}  // namespace jax_router_check
