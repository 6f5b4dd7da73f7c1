// Router GEMM for many tokens: the same tree with wgmma. A cluster of 1 to 8 blocks shares one output tile and splits
// K; inside a block one warpgroup feeds the copy engine and two multiply, walking groups slice by slice and keeping
// running totals. With tiles of 128 tokens each of the two takes 64 tokens; with tiles of 64 each takes half of the
// block's K.
//
// What limits it: the bytes one multiprocessor can pull, so tiles are large, each byte of a tile is read once per
// block, and copies run several units ahead. A stage holds one unit.
//
// Work: grid.x = cluster * token tiles, grid.y = expert tiles. Memory: x and weight through tensor maps
// (sm90_tile.cuh). Shared memory: a ring of kStages x (tokens + experts) x 128 bytes, in two rings where the warpgroups
// split K, reused for the block's sums; the cluster's exchange buffer; two barriers per stage.
#include "sm90_cluster_sum.cuh"
#include "sm90_router_gemm.cuh"
#include "sm90_wgmma.cuh"

namespace jax_router {

namespace {

constexpr int kConsumers = 256;             // threads of the two warpgroups that multiply
constexpr int kThreads = kConsumers + 128;  // and of the one that copies
constexpr int kProducerWarp = kConsumers / 32;
constexpr int kWarpgroupTokens = 64;

}  // namespace

template <typename Element, int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
struct ManyTokens {
  static constexpr int kRings = kBlockTokens == kWarpgroupTokens ? 2 : 1;  // warpgroups that split K
  static constexpr int kRingStages = kStages / kRings;
  static constexpr int kRingGroups = kGroups / kCluster / kRings;
  static constexpr int kLevels = log2_of(kRingGroups);  // of the tree above the groups of a ring
  static constexpr int kSums = kBlockExperts / 2;       // accumulators per thread
  // Small tiles leave room for two blocks on a multiprocessor: a second wave, or the launch after this one.
  static constexpr int kResident = kSums <= 16 ? 2 : 1;
  static constexpr int kConsumerRegisters = kResident == 2 ? 104 : 232, kProducerRegisters = kResident == 2 ? 32 : 40;
  static constexpr int kLaunchRegisters =
      kRegisters / kThreads / kResident / 8 * 8;  // per thread, until the roles part
  static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= kThreads * kLaunchRegisters,
                "what one role takes the other gave back");
  using Sum = ClusterSum<Element, kBlockTokens, kBlockExperts, kCluster>;
  static_assert(kBlockTokens == 2 * kWarpgroupTokens / kRings && kStages % kRings == 0, "two warpgroups");

  struct alignas(kSwizzleAlignment) Shared {
    union {
      struct {
        uint8_t x[kStages][kBlockTokens * kRowBytes];
        uint8_t weight[kStages][kBlockExperts * kRowBytes];
      };
      float4 sums[Sum::kQuads];  // of the block, once every unit has been multiplied
    };
    Sum cluster_sum;
    uint64_t filled[kStages], emptied[kStages];
  };
};

// Takes the sum of group `group` (0, 1, ... of 2^kLevels) up the binary tree as far as it goes: `levels` holds the left
// halves that wait for their right halves. After the last group `sum` is the total.
template <int kLevels, int kSums>
__device__ __forceinline__ void climb_tree(float (&levels)[kLevels + 1][kSums], float (&sum)[kSums], int group) {
  bool waiting = false;
#pragma unroll
  for (int level = 0; level < kLevels; ++level) {
    const bool left = !waiting && (group >> level & 1) == 0, right = !waiting && !left;
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      if (left) levels[level][j] = sum[j];
      if (right) sum[j] = levels[level][j] + sum[j];
    }
    waiting = waiting || left;
  }
}

