// Router GEMM for many tokens: the same tree with wgmma. Blocks that share one output tile split K, as a cluster of 1
// to 8 (sm90_cluster_sum.cuh) or 4 or 8 that leave their sums to a second launch (sm90_split_sum.cuh); inside a block
// one warpgroup feeds the copy engine and two multiply, walking groups slice by slice and keeping running totals. With
// tiles of 128 tokens each of the two takes 64 tokens; with tiles of 64 each takes half of the block's K.
//
// What limits it: the bytes one multiprocessor can pull, so tiles are large, each byte of a tile is read once per
// block, and copies run several units ahead. A stage holds one unit.
//
// Work: grid.x = parts * token tiles, grid.y = expert tiles. Memory: x and weight through tensor maps
// (sm90_tile.cuh). Shared memory: a ring of kStages x (tokens + experts) x 128 bytes, in two rings where the warpgroups
// split K, reused for the block's sums; the cluster's exchange buffer; two barriers per stage.
#include <type_traits>

#include "sm90_cluster_sum.cuh"
#include "sm90_router_gemm.cuh"
#include "sm90_split_sum.cuh"
#include "sm90_wgmma.cuh"

namespace jax_router {

namespace {

constexpr int kConsumers = 256;             // threads of the two warpgroups that multiply
constexpr int kThreads = kConsumers + 128;  // and of the one that copies
constexpr int kProducerWarp = kConsumers / 32;
constexpr int kWarpgroupTokens = 64;
constexpr int kConsumersMet = 1, kBarriersExist = 2;  // named barriers

}  // namespace

// kParts blocks share one tile and split K: kSplit says how their sums come together.
template <typename Element, int kBlockTokens, int kBlockExperts, int kParts, bool kSplit, int kStages>
struct ManyTokens {
  static constexpr int kRings = kBlockTokens == kWarpgroupTokens ? 2 : 1;  // warpgroups that split K
  static constexpr int kRingStages = kStages / kRings;
  static constexpr int kRingGroups = kGroups / kParts / kRings;
  static constexpr int kLevels = log2_of(kRingGroups);  // of the tree above the groups of a ring
  static constexpr int kSums = kBlockExperts / 2;       // accumulators per thread
  // Small tiles leave room for two blocks on a multiprocessor: a second wave, or the launch after this one.
  static constexpr int kResident = kSums <= 16 ? 2 : 1;
  static constexpr int kConsumerRegisters = kResident == 2 ? 104 : 232, kProducerRegisters = kResident == 2 ? 32 : 40;
  static constexpr int kLaunchRegisters =
      kRegisters / kThreads / kResident / 8 * 8;  // per thread, until the roles part
  static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= kThreads * kLaunchRegisters,
                "what one role takes the other gave back");
  static_assert(kBlockTokens == 2 * kWarpgroupTokens / kRings && kStages % kRings == 0, "two warpgroups");

  struct Nothing {};
  using Cluster = ClusterSum<Element, kBlockTokens, kBlockExperts, kParts>;
  using Split = SplitSum<Element, kBlockTokens, kBlockExperts, kParts>;
  struct alignas(kSwizzleAlignment) Shared {
    union {
      struct {
        uint8_t x[kStages][kBlockTokens * kRowBytes];
        uint8_t weight[kStages][kBlockExperts * kRowBytes];
      };
      float4 sums[Cluster::kQuads];  // of the block, once every unit has been multiplied
    };
    std::conditional_t<kSplit, Nothing, Cluster> cluster_sum;
    uint64_t filled[kStages], emptied[kStages];
  };
};

// Leaves in `sum` the node of the binary tree over the 2^kLevel groups from `first` on. `levels` holds the left halves
// while their right halves are computed; add_group(group) leaves one group's sum in `sum`. Loops, so that there is one
// copy of the main loop, and branches that all threads take alike.
template <int kLevel, int kLevels, int kSums, typename AddGroup>
__device__ __forceinline__ void sum_node(float (&levels)[kLevels][kSums], float (&sum)[kSums], int first,
                                         const AddGroup& add_group) {
  if constexpr (kLevel == 0) {
    add_group(first);
  } else {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      sum_node<kLevel - 1>(levels, sum, first + half * (1 << (kLevel - 1)), add_group);
      if (half == 0) {
#pragma unroll
        for (int j = 0; j < kSums; ++j) levels[kLevel - 1][j] = sum[j];
      } else {
#pragma unroll
        for (int j = 0; j < kSums; ++j) sum[j] = levels[kLevel - 1][j] + sum[j];
      }
    }
  }
}

