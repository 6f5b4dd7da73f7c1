// Router GEMM for many tokens: the same tree with wgmma. Blocks that share one output tile split K, as a cluster of 1
// to 8 (sm90_cluster_sum.cuh) or 4 that leave their sums to a second launch (sm90_sum_parts.cuh); inside a block one
// warpgroup feeds the copy engine and two multiply, walking groups slice by slice and keeping running totals. With
// tiles of 128 tokens each of the two takes 64 tokens; with tiles of 64 each takes half of the block's K.
//
// What limits it: the bytes one multiprocessor can pull, so tiles are large, each byte of a tile is read once per
// block, and copies run several units ahead. A stage holds one unit.
//
// Work: grid.x = parts * expert tiles, grid.y * grid.z = token tiles: blocks that run at a time share x, which may not
// fit the L2. Memory: x and weight through tensor maps (sm90_tile.cuh). Shared memory: a ring of kStages x (tokens +
// experts) x 128 bytes, in two rings where the warpgroups split K, reused for the block's sums; what registers do not
// hold of the tree; the cluster's exchange buffer; two barriers per stage.
#include <stddef.h>

#include <type_traits>

#include "sm90_cluster_sum.cuh"
#include "sm90_router_gemm.cuh"
#include "sm90_sum_parts.cuh"
#include "sm90_wgmma.cuh"

namespace jax_router {

namespace {

constexpr int kConsumers = 256;             // threads of the two warpgroups that multiply
constexpr int kThreads = kConsumers + 128;  // and of the one that copies
constexpr int kProducerWarp = kConsumers / 32;
constexpr int kWarpgroupTokens = 64;
constexpr unsigned kUnitsAhead = 3;  // of a ring, copied before the block arrives at the cluster's barrier
constexpr int kConsumersMet = 1, kFirstStages = 2, kOtherStages = 3;  // named barriers

}  // namespace

// kParts blocks share one tile and split K: kSplit says how their sums come together.
template <typename Element, int kBlockTokens, int kBlockExperts, int kParts, bool kSplit, int kStages>
struct ManyTokens {
  static constexpr int kRings = kBlockTokens == kWarpgroupTokens ? 2 : 1;  // warpgroups that split K
  static constexpr int kRingStages = kStages / kRings;
  // Warps that copy. With tiles of 32 experts one is too slow for two rings. With larger ones the rings stay in step,
  // and so do the blocks, which ask for the same bytes at the same time: the L2 serves that faster.
  static constexpr int kCopiers = kBlockExperts <= 32 ? kRings : 1;
  static constexpr int kRingGroups = kGroups / kParts / kRings;
  static constexpr int kLevels = log2_of(kRingGroups);  // of the tree above the groups of a ring
  static constexpr int kXBytes = kBlockTokens * kRowBytes, kWeightBytes = kBlockExperts * kRowBytes;  // of a stage
  static constexpr int kSums = kBlockExperts / 2;  // accumulators per thread
  // Left halves of the top level wait in shared memory where registers hold no more than these.
  static constexpr int kRegisterSums = 208;
  static constexpr bool kParked = kSums * (2 + kLevels) > kRegisterSums;
  static constexpr int kRegisterLevels = kLevels - kParked;
  static_assert(kSums * (2 + kRegisterLevels) <= kRegisterSums, "one level is parked");
  // Small tiles leave room for two blocks on a multiprocessor: a second wave, or the launch after this one.
  static constexpr int kResident = kSums <= 16 && kStages <= 8 ? 2 : 1;
  static constexpr int kConsumerRegisters = kResident == 2 ? 104 : 232, kProducerRegisters = kResident == 2 ? 32 : 40;
  static constexpr int kLaunchRegisters =
      kRegisters / kThreads / kResident / 8 * 8;  // per thread, until the roles part
  // Large tiles need more, and the copying warps give it; but the consumers wait until they do.
  static constexpr bool kMovesRegisters = kSums * (2 + kRegisterLevels) + 40 > kLaunchRegisters;
  static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= kThreads * kLaunchRegisters,
                "what one role takes the other gave back");
  static_assert(kBlockTokens == 2 * kWarpgroupTokens / kRings && kStages % kRings == 0, "two warpgroups");
  static_assert(kRingStages >= kUnitsAhead, "the first copies wait for nothing");

