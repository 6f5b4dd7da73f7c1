// The top of the reduction tree across a cluster: every block holds the sum of its own groups for one output tile;
// every block owns an equal share of the tile's quads that have tokens, receives that share from all blocks, adds it up
// and stores the logits.
//
// No global flags: partial sums travel through distributed shared memory into a buffer that is used once per launch,
// and one barrier per owner counts their bytes, so an owner waits for nothing else. Small tiles are pushed quad by quad
// from registers, which is soonest there. Large tiles go through the copy engine, one copy per owner: the network
// between multiprocessors carries about 14 bytes per clock, and a fence for plain remote stores costs more than the
// copies.
#pragma once

#include "sm90_tile.cuh"

namespace jax_router {

template <typename Element, int kBlockTokens, int kBlockExperts, int kCluster>
struct ClusterSum {
  static constexpr int kTilesPerRow = kBlockExperts / kTileExperts;
  static constexpr int kQuads = kBlockTokens / kTileTokens * kTilesPerRow * 32;
  static constexpr int kOwnedQuads = kQuads / kCluster;
  static constexpr bool kPushed = kQuads <= 512;
  static constexpr int kTokenTiles = kBlockTokens / kTileTokens;
  static constexpr int kOwnedOfTile = kOwnedQuads / kTokenTiles;       // of one token tile
  static constexpr int kReceived = kPushed ? kCluster : kCluster - 1;  // send skips its own
  static_assert(kQuads % kCluster == 0, "every block of the cluster owns the same number of quads");

  float4 received[kReceived > 0 ? kReceived : 1][kReceived > 0 ? kOwnedQuads : 1];
  float bias[kBlockExperts];
  uint64_t barrier;

  // Where in `received` an owner finds what block `sender` sent.
  static __device__ __forceinline__ int slot_of(int sender, int owner) {
    return kPushed || sender < owner ? sender : sender - 1;
  }

  // Token tiles whose quads travel, as a power of two: small tiles leave out those without tokens.
  static __device__ __forceinline__ int log2_tiles(const Problem& p, unsigned block_token) {
    constexpr int kMost = log2_of(kTokenTiles);
    if constexpr (kPushed) {
      const unsigned tokens = unsigned(p.tokens) - block_token;
#pragma unroll
      for (int tiles = 0; tiles < kMost; ++tiles) {
        if (tokens <= unsigned(kTileTokens << tiles)) return tiles;
      }
    }
    return kMost;
  }
  // Quads that a block owns, and that travel in all.
  static __device__ __forceinline__ int owned_quads(int log2_tiles) { return kOwnedOfTile << log2_tiles; }
  static __device__ __forceinline__ int quads(int log2_tiles) { return kCluster * owned_quads(log2_tiles); }

  // One thread of the first warp, before anything else and before a barrier_init_fence() of its own.
  __device__ __forceinline__ void init() { barrier_init(shared_address(&barrier), 1); }

  // Tells the cluster that this block runs and its barrier exists. All threads, the first warp after init() and its
  // fence. Costs some hundred cycles, so it comes once the block's first copies are on their way.
  __device__ __forceinline__ void arrive(int log2_tiles) {
    if (threadIdx.x == 0)
      barrier_arrive_expect_bytes(shared_address(&barrier), kReceived * 16 * owned_quads(log2_tiles));
    if constexpr (kCluster > 1) {
      __syncwarp();  // the cluster barrier wants whole warps
      cluster_arrive_relaxed();
    }
  }

  // Fetches the tile's bias while the loads of x and weight are on their way. After the dependency wait and before a
  // block-wide or cluster barrier.
  __device__ __forceinline__ void fetch_bias(const Problem& p, int block_expert) {
    if (p.bias_dtype == JR_NONE) return;
    for (int i = threadIdx.x; i < kBlockExperts; i += blockDim.x) bias[i] = load_bias<Element>(p, block_expert + i);
  }

  // Returns when every block of the cluster has arrived. All threads, before the first push or send.
  __device__ __forceinline__ void wait_for_owners() {
    if constexpr (kCluster > 1) cluster_wait();
  }

  // Small tiles: sends block `rank`'s sum of quad `quad`, one of those that travel, to its owner.
  __device__ __forceinline__ void push(int rank, int log2_tiles, int quad, const float4& sum) {
    static_assert(kPushed, "large tiles use send");
    const int owner = quad / kOwnedOfTile >> log2_tiles, owned = quad - owner * owned_quads(log2_tiles);
    store_remote_counted(remote_address(shared_address(&received[rank][owned]), owner), sum,
                         remote_address(shared_address(&barrier), owner));
  }

  // Large tiles: sends block `rank`'s sums, `sums` by quad, to all other owners. All threads that store_owned, after a
  // barrier that follows the writers' fence_for_copies(). The block must not end before finish().
  __device__ __forceinline__ void send(int rank, const float4* sums) {
    static_assert(!kPushed && kCluster > 1, "small tiles use push, and a block alone stores its own sums");
    const int owner = threadIdx.x;
    if (owner >= kCluster || owner == rank) return;
    copy_to_remote(remote_address(shared_address(received[slot_of(rank, owner)]), owner),
                   shared_address(sums + owner * kOwnedQuads), kOwnedQuads * 16,
                   remote_address(shared_address(&barrier), owner));
  }

  // Adds up the quads this block owns, in the order of the tree, and stores their logits. Threads [0, threads). `sums`
  // are what was sent; null where it was pushed.
  __device__ __forceinline__ void store_owned(const Problem& p, int rank, unsigned block_token, unsigned block_expert,
                                              unsigned threads, int log2_tiles, const float4* sums) {
    const unsigned end = owned_quads(log2_tiles);
    for (unsigned owned = threadIdx.x; owned < end; owned += threads) {
      const unsigned quad = rank * end + owned, tile = quad / 32, tile_expert = tile % kTilesPerRow * kTileExperts;
      const QuadPlace place =
          place_quad(p, block_token + tile / kTilesPerRow * kTileTokens, block_expert + tile_expert, quad % 32,
                     *reinterpret_cast<const float2*>(&bias[tile_expert + quad % 4 * 2]));
      if (owned == threadIdx.x) barrier_wait_for_cluster(shared_address(&barrier), 0);
      store_quad<Element>(p, place, tree_sum<kCluster>(0, [&](int sender) {
                            return !kPushed && sender == rank ? sums[quad] : received[slot_of(sender, rank)][owned];
                          }));
    }
  }

  // Large tiles: keeps this block's memory alive until all blocks have received what it sent. All threads, last.
  __device__ __forceinline__ void finish() {
    if constexpr (!kPushed && kCluster > 1) {
      __syncwarp();
      cluster_arrive_relaxed();
      cluster_wait();
    }
  }
};

}  // namespace jax_router
