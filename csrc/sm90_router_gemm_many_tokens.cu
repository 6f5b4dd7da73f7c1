// Router GEMM for many tokens: the same tree with wgmma. A cluster of 8 or 16 blocks shares one output tile and splits
// K; inside a block one warpgroup feeds the copy engine and two split the tile and walk the block's groups slice by
// slice, keeping running totals.
//
// What limits it: the bytes one multiprocessor can pull, so tiles are large, each byte of a tile is read once per
// block, and copies run several units ahead. A stage holds one unit.
//
// Work: grid.x = cluster * expert_tiles * token_tiles. Memory: x and weight through tensor maps (sm90_tile.cuh). Shared
// memory: kStages x (tokens + experts) x 128 bytes, the cluster's exchange buffer, two barriers per stage.
#include "sm90_cluster_sum.cuh"
#include "sm90_router_gemm.cuh"
#include "sm90_wgmma.cuh"

namespace jax_router {

namespace {

constexpr int kConsumers = 256;             // threads of the two warpgroups that multiply
constexpr int kThreads = kConsumers + 128;  // and of the one that copies
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= 65536, "the register file");

}  // namespace

template <typename Element, int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
struct alignas(kSwizzleAlignment) ManyTokensShared {
  uint8_t x[kStages][kBlockTokens * kRowBytes];
  uint8_t weight[kStages][kBlockExperts * kRowBytes];
  ClusterSum<Element, kBlockTokens, kBlockExperts, kCluster> cluster_sum;
  uint64_t filled[kStages], emptied[kStages];
};

template <typename Element, int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_router_gemm_many_tokens(const __grid_constant__ TiledProblem tiled) {
  using Shared = ManyTokensShared<Element, kBlockTokens, kBlockExperts, kCluster, kStages>;
  constexpr int kGroupsPerBlock = kGroups / kCluster;
  constexpr int kWarpgroupsOnTokens = kBlockTokens / 64;
  constexpr int kWarpgroupExperts = kBlockExperts * kWarpgroupsOnTokens / 2;
  constexpr int kSums = kWarpgroupExperts / 2;  // accumulators per thread
  extern __shared__ __align__(kSwizzleAlignment) uint8_t dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const Problem& p = tiled.problem;

  const int rank = blockIdx.x % kCluster, block = blockIdx.x / kCluster;
  const int64_t block_token = int64_t(block / p.expert_tiles) * kBlockTokens;
  const int block_expert = block % p.expert_tiles * kBlockExperts;
  const int units = units_of(p.hidden), first_group = rank * kGroupsPerBlock;
  const int begin = group_begin(units, first_group), end = group_begin(units, first_group + kGroupsPerBlock);

  shared.cluster_sum.init();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared_address(&shared.filled[stage]), 1);
      barrier_init(shared_address(&shared.emptied[stage]), kConsumers / 32);
    }
    prefetch_tensor_map(tiled.weight);
    prefetch_tensor_map(tiled.x);
  }
  grid_dependency_wait();
  __syncthreads();  // the barriers exist

  if (threadIdx.x >= kConsumers) {
    // Producer: unit i of the block goes to stage i % kStages, once all consumers are done with unit i - kStages.
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) {
      for (int i = 0; i < end - begin; ++i) {
        const int stage = i % kStages, k = (begin + i) * kUnit;
        const uint32_t filled = shared_address(&shared.filled[stage]);
        if (i >= kStages) barrier_wait(shared_address(&shared.emptied[stage]), i / kStages - 1);
        barrier_arrive_expect_bytes(filled, (p.box_tokens + kBlockExperts) * kRowBytes);
        copy_box(shared_address(shared.weight[stage]), tiled.weight, k, block_expert, filled);
        copy_box(shared_address(shared.x[stage]), tiled.x, k, int(block_token), filled);
      }
    }
    __syncwarp();  // the cluster barriers want whole warps
    shared.cluster_sum.attend();
  } else {
    increase_registers<kConsumerRegisters>();
    shared.cluster_sum.fetch_bias(p, block_expert);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warpgroup_token = warp / 4 % kWarpgroupsOnTokens * 64;
    const int warpgroup_expert = warp / 4 / kWarpgroupsOnTokens * kWarpgroupExperts;
    const auto multiply_unit = [&](float (&sum)[kSums], int i, bool accumulate) {
      const int stage = i % kStages;
      const uint64_t a = swizzled_tile_descriptor(shared_address(shared.x[stage]) + warpgroup_token * kRowBytes);
      const uint64_t b = swizzled_tile_descriptor(shared_address(shared.weight[stage]) + warpgroup_expert * kRowBytes);
      barrier_wait(shared_address(&shared.filled[stage]), i / kStages);
      wgmma_arrive();
#pragma unroll
      for (int k16 = 0; k16 < kUnit / 16; ++k16) {
        Wgmma<Element, kWarpgroupExperts>::multiply(sum, a + k16 * 2, b + k16 * 2, accumulate || k16 > 0);
      }
      wgmma_commit();
    };
    const auto release_unit = [&](int i) {
      if (lane == 0) barrier_arrive(shared_address(&shared.emptied[i % kStages]));
    };

    float slice_sum[kSums], group_sum[kSums], block_sum[kSums];
    for (int group = 0; group < kGroupsPerBlock; ++group) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) group_sum[j] = 0.f;
      const int group_end = group_begin(units, first_group + group + 1) - begin;
      for (int i = group_begin(units, first_group + group) - begin; i < group_end; i += kUnitsPerSlice) {
        multiply_unit(slice_sum, i, false);
        if (i + 1 < group_end) {
          multiply_unit(slice_sum, i + 1, true);
          wgmma_wait<1>();
          release_unit(i);
        }
        wgmma_wait<0>();
        release_unit(i + 1 < group_end ? i + 1 : i);
#pragma unroll
        for (int j = 0; j < kSums; ++j) group_sum[j] += slice_sum[j];
      }