template <typename Element, int kBlockTokens, int kBlockExperts, int kParts, bool kSplit, int kStages>
__global__ void __launch_bounds__(
    kThreads, (ManyTokens<Element, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>::kResident))
    sm90_router_gemm_many_tokens(const __grid_constant__ TiledProblem tiled) {
  using M = ManyTokens<Element, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>;
  constexpr int kTilesPerRow = kBlockExperts / kTileExperts;
  extern __shared__ __align__(kSwizzleAlignment) uint8_t dynamic_shared[];
  typename M::Shared& shared = *reinterpret_cast<typename M::Shared*>(dynamic_shared);
  const Problem& p = tiled.problem;

  const int lane = threadIdx.x % 32, warp = uniform_warp(), rank = blockIdx.x % kParts;
  const int64_t block_token = int64_t(blockIdx.x / kParts) * kBlockTokens;
  const int block_expert = blockIdx.y * kBlockExperts;
  const int units = units_of(p.hidden);
  // Groups of ring r are [ring_group(r), ring_group(r + 1)), its units [ring_unit(r), ring_unit(r + 1)). Unit i of a
  // ring goes to stage i % kRingStages of the ring.
  const auto ring_group = [&](int ring) { return (rank * M::kRings + ring) * M::kRingGroups; };
  const auto ring_unit = [&](int ring) { return group_begin(units, ring_group(ring)); };
  const auto stage_of = [&](int ring, int i) { return ring * M::kRingStages + i % M::kRingStages; };

  const int most_units = max(ring_unit(1) - ring_unit(0), ring_unit(M::kRings) - ring_unit(M::kRings - 1));
  const auto copy_unit = [&](int ring, int i) {
    const int unit = ring_unit(ring) + i, stage = stage_of(ring, i);
    if (unit >= ring_unit(ring + 1)) return;
    const uint32_t filled = shared_address(&shared.filled[stage]);
    if (i >= M::kRingStages) barrier_wait(shared_address(&shared.emptied[stage]), i / M::kRingStages - 1);
    barrier_arrive_expect_bytes(filled, (p.box_tokens + kBlockExperts) * kRowBytes);
    copy_box(shared_address(shared.weight[stage]), tiled.weight, unit * kUnit, block_expert, filled);
    copy_box(shared_address(shared.x[stage]), tiled.x, unit * kUnit, int(block_token), filled);
  };

  if (warp == kProducerWarp) {
    if (elect_one()) {
      prefetch_tensor_map(tiled.weight);
      prefetch_tensor_map(tiled.x);
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(shared_address(&shared.filled[stage]), 1);
        barrier_init(shared_address(&shared.emptied[stage]), kConsumers / 32 / M::kRings);
      }
      barrier_init_fence();
    }
    __syncwarp();
  }
  if constexpr (!kSplit) {
    if (threadIdx.x == 0) {
      shared.cluster_sum.init();
      barrier_init_fence();
    }
  }
  if (M::kResident > 1 && warp == kProducerWarp + 1 && elect_one()) {
    // Half a multiprocessor's rings are too short for the latency of HBM: units past the first round come through L2.
    for (int i = M::kRingStages; i < most_units; ++i) {
      for (int ring = 0; ring < M::kRings; ++ring) {
        const int unit = ring_unit(ring) + i;
        if (unit < ring_unit(ring + 1)) prefetch_box(tiled.weight, unit * kUnit, block_expert);
      }
    }
  }
  grid_dependency_wait();
  if (warp == kProducerWarp) {
    named_barrier_arrive(kBarriersExist, kThreads);  // and goes on
  } else {
    named_barrier(kBarriersExist, kThreads);
  }

  if (warp >= kProducerWarp) {
    // Producer: a unit is copied once the unit before it in its stage has been multiplied.
    const auto copy_units = [&](int first, int end) {
      if (warp != kProducerWarp || !elect_one()) return;
      for (int i = first; i < end; ++i) {
#pragma unroll
        for (int ring = 0; ring < M::kRings; ++ring) copy_unit(ring, i);
      }
    };
    copy_units(0, 1);
    __syncwarp();
    decrease_registers<M::kProducerRegisters>();
    if constexpr (!kSplit) shared.cluster_sum.arrive();
    copy_units(1, most_units);
    __syncwarp();
    if constexpr (!kSplit) shared.cluster_sum.wait_for_owners();
  } else {
    increase_registers<M::kConsumerRegisters>();
    if constexpr (!kSplit) {
      shared.cluster_sum.fetch_bias(p, block_expert);
      shared.cluster_sum.arrive();
    }
    const int warpgroup = warp / 4, ring = M::kRings == 2 ? warpgroup : 0;
    const int token_tile = M::kRings == 2 ? warp % 4 : warp;
    const uint32_t token_offset = M::kRings == 2 ? 0 : warpgroup * kWarpgroupTokens * kRowBytes;
    const auto multiply_unit = [&](float (&sum)[M::kSums], int i, bool first) {
      const int stage = stage_of(ring, i);
      const uint64_t a = swizzled_tile_descriptor(shared_address(shared.x[stage]) + token_offset);
      const uint64_t b = swizzled_tile_descriptor(shared_address(shared.weight[stage]));
      barrier_wait(shared_address(&shared.filled[stage]), i / M::kRingStages);
      wgmma_arrive();
#pragma unroll
      for (int k16 = 0; k16 < kUnit / 16; ++k16) {
        Wgmma<Element, kBlockExperts>::multiply(sum, a + k16 * 2, b + k16 * 2, !first || k16 > 0);
      }
      wgmma_commit();
    };
    const auto release_unit = [&](int i) {
      if (lane == 0) barrier_arrive(shared_address(&shared.emptied[stage_of(ring, i)]));
    };

    if constexpr (!kSplit) shared.cluster_sum.wait_for_owners();
    float slice_sum[M::kSums], sum[M::kSums], levels[M::kLevels + 1][M::kSums];
    sum_node<M::kLevels>(levels, sum, ring_group(ring), [&](int group) {
#pragma unroll
      for (int j = 0; j < M::kSums; ++j) sum[j] = 0.f;
      const int end = group_begin(units, group + 1) - ring_unit(ring);
      for (int i = group_begin(units, group) - ring_unit(ring); i < end; i += kUnitsPerSlice) {
        multiply_unit(slice_sum, i, true);
        if (i + 1 < end) {
          multiply_unit(slice_sum, i + 1, false);
          wgmma_wait<1>();
          release_unit(i);
        }
        wgmma_wait<0>(slice_sum);
        release_unit(i + 1 < end ? i + 1 : i);
#pragma unroll
        for (int j = 0; j < M::kSums; ++j) sum[j] += slice_sum[j];
      }
    });

    named_barrier(kConsumersMet, kConsumers);  // the stages are done with: their memory takes the sums
    // Warpgroups that split K give each other their sums of half the expert tiles and add those of the other half.
    const auto quad_of = [&](int j) { return (token_tile * kTilesPerRow + j) * 32 + lane; };
    const auto keeps = [&](int j) { return M::kRings == 1 || (j < kTilesPerRow / 2) == (warpgroup == 0); };
    const auto sum_of = [&](int j) { return make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]); };
    if constexpr (M::kRings == 2) {
#pragma unroll
      for (int j = 0; j < kTilesPerRow; ++j) {
        if (!keeps(j)) shared.sums[quad_of(j)] = sum_of(j);
      }
      named_barrier(kConsumersMet, kConsumers);
    }
