// The kernels as the launcher sees them: one row per configuration of the one reduction tree.
#pragma once

#include <cuda_runtime.h>

#include "sm90_tile.cuh"

namespace jax_router {

// Of a multiprocessor of compute capability 9.0.
constexpr int kMaxSharedBytes = 232448;     // of one block
constexpr int kReservedSharedBytes = 1024;  // of every block besides
constexpr int kRegisters = 65536;
constexpr int kSplits = 4;             // of a configuration with splits
constexpr int kSumPartsThreads = 256;  // of its second launch

// Fitted to graph replays on an H100, 13 shapes with 1 to 16384 tokens in both layouts of the weight, 2026-11-27, so
// that the picks are 0.9% and 0.6% from the best on average; those of float32 weights [experts, hidden] on an H100 up
// to 64 tokens and on an H200 beyond, 1.0% with x in bfloat16 and 0.2% in float32. Used only to rank configurations.
struct Cost {
  double first, wave;         // microseconds of the first and every further wave of clusters, without the bytes
  double per_block_kilobyte;  // and wave, that a block reads
  double per_megabyte;        // that all blocks read
};

// Which x and weight a kernel takes: a jr_dtype, of both, or this.
constexpr int kFloat32Weight = 3;  // and x in bfloat16
constexpr int kOperands = 4;

// One compiled shape of a kernel. A block computes block_tokens x block_experts logits over 1 / (cluster * splits) of
// K.
struct Config {
  const char* name;
  int block_tokens, block_experts;
  int cluster = 1;                   // blocks that share one tile and add up through distributed shared memory
  int splits = 1;                    // blocks that share one tile and leave partial sums in the workspace
  int registers;                     // per thread, at launch
  bool tiled = false;                // takes a TiledProblem instead of a Problem
  const void* kernel[2][kOperands];  // by jr_weight_layout and operands; null where it does not take them
  int (*threads)(int hidden);
  int (*shared_bytes)(int hidden);  // dynamic; none of these kernels has static shared memory
  int min_units = 1, max_hidden = kMaxHidden;
  int max_tokens = 1 << 27;
  Cost cost[2];  // by jr_weight_layout
  // Microseconds that it takes less in one wave when a launch that routes adds up its parts. No fit, unlike the cost:
  // set so that the picks are those that were the fastest in replays of routings on an H100.
  double summed_elsewhere = 0;
};

constexpr int kOneTokenConfigs = 2;
constexpr int kFewTokensConfigs = 3;
constexpr int kManyTokensConfigs = 14;
constexpr int kFloat32OneTokenConfigs = 5;
constexpr int kFloat32Configs = 4;
extern const Config one_token_configs[kOneTokenConfigs];
extern const Config few_tokens_configs[kFewTokensConfigs];
extern const Config many_tokens_configs[kManyTokensConfigs];
extern const Config float32_one_token_configs[kFloat32OneTokenConfigs];
extern const Config float32_configs[kFloat32Configs];
extern const void* const sum_parts_kernels[2];  // the second launch of a configuration with splits, by jr_dtype

cudaError_t launch_naive(int weight_layout, int operands, const Problem& p, cudaStream_t stream);

}  // namespace jax_router