  struct Nothing {};
  using Cluster = ClusterSum<Element, kBlockTokens, kBlockExperts, kParts>;
  struct alignas(kSwizzleAlignment) Shared {
    union {
      struct {
        uint8_t x[kStages][kXBytes];
        uint8_t weight[kStages][kWeightBytes];
      };
      float4 sums[Cluster::kQuads];  // of the block, once every unit has been multiplied
    };
    std::conditional_t<kParked, float4[kSums / 4][kConsumers], Nothing> parked;
    std::conditional_t<kSplit, Nothing, Cluster> cluster_sum;
    uint64_t filled[kStages], emptied[kStages];
  };
};

// Leaves in `sum` the node of the binary tree over the 2^kLevel groups from `first` on. `levels` holds the left halves
// while their right halves are computed, `parked` this thread's of level kRegisterLevels; add_group(group) leaves one
// group's sum in `sum`. Loops, so that there are few copies of the main loop, and branches that all threads take alike;
// but two copies for the lowest level, whose sums then stay where they are.
template <int kLevel, int kRegisterLevels, int kSums, typename AddGroup>
__device__ __forceinline__ void sum_node(float (&levels)[kRegisterLevels + 1][kSums], float (&sum)[kSums],
                                         float4 (*parked)[kConsumers], int first, const AddGroup& add_group) {
  if constexpr (kLevel == 0) {
    add_group(first);
  } else {
    float (&left)[kSums] = levels[kLevel - 1 < kRegisterLevels ? kLevel - 1 : kRegisterLevels];
#pragma unroll(kLevel == 1 ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      sum_node<kLevel - 1, kRegisterLevels>(levels, sum, parked, first + half * (1 << (kLevel - 1)), add_group);
      if constexpr (kLevel > kRegisterLevels) {
#pragma unroll
        for (int j = 0; j < kSums; j += 4) {
          float4& mine = parked[j / 4][threadIdx.x];
          const float4 right = make_float4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3]);
          if (half == 0) {
            mine = right;
          } else {
            const float4 both = mine + right;
            sum[j] = both.x, sum[j + 1] = both.y, sum[j + 2] = both.z, sum[j + 3] = both.w;
          }
        }
      } else if (half == 0) {
#pragma unroll
        for (int j = 0; j < kSums; ++j) left[j] = sum[j];
      } else {
#pragma unroll
        for (int j = 0; j < kSums; ++j) sum[j] = left[j] + sum[j];
      }
    }
  }
}

template <typename Element, int kBlockTokens, int kBlockExperts, int kParts, bool kSplit, int kStages,
          bool kHiddenExperts>
