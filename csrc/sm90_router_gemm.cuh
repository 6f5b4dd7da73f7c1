// The kernels as the launcher sees them: one row per configuration of the one reduction tree.
#pragma once

#include <cuda_runtime.h>

#include "sm90_tile.cuh"

namespace jax_router {

// Of a multiprocessor of compute capability 9.0.
constexpr int kMaxSharedBytes = 232448;     // of one block
constexpr int kReservedSharedBytes = 1024;  // of every block besides
constexpr int kRegisters = 65536;

// Fitted to CUDA-graph replay on an H200, 14 shapes of 1 to 16384 tokens, 2026-11-24; used only to rank configurations.
struct Cost {
  double first, wave;         // microseconds of the first and every further wave of clusters, without the bytes
  double per_block_kilobyte;  // and wave, that a block reads
  double per_megabyte;        // that all blocks read
};

// One compiled shape of a kernel. A block computes block_tokens x block_experts logits over 1/cluster of K.
struct Config {
  const char* name;
  int block_tokens, block_experts, cluster;
  int registers;          // per thread, at launch
  const void* kernel[2];  // by jr_dtype: JR_BFLOAT16, JR_FLOAT16
  int (*threads)(int hidden);
  int (*shared_bytes)(int hidden);  // dynamic; no kernel has static shared memory
  Cost cost;
};

constexpr int kFewTokensConfigs = 6;
constexpr int kManyTokensConfigs = 9;
extern const Config few_tokens_configs[kFewTokensConfigs];
extern const Config many_tokens_configs[kManyTokensConfigs];

cudaError_t launch_naive(int dtype, const Problem& p, cudaStream_t stream);

}  // namespace jax_router
