// The top of the reduction tree across blocks that are no cluster: each leaves the sum of its own groups for its tile
// in the workspace, and a second launch adds them up. For tiles too many or too large for clusters, of which a GPU runs
// fewer than its multiprocessors make (120 blocks of 132 on an H200) and whose exchange is slow (sm90_cluster_sum.cuh).
//
// Workspace: float4 [splits][token tiles][expert tiles][quads of a tile], every element written by every launch.
#pragma once

#include "sm90_router_gemm.cuh"

namespace jax_router {

template <typename Element, int kBlockTokens, int kBlockExperts, int kSplits>
struct SplitSum {
  static constexpr int kTilesPerRow = kBlockExperts / kTileExperts;
  static constexpr int kQuads = kBlockTokens / kTileTokens * kTilesPerRow * 32;
  static constexpr int kBlocksPerTile = kQuads / kSumSplitsThreads;  // of the second launch
  static_assert(kQuads % kSumSplitsThreads == 0, "whole blocks");

  // Leaves block `rank`'s sum of quad `quad` of its tile, in the first launch.
  static __device__ __forceinline__ void leave(const Problem& p, int rank, int quad, const float4& sum) {
    const int64_t tile = int64_t(blockIdx.x / kSplits) * gridDim.y + blockIdx.y;
    const int64_t tiles = int64_t(gridDim.x / kSplits) * gridDim.y;
    p.workspace[(rank * tiles + tile) * kQuads + quad] = sum;
  }
};

// Work: grid.x = token tiles * blocks per tile, grid.y = expert tiles.
template <typename Element, int kBlockTokens, int kBlockExperts, int kSplits>
__global__ void __launch_bounds__(kSumSplitsThreads) sm90_router_gemm_sum_splits(const Problem p) {
  using Sum = SplitSum<Element, kBlockTokens, kBlockExperts, kSplits>;
  const unsigned token_tile = blockIdx.x / Sum::kBlocksPerTile;
  const unsigned quad = blockIdx.x % Sum::kBlocksPerTile * kSumSplitsThreads + threadIdx.x, tile8 = quad / 32;
  const unsigned expert = blockIdx.y * kBlockExperts + tile8 % Sum::kTilesPerRow * kTileExperts, pair = quad % 4 * 2;
  const int64_t tiles = int64_t(gridDim.x / Sum::kBlocksPerTile) * gridDim.y;
  const float4* partial = p.workspace + (int64_t(token_tile) * gridDim.y + blockIdx.y) * Sum::kQuads + quad;
  QuadPlace place = place_quad(p, token_tile * kBlockTokens + tile8 / Sum::kTilesPerRow * kTileTokens, expert,
                               quad % 32, make_float2(0.f, 0.f));
  grid_dependency_wait();
  if (!place.tokens[0]) return;
  float4 partials[kSplits];
#pragma unroll
  for (int split = 0; split < kSplits; ++split) partials[split] = partial[split * tiles * Sum::kQuads];
  place.bias = make_float2(load_bias<Element>(p, expert + pair), load_bias<Element>(p, expert + pair + 1));
  store_quad<Element>(p, place, tree_sum<kSplits>(0, [&](int split) { return partials[split]; }));
}

}  // namespace jax_router
