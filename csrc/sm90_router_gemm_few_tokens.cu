// Router GEMM for few tokens: a cluster of 8 blocks shares one output tile and splits K; inside a block every warp
// owns slices of K and waits for nothing but its own slice before it multiplies with mma.sync.
//
// What limits it: latency, and the bytes one multiprocessor can pull (about 55 per clock from L2). So the weights are
// spread over the multiprocessors, the copy engine has every slice in flight at once, and each byte of x and weight is
// read once per block.
//
// Work: grid.x = cluster * expert_tiles * token_tiles; blockIdx.x % cluster is the block's rank and its share of K.
// Memory: x and weight through tensor maps (sm90_tile.cuh). Bytes: (tokens + experts) * hidden / cluster * 2 per block.
// Shared memory: one stage per warp (two units of x and of weight), the slice sums as quads [slot][tile][lane], the
// cluster's exchange buffer, one barrier per warp.
// Alone: csrc/check.cu runs it without Python.
#include "sm90_cluster_sum.cuh"
#include "sm90_router_gemm.cuh"

namespace jax_router {

namespace {

constexpr int kMaxWarps = 16;
constexpr int warps_for(int slots) { return slots < kMaxWarps ? slots : kMaxWarps; }

template <typename Element, int kTokenTiles, int kExpertTiles, int kCluster>
struct FewTokens {
  static constexpr int kTokens = kTokenTiles * kTileTokens, kExperts = kExpertTiles * kTileExperts;
  static constexpr int kStageRows = kUnitsPerSlice * (kTokens + kExperts);
  static constexpr int kStageBytes = kStageRows * kRowBytes;
  static constexpr int kGroupsPerBlock = kGroups / kCluster;
  static_assert(kStageBytes % kSwizzleAlignment == 0, "every stage starts at a swizzle atom");
  using Sum = ClusterSum<Element, kTokens, kExperts, kCluster>;

