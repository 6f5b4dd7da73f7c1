// C interface of the kernels: raw device pointers in, a status and a message out. It knows nothing of XLA, PyTorch or
// Python, so a custom call, a test program, ncu and compute-sanitizer can all call it.
//
// No call allocates, synchronises or keeps state on the device. `stream` is a cudaStream_t. `message` receives a
// zero-terminated text when the status is not JR_OK.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define JR_EXPORT __attribute__((visibility("default")))

enum jr_dtype { JR_NONE = -1, JR_BFLOAT16 = 0, JR_FLOAT16 = 1, JR_FLOAT32 = 2 };
enum jr_weight_layout { JR_EXPERTS_HIDDEN = 0, JR_HIDDEN_EXPERTS = 1 };
enum jr_status { JR_OK = 0, JR_UNSUPPORTED = 1, JR_CUDA_ERROR = 2 };

// logits[T, E] = x[T, H] @ weight[E, H].T + bias[E], accumulated in float32.
typedef struct jr_router_gemm_args {
  const void* x;       // [tokens, hidden], row-major, 16-byte aligned
  const void* weight;  // [experts, hidden] or [hidden, experts] as weight_layout says, row-major, 16-byte aligned
  const void* bias;    // [experts], or NULL with bias_dtype JR_NONE
  void* out;           // [tokens, experts], row-major; every element is written
  void* workspace;     // scratch on the device, 16-byte aligned, or NULL: some configurations need it
  int64_t workspace_bytes;
  int64_t tokens, hidden, experts;
  int32_t dtype;          // of x: JR_BFLOAT16, JR_FLOAT16 or JR_FLOAT32
  int32_t bias_dtype;     // JR_NONE, JR_FLOAT32 or dtype
  int32_t out_dtype;      // JR_FLOAT32 or dtype
  int32_t config;         // -1: the launcher picks. Every configuration gives the same bits.
  int32_t weight_layout;  // jr_weight_layout: JR_EXPERTS_HIDDEN (0) or JR_HIDDEN_EXPERTS (1). Both give the same bits.
  int32_t weight_dtype;   // dtype, or JR_FLOAT32 with x in JR_BFLOAT16
} jr_router_gemm_args;

JR_EXPORT int jr_router_gemm(const jr_router_gemm_args* args, void* stream, char* message, size_t message_bytes);
// One warp per output tile walks the whole reduction tree: the readable answer, with the same bits.
JR_EXPORT int jr_router_gemm_naive(const jr_router_gemm_args* args, void* stream, char* message, size_t message_bytes);

JR_EXPORT int jr_router_gemm_num_configs(void);
JR_EXPORT const char* jr_router_gemm_config_name(int config);
JR_EXPORT int jr_router_gemm_config_fits(int config, const jr_router_gemm_args* args);
// The configuration the launcher picks for config = -1, or -1 when it refuses the problem.
JR_EXPORT int jr_router_gemm_pick_config(const jr_router_gemm_args* args);

// Timing (bench.cu): captures `launches` launches that cycle through `variants` (rotated weights) into a CUDA graph and
// replays it `repeats` times on a stream of its own; synchronises. Microseconds per launch, one value per replay.
enum jr_operation { JR_OP_ROUTER_GEMM = 0, JR_OP_EMPTY = 1, JR_OP_READ_WEIGHT = 2 };
JR_EXPORT int jr_time_graph(int operation, const jr_router_gemm_args* variants, int num_variants, int launches,
                            int repeats, float* microseconds_per_launch, char* message, size_t message_bytes);
// What one of these operations costs the calling thread (bench.cu): nanoseconds per call of 1 to 256 `calls` one after
// the other, on a stream of its own that was empty before. One value per repeat.
JR_EXPORT int jr_time_host(int operation, const jr_router_gemm_args* args, int calls, int repeats,
                           float* nanoseconds_per_call, char* message, size_t message_bytes);

#ifdef __cplusplus
}
#endif
