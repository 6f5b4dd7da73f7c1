// Where the warps of a block leave the sums of their slices, and what the block's threads make of them.
#pragma once

#include "sm90_cluster_sum.cuh"

namespace jax_router {

// Adds up the slices of both groups of a block in ascending order, takes the sum of the groups, the block's part of the
// tree, and sends it to the owner, for every quad that travels. `slice_sums` are by [group][slice][quad]. All threads,
// after a barrier behind the writers and after wait_for_owners().
template <typename Sum>
__device__ __forceinline__ void push_groups(Sum& cluster_sum, const float4* slice_sums, unsigned slices, int rank,
                                            int log2_tiles) {
  constexpr int kGroupsOfBlock = 2, kAtOnce = 4;  // loaded together, added in order
  for (int quad = threadIdx.x; quad < Sum::quads(log2_tiles); quad += blockDim.x) {
    float4 groups[kGroupsOfBlock] = {};
#pragma unroll 1
    for (unsigned first = 0; first < slices; first += kAtOnce) {
      float4 loaded[kGroupsOfBlock][kAtOnce] = {};
#pragma unroll
      for (int group = 0; group < kGroupsOfBlock; ++group) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i < slices) loaded[group][i] = slice_sums[(group * slices + first + i) * Sum::kQuads + quad];
        }
      }
#pragma unroll
      for (int group = 0; group < kGroupsOfBlock; ++group) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) groups[group] = groups[group] + loaded[group][i];
      }
    }
    cluster_sum.push(rank, log2_tiles, quad, groups[0] + groups[1]);
  }
}

}  // namespace jax_router
