// Routing on the CPU: see check_route_reference.cu. Host code only.
#pragma once

#include <stdint.h>

#include <vector>

#include "route.h"

namespace jax_router_check {

struct RoutingRule {
  jr_routing_spec spec;
  int experts, dtype;                    // dtype is that of x, to which spec.round_logits rounds
  std::vector<float> correction, scale;  // [experts], or empty
};

enum class Verdict { kRight, kOpen, kWrong };  // open: right, and so would have been another order of the experts

// What is wrong with a token: at which of its top_k places, what is right there (an expert, or a weight) and what
// stands there.
struct RoutingFault {
  const char* what = "";
  int place = 0;
  double expected = 0, got = 0;
};

// Judges the weights and experts [top_k] of a token with these logits [experts]. `replay` is the selection as given, or
// NULL. `fault` is written if the verdict is kWrong.
Verdict judge_routing(const RoutingRule& rule, const float* logits, const int32_t* replay, const float* weights,
                      const int32_t* experts, RoutingFault& fault);

}  // namespace jax_router_check
