// C interface of routing: the router GEMM, then scoring and selection. As router_gemm.h: raw device pointers in, a
// status and a message out; no call allocates, synchronises or keeps state on the device.
#pragma once

#include "router_gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

enum jr_score_function { JR_SOFTMAX = 0, JR_SOFTMAX_TOPK = 1, JR_SIGMOID = 2, JR_SQRTSOFTPLUS = 3 };
enum jr_group_score { JR_TOP2_SUM = 0, JR_GROUP_MAX = 1 };

// jax_router.RoutingSpec, whose docstring is the definition.
typedef struct jr_routing_spec {
  int32_t top_k;
  int32_t score_function;  // jr_score_function
  int32_t renormalize, select_on_logits, round_logits;
  int32_t num_groups, group_topk;  // 0: no groups
  int32_t group_score;             // jr_group_score
  float renormalize_epsilon, renormalize_min, scaling_factor, masked_choice;
} jr_routing_spec;

typedef struct jr_route_args {
  jr_router_gemm_args gemm;  // out: logits [tokens, experts] in float32. Written, or used as scratch, as follows:
  int32_t return_logits;     // 0: what `gemm.out` holds afterwards means nothing
  jr_routing_spec spec;
  const void* correction_bias;                        // [experts], or NULL with dtype JR_NONE
  const void* expert_scale;                           // [experts], or NULL with dtype JR_NONE
  int32_t correction_bias_dtype, expert_scale_dtype;  // JR_NONE, JR_FLOAT32 or gemm.dtype
  const int32_t* replay;                              // [tokens, top_k]: the selection as given, or NULL to select
  float* weights;                                     // [tokens, top_k]
  int32_t* experts;                                   // [tokens, top_k]
  int32_t config;  // -1: the launcher picks. Every configuration gives the same bits.
} jr_route_args;

JR_EXPORT int jr_route(const jr_route_args* args, void* stream, char* message, size_t message_bytes);

JR_EXPORT int jr_route_num_configs(void);
JR_EXPORT const char* jr_route_config_name(int config);
JR_EXPORT int jr_route_config_fits(int config, const jr_route_args* args);
// The configuration the launcher picks for config = -1, or -1 when it refuses the problem. Asks no device: a part of a
// GPU (MIG) that runs no cluster of 16 gets two launches all the same.
JR_EXPORT int jr_route_pick_config(const jr_route_args* args);

// As jr_time_graph (bench.cu), of jr_route. Microseconds per call, whether it is one launch or two.
JR_EXPORT int jr_time_route_graph(const jr_route_args* variants, int num_variants, int launches, int repeats,
                                  float* microseconds_per_launch, char* message, size_t message_bytes);
// As jr_time_host, of jr_route.
JR_EXPORT int jr_time_route_host(const jr_route_args* args, int calls, int repeats, float* nanoseconds_per_call,
                                 char* message, size_t message_bytes);

#ifdef __cplusplus
}
#endif