template <typename Element, int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
__global__ void __launch_bounds__(kThreads,
                                  (ManyTokens<Element, kBlockTokens, kBlockExperts, kCluster, kStages>::kResident))
    sm90_router_gemm_many_tokens(const __grid_constant__ TiledProblem tiled) {
  using M = ManyTokens<Element, kBlockTokens, kBlockExperts, kCluster, kStages>;
  using Sum = typename M::Sum;
  extern __shared__ __align__(kSwizzleAlignment) uint8_t dynamic_shared[];
  typename M::Shared& shared = *reinterpret_cast<typename M::Shared*>(dynamic_shared);
  const Problem& p = tiled.problem;

  const int lane = threadIdx.x % 32, warp = uniform_warp(), rank = blockIdx.x % kCluster;
  const int64_t block_token = int64_t(blockIdx.x / kCluster) * kBlockTokens;
  const int block_expert = blockIdx.y * kBlockExperts;
  const int units = units_of(p.hidden);
  // Groups of ring r are [ring_group(r), ring_group(r + 1)), its units [ring_unit(r), ring_unit(r + 1)). Unit i of a
  // ring goes to stage i % kRingStages of the ring.
  const auto ring_group = [&](int ring) { return (rank * M::kRings + ring) * M::kRingGroups; };
  const auto ring_unit = [&](int ring) { return group_begin(units, ring_group(ring)); };
  const auto stage_of = [&](int ring, int i) { return ring * M::kRingStages + i % M::kRingStages; };

  if (lane == 0) {
    if (warp == kProducerWarp) {
      prefetch_tensor_map(tiled.weight);
      prefetch_tensor_map(tiled.x);
    }
    for (int stage = warp; stage < kStages; stage += kThreads / 32) {
      barrier_init(shared_address(&shared.filled[stage]), 1);
      barrier_init(shared_address(&shared.emptied[stage]), kConsumers / 32 / M::kRings);
    }
  }
  shared.cluster_sum.init();
  const int most_units = max(ring_unit(1) - ring_unit(0), ring_unit(M::kRings) - ring_unit(M::kRings - 1));
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
  __syncthreads();  // the barriers exist

  if (warp >= kProducerWarp) {
    // Producer: a unit is copied once the unit before it in its stage has been multiplied.
    decrease_registers<M::kProducerRegisters>();
    if (warp == kProducerWarp && elect_one()) {
      for (int i = 0; i < most_units; ++i) {
#pragma unroll
        for (int ring = 0; ring < M::kRings; ++ring) {
          const int unit = ring_unit(ring) + i, stage = stage_of(ring, i);
          if (unit >= ring_unit(ring + 1)) continue;
          const uint32_t filled = shared_address(&shared.filled[stage]);
          if (i >= M::kRingStages) barrier_wait(shared_address(&shared.emptied[stage]), i / M::kRingStages - 1);
          barrier_arrive_expect_bytes(filled, (p.box_tokens + kBlockExperts) * kRowBytes);
          copy_box(shared_address(shared.weight[stage]), tiled.weight, unit * kUnit, block_expert, filled);
          copy_box(shared_address(shared.x[stage]), tiled.x, unit * kUnit, int(block_token), filled);
        }
      }
    }
    __syncwarp();  // the cluster barriers want whole warps
    shared.cluster_sum.wait_for_owners();
  } else {
    increase_registers<M::kConsumerRegisters>();
    shared.cluster_sum.fetch_bias(p, block_expert);
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

    float slice_sum[M::kSums], sum[M::kSums], levels[M::kLevels + 1][M::kSums];
    for (int group = 0; group < M::kRingGroups; ++group) {
#pragma unroll
      for (int j = 0; j < M::kSums; ++j) sum[j] = 0.f;
      const int end = group_begin(units, ring_group(ring) + group + 1) - ring_unit(ring);
      for (int i = group_begin(units, ring_group(ring) + group) - ring_unit(ring); i < end; i += kUnitsPerSlice) {
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
      climb_tree<M::kLevels>(levels, sum, group);
    }

    named_barrier(1, kConsumers);  // the stages are done with: their memory takes the sums
    // Warpgroups that split K give each other their sums of half the expert tiles and add those of the other half.
    const auto quad_of = [&](int j) { return (token_tile * Sum::kTilesPerRow + j) * 32 + lane; };
    const auto keeps = [&](int j) { return M::kRings == 1 || (j < Sum::kTilesPerRow / 2) == (warpgroup == 0); };
    const auto sum_of = [&](int j) { return make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]); };
    if constexpr (M::kRings == 2) {
#pragma unroll
      for (int j = 0; j < Sum::kTilesPerRow; ++j) {
        if (!keeps(j)) shared.sums[quad_of(j)] = sum_of(j);
      }
      named_barrier(1, kConsumers);
    }
    if constexpr (Sum::kPushed) shared.cluster_sum.wait_for_owners();
#pragma unroll
    for (int j = 0; j < Sum::kTilesPerRow; ++j) {
      if (!keeps(j)) continue;
      const int quad = quad_of(j);
      const float4 total = M::kRings == 1 ? sum_of(j) : sum_of(j) + shared.sums[quad];
      if constexpr (Sum::kPushed) {
        shared.cluster_sum.push(rank, quad, total);
      } else {
        shared.sums[quad] = total;
      }
    }
    if constexpr (!Sum::kPushed) {
      fence_for_copies();
      named_barrier(1, kConsumers);
      shared.cluster_sum.wait_for_owners();
      shared.cluster_sum.send(rank, shared.sums);
    }
    shared.cluster_sum.store_owned(p, rank, block_token, block_expert, kConsumers, shared.sums);
  }
  shared.cluster_sum.finish();
}

namespace {

template <int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
constexpr Config config(const char* name, Cost cost) {
  using M = ManyTokens<bfloat16, kBlockTokens, kBlockExperts, kCluster, kStages>;
  return {name,
          kBlockTokens,
          kBlockExperts,
          kCluster,
          M::kLaunchRegisters,
          {reinterpret_cast<const void*>(
               &sm90_router_gemm_many_tokens<bfloat16, kBlockTokens, kBlockExperts, kCluster, kStages>),
           reinterpret_cast<const void*>(
               &sm90_router_gemm_many_tokens<float16, kBlockTokens, kBlockExperts, kCluster, kStages>)},
          [](int) { return kThreads; },
          [](int) { return static_cast<int>(sizeof(typename M::Shared)); },
          cost};
}

}  // namespace

const Config many_tokens_configs[kManyTokensConfigs] = {
    config<64, 32, 8, 8>("many_64x32_c8", {2.2695, 1.2706, 0, 0.1394}),
    config<64, 64, 8, 12>("many_64x64_c8", {2.6846, 3.807, 0.003, 0.112}),
    config<64, 128, 8, 8>("many_64x128_c8", {3.424, 2.588, 0.0056, 0.06}),
    config<64, 32, 4, 8>("many_64x32_c4", {2.0154, 1.1073, 0.0032, 0.1293}),
    config<64, 64, 4, 12>("many_64x64_c4", {2.3331, 2.4068, 0.0078, 0.0273}),
    config<64, 128, 4, 8>("many_64x128_c4", {4.3368, 3.5753, 0.0053, 0.0328}),
    config<128, 64, 4, 8>("many_128x64_c4", {4.258, 3.1089, 0.0054, 0.0789}),
    config<128, 64, 2, 8>("many_128x64_c2", {6.9035, 6.2547, 0.008, 0.0093}),
    config<128, 64, 1, 8>("many_128x64_c1", {8.276, 7.6866, 0.0041, 0.0503}),
};

}  // namespace jax_router