__global__ void __launch_bounds__(
    kThreads, (ManyTokens<Element, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>::kResident))
    sm90_router_gemm_many_tokens(const __grid_constant__ TiledProblem tiled) {
  using M = ManyTokens<Element, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>;
  constexpr int kTilesPerRow = kBlockExperts / kTileExperts;
  using Shared = typename M::Shared;
  extern __shared__ __align__(kSwizzleAlignment) uint8_t dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const Problem& p = tiled.problem;

  const int lane = threadIdx.x % 32, warp = uniform_warp(), rank = blockIdx.x % kParts;
  const uint32_t base = uniform(shared_address(dynamic_shared));
  const unsigned block_token = (blockIdx.z * gridDim.y + blockIdx.y) * kBlockTokens;
  const unsigned block_expert = blockIdx.x / kParts * kBlockExperts;
  if (block_token >= unsigned(p.tokens)) return;  // the last plane of the grid; all blocks of a cluster alike
  const unsigned units = units_of(p.hidden);
  // Groups of ring r are [ring_group(r), ring_group(r + 1)), its units [ring_unit(r), ring_unit(r + 1)). Unit i of a
  // ring goes to stage i % kRingStages of the ring.
  const auto ring_group = [&](int ring) { return (rank * M::kRings + ring) * M::kRingGroups; };
  const auto ring_unit = [&](int ring) -> unsigned { return group_begin(units, ring_group(ring)); };
  const auto stage_of = [&](int ring, unsigned i) { return ring * M::kRingStages + i % M::kRingStages; };
  const auto filled_of = [&](unsigned stage) -> uint32_t { return base + offsetof(Shared, filled) + stage * 8; };
  const auto emptied_of = [&](unsigned stage) -> uint32_t { return base + offsetof(Shared, emptied) + stage * 8; };

  [[maybe_unused]] const int log2_tiles = M::Cluster::log2_tiles(p, block_token);
  const int copier = warp - kProducerWarp;
  const bool copies = copier >= 0 && copier < M::kCopiers;
  // Copies unit i of a ring, once the unit before it in its stage has been multiplied. One thread.
  const auto copy_unit = [&](int ring, unsigned i) {
    const unsigned unit = ring_unit(ring) + i, stage = stage_of(ring, i);
    if (unit >= ring_unit(ring + 1)) return;
    if (i >= M::kRingStages) barrier_wait(emptied_of(stage), i / M::kRingStages - 1);
    barrier_arrive_expect_bytes(filled_of(stage), (p.box_tokens + kBlockExperts) * kRowBytes);
    copy_box(base + offsetof(Shared, x) + stage * M::kXBytes, tiled.x, unit * kUnit, int(block_token),
             filled_of(stage));
    const uint32_t weight = base + offsetof(Shared, weight) + stage * M::kWeightBytes;
    if constexpr (kHiddenExperts) {
#pragma unroll
      for (int expert = 0; expert < kBlockExperts; expert += kMaxBoxExperts)
        copy_box(weight + expert * kRowBytes, tiled.weight, int(block_expert) + expert, unit * kUnit, filled_of(stage));
    } else {
      copy_box(weight, tiled.weight, unit * kUnit, block_expert, filled_of(stage));
    }
  };
  const auto copy_units = [&](unsigned first, unsigned end) {
    for (unsigned i = first; i < end; ++i) {
#pragma unroll
      for (int ring = 0; ring < M::kRings; ring += M::kCopiers) copy_unit(ring + (M::kCopiers > 1 ? copier : 0), i);
    }
  };
  const auto init_stage = [&](unsigned stage) {
    barrier_init(filled_of(stage), 1);
    barrier_init(emptied_of(stage), kConsumers / 32 / M::kRings);
  };

  // The copying warps set up only the barriers of the first stages and begin to copy, in the code that comes first; the
  // consumers set up the others.
  if (__builtin_expect(copies, true)) {
    if (elect_one()) {
#pragma unroll
      for (int ring = 0; ring < M::kRings; ring += M::kCopiers)
        init_stage(stage_of(ring + (M::kCopiers > 1 ? copier : 0), 0));
      barrier_init_fence();
    }
    __syncwarp();
    named_barrier_arrive(kFirstStages, kConsumers + 32 * M::kCopiers);
    grid_dependency_wait();
    if (elect_one()) copy_units(0, 1);
    __syncwarp();
  } else {
    if (warp == kProducerWarp + 3 && elect_one()) {
      prefetch_tensor_map(tiled.x);
      prefetch_tensor_map(tiled.weight);
    }
    if (M::kResident > 1 && warp == kProducerWarp + 2 && elect_one()) {
      // Half a multiprocessor's rings are too short for the latency of HBM: units past the first round come through L2.
      for (int ring = 0; ring < M::kRings; ++ring) {
        for (unsigned unit = ring_unit(ring) + M::kRingStages; unit < ring_unit(ring + 1); ++unit)
          kHiddenExperts ? prefetch_box(tiled.weight, block_expert, unit * kUnit)
                         : prefetch_box(tiled.weight, unit * kUnit, block_expert);
      }
    }
    if (warp < kProducerWarp) {
      if (elect_one()) {
#pragma unroll
        for (int first = 0; first < kStages; first += kProducerWarp) {
          const int stage = first + warp;
          if (stage < kStages && stage % M::kRingStages != 0) init_stage(stage);
        }
        if constexpr (!kSplit) {
          if (warp == 0) shared.cluster_sum.init();
        }
        barrier_init_fence();
      }
      __syncwarp();
      named_barrier_arrive(kOtherStages, kConsumers + 32 * M::kCopiers);
    }
    grid_dependency_wait();
    if (p.followed) grid_launch_next();
  }

  if (warp >= kProducerWarp) {
    if constexpr (M::kMovesRegisters) decrease_registers<M::kProducerRegisters>();  // the consumers wait for them
    if (copies) {
      const unsigned most_units = max(ring_unit(1) - ring_unit(0), ring_unit(M::kRings) - ring_unit(M::kRings - 1));
      named_barrier(kOtherStages, kConsumers + 32 * M::kCopiers);
      // Arriving costs some hundred cycles, so it comes when the copy engine has work for them.
      if (elect_one()) copy_units(1, kUnitsAhead);
      __syncwarp();
      if constexpr (!kSplit) shared.cluster_sum.arrive(log2_tiles);
      if (elect_one()) copy_units(kUnitsAhead, most_units);
      __syncwarp();
    } else if constexpr (!kSplit) {
      shared.cluster_sum.arrive(log2_tiles);
    }
    if constexpr (!kSplit) shared.cluster_sum.wait_for_owners();
  } else {
    named_barrier(kFirstStages, kConsumers + 32 * M::kCopiers);
    if constexpr (M::kMovesRegisters) increase_registers<M::kConsumerRegisters>();
    if constexpr (!kSplit) {
      shared.cluster_sum.fetch_bias(p, block_expert);
      shared.cluster_sum.arrive(log2_tiles);
    }
    const int warpgroup = warp / 4, ring = M::kRings == 2 ? warpgroup : 0;
    const int token_tile = M::kRings == 2 ? warp % 4 : warp;
    const uint32_t token_offset = M::kRings == 2 ? 0 : warpgroup * kWarpgroupTokens * kRowBytes;
    const uint32_t x_word = tile_descriptor_word(base + offsetof(Shared, x) + token_offset);
    using Weights = WeightTile<kBlockExperts, kHiddenExperts>;
    const uint32_t weight_word = Weights::descriptor_word(base + offsetof(Shared, weight));
    const auto multiply_unit = [&](float (&sum)[M::kSums], unsigned i, bool first) {
      const unsigned stage = stage_of(ring, i);
      const uint32_t a = x_word + stage * (M::kXBytes / 16), b = weight_word + stage * (M::kWeightBytes / 16);
      barrier_wait(filled_of(stage), i / M::kRingStages);
      wgmma_arrive();
#pragma unroll
      for (int k16 = 0; k16 < kUnit / 16; ++k16) {
        Wgmma<Element, kBlockExperts>::template multiply<kHiddenExperts>(
            sum, tile_descriptor(a + k16 * 2), Weights::descriptor(b + k16 * Weights::kStepWord), !first || k16 > 0);
      }
      wgmma_commit();
    };
    const auto release_unit = [&](unsigned i) {
      if (lane == 0) barrier_arrive(emptied_of(stage_of(ring, i)));
    };

    if constexpr (!kSplit) shared.cluster_sum.wait_for_owners();
    float slice_sum[M::kSums], sum[M::kSums], levels[M::kRegisterLevels + 1][M::kSums];
    float4(*parked)[kConsumers] = nullptr;
    if constexpr (M::kParked) parked = shared.parked;
    sum_node<M::kLevels, M::kRegisterLevels>(levels, sum, parked, ring_group(ring), [&](int group) {
      const unsigned end = group_begin(units, group + 1) - ring_unit(ring);
      unsigned i = group_begin(units, group) - ring_unit(ring);
      const auto multiply_slice = [&](float (&into)[M::kSums]) {
        multiply_unit(into, i, true);
        if (i + 1 < end) {
          multiply_unit(into, i + 1, false);
          wgmma_wait<1>();
          release_unit(i);
        }
        wgmma_wait<0>(into);
        release_unit(i + 1 < end ? i + 1 : i);
        i += kUnitsPerSlice;
      };
      multiply_slice(sum);  // 0 + slice 0 is slice 0; no group is empty
#pragma unroll 1
      while (i < end) {
        multiply_slice(slice_sum);
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
      // A group begins with its first slice and the other kernels' with +0, which a sum of -0 would show.
      const float4 total = (M::kRings == 1 ? sum_of(j) : sum_of(j) + shared.sums[quad]) + float4{};
      if constexpr (kSplit) {
        leave_part(p, rank, block_token + token_tile * kTileTokens, block_expert + j * kTileExperts, lane, total);
      } else if constexpr (kParts == 1) {
        const float* const bias = &shared.cluster_sum.bias[j * kTileExperts + lane % 4 * 2];
        store_quad<Element>(p,
                            place_quad(p, block_token + token_tile * kTileTokens, block_expert + j * kTileExperts, lane,
                                       *reinterpret_cast<const float2*>(bias)),
                            total);
      } else if constexpr (M::Cluster::kPushed) {
        if (quad < M::Cluster::quads(log2_tiles)) shared.cluster_sum.push(rank, log2_tiles, quad, total);
      } else {
        shared.sums[quad] = total;
      }
    }
    if constexpr (!kSplit && kParts > 1) {
      if constexpr (!M::Cluster::kPushed) {
        fence_for_copies();
        named_barrier(kConsumersMet, kConsumers);
        shared.cluster_sum.send(rank, shared.sums);
      }
      shared.cluster_sum.store_owned(p, rank, block_token, block_expert, kConsumers, log2_tiles, shared.sums);
    }
  }
  if constexpr (!kSplit) shared.cluster_sum.finish();
}

namespace {

template <int kBlockTokens, int kBlockExperts, int kParts, int kStages, bool kSplit>
constexpr Config config(const char* name, Cost cost) {
  using M = ManyTokens<bfloat16, kBlockTokens, kBlockExperts, kParts, kSplit, kStages>;
  Config many = {.name = name,
                 .block_tokens = kBlockTokens,
                 .block_experts = kBlockExperts,
                 .cluster = kSplit ? 1 : kParts,
                 .splits = kSplit ? kParts : 1,
                 .registers = M::kLaunchRegisters,
                 .tiled = true,
                 .kernel = {},
                 .threads = [](int) { return kThreads; },
                 .shared_bytes = [](int) { return static_cast<int>(sizeof(typename M::Shared)); },
                 .min_units = kGroups,  // no group is empty
                 .cost = {cost, cost}};
  const auto add = [&]<typename Element>(Element) {
    constexpr int kDtype = std::is_same_v<Element, bfloat16> ? JR_BFLOAT16 : JR_FLOAT16;
    many.kernel[JR_EXPERTS_HIDDEN][kDtype] = reinterpret_cast<const void*>(
        &sm90_router_gemm_many_tokens<Element, kBlockTokens, kBlockExperts, kParts, kSplit, kStages, false>);
    // Boxes of 64 experts would bring 128 where 80 are needed.
    if constexpr (kBlockExperts % kMaxBoxExperts == 0 || kBlockExperts < kMaxBoxExperts)
      many.kernel[JR_HIDDEN_EXPERTS][kDtype] = reinterpret_cast<const void*>(
          &sm90_router_gemm_many_tokens<Element, kBlockTokens, kBlockExperts, kParts, kSplit, kStages, true>);
  };
  add(bfloat16{});
  add(float16{});
  return many;
}

template <int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
constexpr Config cluster(const char* name, Cost cost) {
  return config<kBlockTokens, kBlockExperts, kCluster, kStages, false>(name, cost);
}
template <int kBlockTokens, int kBlockExperts, int kStages>
constexpr Config split(const char* name, Cost cost, double summed_elsewhere) {
  Config split = config<kBlockTokens, kBlockExperts, kSplits, kStages, true>(name, cost);
  split.summed_elsewhere = summed_elsewhere;
  return split;
}

}  // namespace

const Config many_tokens_configs[kManyTokensConfigs] = {
    cluster<64, 32, 8, 8>("many_64x32_c8", {2, 0.957, 0.00559, 0.147}),
    cluster<64, 32, 8, 16>("many_64x32_c8_16", {1.95, 1.39, 0.00851, 0.0685}),
    cluster<64, 64, 8, 8>("many_64x64_c8", {2.92, 2.32, 0.00531, 0.0774}),
    cluster<64, 32, 4, 8>("many_64x32_c4", {2.39, 1.66, 0.00424, 0.123}),
    cluster<64, 64, 4, 8>("many_64x64_c4", {2.69, 2.07, 0.00511, 0.087}),
    cluster<64, 80, 4, 8>("many_64x80_c4", {3.37, 2.62, 0.00317, 0.0977}),
    cluster<64, 128, 4, 8>("many_64x128_c4", {4, 4.42, 0.00452, 0.0473}),
    cluster<64, 64, 2, 12>("many_64x64_c2", {2.67, 3.71, 0.00636, 0.0564}),
    cluster<64, 80, 2, 10>("many_64x80_c2", {3.54, 3.82, 0.00557, 0.0696}),
    cluster<64, 128, 2, 6>("many_64x128_c2", {3.44, 4.13, 0.00774, 0.0413}),
    cluster<128, 64, 1, 8>("many_128x64_c1", {6.37, 5.48, 0.00651, 0.0303}),
    cluster<128, 80, 1, 6>("many_128x80_c1", {9.93, 6.82, 0.00625, 0.0361}),
    split<64, 80, 10>("many_64x80_s4", {3.39, 2.65, 0.00477, 0.086}, 0),
    split<64, 128, 8>("many_64x128_s4", {3.97, 4.45, 0.00469, 0.0695}, 0.6),
};

}  // namespace jax_router
