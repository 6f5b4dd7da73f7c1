// The top of the reduction tree across a cluster: every block holds the sum of its own groups for one output tile;
// every block owns an equal share of the tile's quads, receives that share from all blocks, adds it up and stores the
// logits.
//
// No global flags: partial sums travel through distributed shared memory into a buffer that is used once per launch.
// Small tiles count arriving bytes on one mbarrier per owner, so that an owner waits for nothing else and nobody waits
// at the end. Counting costs the owner a barrier update per 16 bytes, so large tiles use plain remote stores and one
// cluster barrier.
#pragma once

#include "sm90_tile.cuh"

namespace jax_router {

template <typename Element, int kBlockTokens, int kBlockExperts, int kCluster>
struct ClusterSum {
  static constexpr int kTilesPerRow = kBlockExperts / kTileExperts;
  static constexpr int kQuads = kBlockTokens / kTileTokens * kTilesPerRow * 32;
  static constexpr int kOwnedQuads = kQuads / kCluster;
  static constexpr bool kCounted = kQuads <= 512;
  static_assert(kQuads % kCluster == 0, "every block of the cluster owns the same number of quads");
  static_assert(kCluster == kGroups || 2 * kCluster == kGroups, "a block owns one group or a pair");

  float4 received[kCluster][kOwnedQuads];
  float bias[kBlockExperts];
  uint64_t barrier;

  // Once per block, before anything else. All threads.
  __device__ __forceinline__ void init() {
    if (kCounted && threadIdx.x == 0) {
      barrier_init(shared_address(&barrier), 1);
      barrier_arrive_expect_bytes(shared_address(&barrier), sizeof(received));
    }
    __syncwarp();  // the cluster barrier wants whole warps
    cluster_arrive();
  }

  // Fetches the tile's bias while the loads of x and weight are on their way. After the dependency wait and before a
  // block-wide or cluster barrier.
  __device__ __forceinline__ void fetch_bias(const Problem& p, int block_expert) {
    if (p.bias_dtype == JR_NONE) return;
    for (int i = threadIdx.x; i < kBlockExperts; i += blockDim.x) bias[i] = load_bias<Element>(p, block_expert + i);
  }

  // Returns when every block of the cluster has started and its barrier exists. All threads, before the first push.
  __device__ __forceinline__ void wait_for_owners() { cluster_wait(); }

  // Sends block `rank`'s sum of quad `quad` to its owner.
  __device__ __forceinline__ void push(int rank, int quad, const float4& sum) {
    const int owner = quad / kOwnedQuads;
    const uint32_t slot = remote_address(shared_address(&received[rank][quad % kOwnedQuads]), owner);
    if constexpr (kCounted) {
      store_remote_counted(slot, sum, remote_address(shared_address(&barrier), owner));
    } else {
      store_remote(slot, sum);
    }
  }

  // What threads that take no part in push and store_owned call instead, because cluster barriers want every thread.
  __device__ __forceinline__ void attend() {
    cluster_wait();
    if constexpr (!kCounted) {
      cluster_arrive();
      cluster_wait();
    }
  }

  // Adds up the quads this block owns, in the order of the tree, and stores their logits. Threads [0, threads).
  __device__ __forceinline__ void store_owned(const Problem& p, int rank, int64_t block_token, int block_expert,
                                              int threads) {
    if constexpr (kCounted) {
      if (threadIdx.x >= kOwnedQuads) return;
      barrier_wait(shared_address(&barrier), 0);
    } else {
      cluster_arrive();
      cluster_wait();
    }
    for (int owned = threadIdx.x; owned < kOwnedQuads; owned += threads) {
      const float4 total = tree_sum<kCluster>(0, [&](int sender) { return received[sender][owned]; });
      const int quad = rank * kOwnedQuads + owned, tile = quad / 32;
      const int tile_expert = tile % kTilesPerRow * kTileExperts, pair = tile_expert + quad % 4 * 2;
      store_quad<Element>(p, block_token + tile / kTilesPerRow * kTileTokens, block_expert + tile_expert, quad % 32,
                          total, bias[pair], bias[pair + 1]);
    }
  }
};

}  // namespace jax_router