#pragma unroll
      for (int j = 0; j < kSums; ++j) block_sum[j] = group == 0 ? group_sum[j] : block_sum[j] + group_sum[j];
    }

    shared.cluster_sum.wait_for_owners();
    const int first_tile =
        (warpgroup_token / kTileTokens + warp % 4) * (kBlockExperts / kTileExperts) + warpgroup_expert / kTileExperts;
#pragma unroll
    for (int j = 0; j < kWarpgroupExperts / kTileExperts; ++j) {
      shared.cluster_sum.push(
          rank, (first_tile + j) * 32 + lane,
          make_float4(block_sum[4 * j], block_sum[4 * j + 1], block_sum[4 * j + 2], block_sum[4 * j + 3]));
    }
    shared.cluster_sum.store_owned(p, rank, block_token, block_expert, kConsumers);
  }
  grid_dependency_trigger();
}

namespace {

template <int kBlockTokens, int kBlockExperts, int kCluster, int kStages>
constexpr Config config(const char* name, Cost cost) {
  return {name,
          kBlockTokens,
          kBlockExperts,
          kCluster,
          {reinterpret_cast<const void*>(
               &sm90_router_gemm_many_tokens<bfloat16, kBlockTokens, kBlockExperts, kCluster, kStages>),
           reinterpret_cast<const void*>(
               &sm90_router_gemm_many_tokens<float16, kBlockTokens, kBlockExperts, kCluster, kStages>)},
          [](int) { return kThreads; },
          [](int) {
            return static_cast<int>(sizeof(ManyTokensShared<bfloat16, kBlockTokens, kBlockExperts, kCluster, kStages>));
          },
          cost};
}

}  // namespace

const Config many_tokens_configs[kManyTokensConfigs] = {
    config<64, 32, 8, 14>("many_64x32_c8", {2.5, 0.0156, 0}),
    config<64, 48, 16, 8>("many_64x48_c16", {3.1, 0.0155, 0}),
    config<64, 64, 8, 10>("many_64x64_c8", {3.1, 0.0123, 0}),
    config<64, 96, 16, 8>("many_64x96_c16", {3.7, 0.0141, 0}),
    config<64, 128, 8, 7>("many_64x128_c8", {3.85, 0.0100, 0}),
    config<128, 128, 8, 5>("many_128x128_c8", {5.45, 0.0116, 0}),
};

}  // namespace jax_router