  static int shared_bytes(int hidden) {
    const int slots = kGroupsPerBlock * slices_per_group(hidden), warps = warps_for(slots);
    return warps * (kStageBytes + 8) + slots * Sum::kQuads * 16 + static_cast<int>(sizeof(Sum));
  }
};

}  // namespace

template <typename Element, int kTokenTiles, int kExpertTiles, int kCluster>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    sm90_router_gemm_few_tokens(const __grid_constant__ TiledProblem tiled) {
  using F = FewTokens<Element, kTokenTiles, kExpertTiles, kCluster>;
  using Sum = typename F::Sum;
  const Problem& p = tiled.problem;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int rank = blockIdx.x % kCluster, block = blockIdx.x / kCluster;
  const int64_t block_token = int64_t(block / p.expert_tiles) * F::kTokens;
  const int block_expert = block % p.expert_tiles * F::kExperts;
  const int units = units_of(p.hidden), slices = slices_per_group(p.hidden), slots = F::kGroupsPerBlock * slices;
  const int first_group = rank * F::kGroupsPerBlock;

  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  float4* slice_sums = reinterpret_cast<float4*>(shared + warps * F::kStageBytes);
  Sum& cluster_sum = *reinterpret_cast<Sum*>(slice_sums + slots * Sum::kQuads);
  const uint32_t arrived = shared_address(&cluster_sum + 1) + warp * 8;  // this warp's barrier
  const uint32_t x_stage = shared_address(shared) + warp * F::kStageBytes;
  const uint32_t weight_stage = x_stage + kUnitsPerSlice * F::kTokens * kRowBytes;

  cluster_sum.init();
  if (lane == 0) {
    barrier_init(arrived, 1);
    prefetch_tensor_map(tiled.weight);
    prefetch_tensor_map(tiled.x);
  }
  grid_dependency_wait();

  // Slices: a slot is one slice of one of this block's groups, and a warp owns slots. Slots past the end of a group are
  // +0.
  for (int slot = warp; slot < slots; slot += warps) {
    const int group = first_group + slot / slices;
    const int unit = group_begin(units, group) + slot % slices * kUnitsPerSlice;
    const int slice_units = max(min(group_begin(units, group + 1) - unit, kUnitsPerSlice), 0);
    __syncwarp();  // the barrier exists, and the slice before this one has been read
    if (lane == 0) {
      barrier_arrive_expect_bytes(arrived, slice_units * (p.box_tokens + F::kExperts) * kRowBytes);
      for (int i = 0; i < slice_units; ++i) {
        copy_box(weight_stage + i * F::kExperts * kRowBytes, tiled.weight, (unit + i) * kUnit, block_expert, arrived);
        copy_box(x_stage + i * F::kTokens * kRowBytes, tiled.x, (unit + i) * kUnit, int(block_token), arrived);
      }
    }
    if (slot == warp) cluster_sum.fetch_bias(p, block_expert);

    float4 sums[kTokenTiles][kExpertTiles] = {};
    barrier_wait(arrived, slot / warps);
    const int row = lane % 8, matrix = lane / 8;  // lane i addresses row i % 8 of the 8x8 matrix i / 8
#pragma unroll
    for (int i = 0; i < kUnitsPerSlice; ++i) {
      if (i >= slice_units) break;
      const uint32_t x_row = x_stage + (i * F::kTokens + matrix % 2 * 8 + row) * kRowBytes;
      const uint32_t weight_row = weight_stage + (i * F::kExperts + row) * kRowBytes;
#pragma unroll
      for (int k32 = 0; k32 < kUnit / 32; ++k32) {
        uint32_t b[kExpertTiles][4];  // both k16 steps
#pragma unroll
        for (int n = 0; n < kExpertTiles; ++n) {
          load_matrices(b[n], weight_row + n * kTileExperts * kRowBytes + ((k32 * 4 + matrix) ^ row) * 16);
        }
#pragma unroll
        for (int k16 = 0; k16 < 2; ++k16) {
#pragma unroll
          for (int m = 0; m < kTokenTiles; ++m) {
            uint32_t a[4];
            load_matrices(a, x_row + m * kTileTokens * kRowBytes + ((k32 * 4 + k16 * 2 + matrix / 2) ^ row) * 16);
#pragma unroll
            for (int n = 0; n < kExpertTiles; ++n)
              mma_m16n8k16(sums[m][n], a, b[n][2 * k16], b[n][2 * k16 + 1], Element());
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTokenTiles * kExpertTiles; ++tile) {
      slice_sums[slot * Sum::kQuads + tile * 32 + lane] = sums[tile / kExpertTiles][tile % kExpertTiles];
    }
  }
  __syncthreads();  // every slice sum of the block, and the bias, are in shared memory
  cluster_sum.wait_for_owners();

  // Groups: add up slices in ascending order, then the block's part of the tree, and send it to the owner.
  for (int quad = threadIdx.x; quad < Sum::kQuads; quad += blockDim.x) {
    cluster_sum.push(rank, quad, tree_sum<F::kGroupsPerBlock>(0, [&](int group) {
                       float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
                       for (int slice = 0; slice < slices; ++slice)
                         sum = sum + slice_sums[(group * slices + slice) * Sum::kQuads + quad];
                       return sum;
                     }));
  }
  cluster_sum.store_owned(p, rank, block_token, block_expert, blockDim.x);
  grid_dependency_trigger();
}

namespace {

template <int kTokenTiles, int kExpertTiles>
constexpr Config config(const char* name, Cost cost) {
  using F = FewTokens<bfloat16, kTokenTiles, kExpertTiles, 8>;
  return {name,
          F::kTokens,
          F::kExperts,
          8,
          {reinterpret_cast<const void*>(&sm90_router_gemm_few_tokens<bfloat16, kTokenTiles, kExpertTiles, 8>),
           reinterpret_cast<const void*>(&sm90_router_gemm_few_tokens<float16, kTokenTiles, kExpertTiles, 8>)},
          [](int hidden) { return 32 * warps_for(F::kGroupsPerBlock * slices_per_group(hidden)); },
          &F::shared_bytes,
          cost};
}

}  // namespace

const Config few_tokens_configs[kFewTokensConfigs] = {
    config<1, 1>("few_16x8_c8", {2.70, 0, 0.21}),  config<1, 2>("few_16x16_c8", {2.67, 0, 0.22}),
    config<1, 4>("few_16x32_c8", {2.88, 0, 0.14}), config<2, 2>("few_32x16_c8", {2.85, 0, 0.20}),
    config<2, 3>("few_32x24_c8", {3.10, 0, 0.12}), config<2, 4>("few_32x32_c8", {3.20, 0, 0.13}),
};

}  // namespace jax_router