#pragma unroll
    for (int j = 0; j < kTilesPerRow; ++j) {
      if (!keeps(j)) continue;
      const int quad = quad_of(j);
      const float4 total = M::kRings == 1 ? sum_of(j) : sum_of(j) + shared.sums[quad];
      if constexpr (kSplit) {
        M::Split::leave(p, rank, quad, total);
      } else if constexpr (M::Cluster::kPushed) {
        shared.cluster_sum.push(rank, quad, total);
      } else {
        shared.sums[quad] = total;
      }
    }
    if constexpr (!kSplit) {
      if constexpr (!M::Cluster::kPushed) {
        fence_for_copies();
        named_barrier(kConsumersMet, kConsumers);
        shared.cluster_sum.send(rank, shared.sums);
      }
      shared.cluster_sum.store_owned(p, rank, block_token, block_expert, kConsumers, shared.sums);
    }
  }
  if constexpr (!kSplit) shared.cluster_sum.finish();
}

namespace {

template <int kBlockTokens, int kBlockExperts, int kParts, int kStages, bool kSplit>
constexpr Config config(const char* name, Cost cost) {
  using M = ManyTokens<bfloat16, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>;
  Config config = {
      .name = name,
      .block_tokens = kBlockTokens,
      .block_experts = kBlockExperts,
      .registers = M::kLaunchRegisters,
      .tiled = true,
      .kernel = {reinterpret_cast<const void*>(
                     &sm90_router_gemm_many_tokens<bfloat16, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>),
                 reinterpret_cast<const void*>(
                     &sm90_router_gemm_many_tokens<float16, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>)},
      .threads = [](int) { return kThreads; },
      .shared_bytes = [](int) { return static_cast<int>(sizeof(typename M::Shared)); },
      .cost = cost};
  if constexpr (kSplit) {
    config.splits = kParts;
    config.sum_splits[JR_BFLOAT16] =
        reinterpret_cast<const void*>(&sm90_router_gemm_sum_splits<bfloat16, kBlockTokens, kBlockExperts, kParts>);
    config.sum_splits[JR_FLOAT16] =
        reinterpret_cast<const void*>(&sm90_router_gemm_sum_splits<float16, kBlockTokens, kBlockExperts, kParts>);
  } else {
    config.cluster = kParts;
  }
  return config;
}

template <int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
constexpr Config cluster(const char* name, Cost cost) {
  return config<kBlockTokens, kBlockExperts, kCluster, kStages, false>(name, cost);
}
template <int kBlockTokens, int kBlockExperts, int kSplits, int kStages>
constexpr Config split(const char* name, Cost cost) {
  return config<kBlockTokens, kBlockExperts, kSplits, kStages, true>(name, cost);
}

}  // namespace

const Config many_tokens_configs[kManyTokensConfigs] = {
    cluster<64, 32, 8, 8>("many_64x32_c8", {2.422, 2.054, 0.00104, 0.1248}),
    cluster<64, 64, 8, 8>("many_64x64_c8", {2.733, 2.373, 0.00682, 0.0431}),
    cluster<64, 128, 8, 8>("many_64x128_c8", {3.716, 3.443, 0.00561, 0.0515}),
    cluster<64, 32, 4, 8>("many_64x32_c4", {2.439, 1.791, 0.00505, 0.094}),
    cluster<64, 64, 4, 8>("many_64x64_c4", {2.831, 2.579, 0.00739, 0.0256}),
    cluster<64, 128, 4, 8>("many_64x128_c4", {5.132, 3.889, 0.00532, 0.0441}),
    cluster<128, 64, 4, 8>("many_128x64_c4", {3.941, 4.097, 0.00655, 0.0552}),
    cluster<128, 64, 2, 8>("many_128x64_c2", {3.837, 5.359, 0.00856, 0.0435}),
    cluster<128, 64, 1, 8>("many_128x64_c1", {6.464, 9.084, 0.005, 0.0519}),
    split<64, 128, 8, 8>("many_64x128_s8", {4.461, 2.629, 0.00268, 0.0799}),
    split<64, 128, 4, 8>("many_64x128_s4", {4.947, 4.225, 0.00441, 0.0524}),
    split<128, 96, 4, 8>("many_128x96_s4", {6.3, 7.588, 0.00544, 0.0623}),
};

}  // namespace jax_router
