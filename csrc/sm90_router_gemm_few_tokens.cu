// Router GEMM for few tokens: a cluster of 8 blocks shares one output tile and splits K; inside a block every slice of
// K has a warp of its own, which waits for nothing but that slice before it multiplies with mma.sync.
//
// What limits it: latency, and the bytes one multiprocessor can pull (about 60 per clock from L2). So the weights are
// spread over the multiprocessors, the copy engine has every slice in flight at once (up to 16 per block), and each
// byte of x and weight is read once per block.
//
// Work: grid.x = cluster * token tiles, grid.y = expert tiles; blockIdx.x % cluster is the block's rank and its share
// of K. Memory: x and weight through tensor maps (sm90_tile.cuh). Bytes: (tokens + experts) * hidden / cluster * 2 per
// block. Shared memory: one stage per slice in flight (two units of weight and of x), the slice sums as quads
// [slot][tile][lane], the cluster's exchange buffer, one barrier per stage. Alone: csrc/check.cu runs it without
// Python.
#include "sm90_cluster_sum.cuh"
#include "sm90_router_gemm.cuh"

namespace jax_router {

namespace {

constexpr int kMaxWarps = 16, kCluster = 8;

template <typename Element, int kExpertTiles>
struct FewTokens {
  static constexpr int kExperts = kExpertTiles * kTileExperts;
  static constexpr int kStageBytes = kUnitsPerSlice * (kTileTokens + kExperts) * kRowBytes;
  static constexpr int kGroupsPerBlock = kGroups / kCluster;
  static_assert(kGroupsPerBlock == 2, "slots are mapped to two groups");
  static_assert(kStageBytes % kSwizzleAlignment == 0, "every stage starts at a swizzle atom");
  using Sum = ClusterSum<Element, kTileTokens, kExperts, kCluster>;

  // A slot is one slice of one of the block's groups.
  static constexpr int slots(int hidden) { return kGroupsPerBlock * slices_per_group(hidden); }
  static constexpr int stages(int hidden) { return slots(hidden) < kMaxWarps ? slots(hidden) : kMaxWarps; }
  static int shared_bytes(int hidden) {
    return stages(hidden) * (kStageBytes + 8) + slots(hidden) * Sum::kQuads * 16 + static_cast<int>(sizeof(Sum));
  }
};

// Multiplies the units of one slice: 16 tokens by all tiles of experts. `x_chunk` and `weight_chunk` are where this
// lane's row of an 8x8 matrix begins in the first unit; another chunk of that row differs in bits of its number.
template <typename Element, int kExpertTiles>
__device__ __forceinline__ void multiply_slice(float4 (&sums)[kExpertTiles], uint32_t x_chunk, uint32_t weight_chunk,
                                               int slice_units) {
#pragma unroll
  for (int i = 0; i < kUnitsPerSlice; ++i) {
    if (i >= slice_units) break;
#pragma unroll
    for (int k32 = 0; k32 < kUnit / 32; ++k32) {
      uint32_t b[kExpertTiles][4];  // both k16 steps
#pragma unroll
      for (int n = 0; n < kExpertTiles; ++n)
        load_matrices(b[n], (weight_chunk ^ k32 * 64) + (i * kExpertTiles + n) * kTileExperts * kRowBytes);
#pragma unroll
      for (int k16 = 0; k16 < 2; ++k16) {
        uint32_t a[4];
        load_matrices(a, (x_chunk ^ (k32 * 64 + k16 * 32)) + i * kTileTokens * kRowBytes);
#pragma unroll
        for (int n = 0; n < kExpertTiles; ++n) mma_m16n8k16(sums[n], a, b[n][2 * k16], b[n][2 * k16 + 1], Element());
      }
    }
  }
}

}  // namespace

template <typename Element, int kExpertTiles>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    sm90_router_gemm_few_tokens(const __grid_constant__ TiledProblem tiled) {
  using F = FewTokens<Element, kExpertTiles>;
  using Sum = typename F::Sum;
  const Problem& p = tiled.problem;
  const int lane = threadIdx.x % 32;
  const unsigned stage = uniform_warp(), stages = blockDim.x / 32, rank = blockIdx.x % kCluster;
  const unsigned block_token = blockIdx.x / kCluster * kTileTokens;
  const unsigned block_expert = blockIdx.y * F::kExperts;
  const unsigned units = units_of(p.hidden), slices = slices_per_group(p.hidden), slots = F::kGroupsPerBlock * slices;

  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  float4* slice_sums = reinterpret_cast<float4*>(shared + stages * F::kStageBytes);
  Sum& cluster_sum = *reinterpret_cast<Sum*>(slice_sums + slots * Sum::kQuads);
  const uint32_t arrived = shared_address(&cluster_sum + 1) + stage * 8;  // the stage's barrier
  const uint32_t weight_stage = shared_address(shared) + stage * F::kStageBytes;
  const uint32_t x_stage = weight_stage + kUnitsPerSlice * F::kExperts * kRowBytes;

  if (lane == 0) {
    barrier_init(arrived, 1);
    if (threadIdx.x == 0) cluster_sum.init();
    barrier_init_fence();
  }
  if (stage == 1 && elect_one()) {
    prefetch_tensor_map(tiled.weight);
    prefetch_tensor_map(tiled.x);
  }
  grid_dependency_wait();

  // Slots past the end of a group are +0.
  uint32_t x_chunk = 0, weight_chunk = 0;
  for (unsigned pass = 0;; ++pass) {
    const unsigned slot = pass * stages + stage;
    if (slot >= slots) break;
    const unsigned block_group = slot >= slices, group = rank * F::kGroupsPerBlock + block_group;
    const int unit = group_begin(units, group) + (slot - block_group * slices) * kUnitsPerSlice;
    const int slice_units = max(min(group_begin(units, group + 1) - unit, kUnitsPerSlice), 0);
    __syncwarp();  // the barrier exists, and the slice before this one has been read
    if (elect_one()) {
      barrier_arrive_expect_bytes(arrived, slice_units * (p.box_tokens + F::kExperts) * kRowBytes);
#pragma unroll
      for (int i = 0; i < kUnitsPerSlice; ++i) {
        if (i >= slice_units) break;
        copy_box(weight_stage + i * F::kExperts * kRowBytes, tiled.weight, (unit + i) * kUnit, block_expert, arrived);
        copy_box(x_stage + i * kTileTokens * kRowBytes, tiled.x, (unit + i) * kUnit, int(block_token), arrived);
      }
    }
    if (pass == 0) {
      // Lane i addresses row i % 8 of matrix i / 8: experts and chunks of weight, tokens (in eights) and chunks of x.
      const uint32_t row = lane % 8, matrix = lane / 8;
      weight_chunk = settled(weight_stage + row * kRowBytes + (matrix ^ row) * 16);
      x_chunk = settled(x_stage + (matrix % 2 * 8 + row) * kRowBytes + (matrix / 2 ^ row) * 16);
      cluster_sum.fetch_bias(p, block_expert);
      cluster_sum.arrive();
      cluster_sum.wait_for_owners();
    }

    barrier_wait(arrived, pass);
    float4* slot_sums = slice_sums + slot * Sum::kQuads + lane;
    float4 sums[kExpertTiles] = {};
    multiply_slice<Element, kExpertTiles>(sums, x_chunk, weight_chunk, slice_units);
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) slot_sums[n * 32] = sums[n];
  }
  __syncthreads();  // every slice sum of the block, and the bias, are in shared memory

  // Groups: add up slices in ascending order, then the block's part of the tree, and send it to the owner.
  for (int quad = threadIdx.x; quad < Sum::kQuads; quad += blockDim.x) {
    float4 groups[F::kGroupsPerBlock] = {};
#pragma unroll 1
    for (unsigned first = 0; first < slices; first += 4) {
      float4 four[F::kGroupsPerBlock][4] = {};  // loaded together, added in order
#pragma unroll
      for (int group = 0; group < F::kGroupsPerBlock; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + i < slices) four[group][i] = slice_sums[(group * slices + first + i) * Sum::kQuads + quad];
        }
      }
#pragma unroll
      for (int group = 0; group < F::kGroupsPerBlock; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) groups[group] = groups[group] + four[group][i];
      }
    }
    cluster_sum.push(rank, quad, groups[0] + groups[1]);
  }
  cluster_sum.store_owned(p, rank, block_token, block_expert, blockDim.x, nullptr);
}

namespace {

template <int kExpertTiles>
constexpr Config config(const char* name, Cost cost) {
  using F = FewTokens<bfloat16, kExpertTiles>;
  return {.name = name,
          .block_tokens = kTileTokens,
          .block_experts = F::kExperts,
          .cluster = kCluster,
          .registers = kRegisters / (32 * kMaxWarps),
          .tiled = true,
          .kernel = {reinterpret_cast<const void*>(&sm90_router_gemm_few_tokens<bfloat16, kExpertTiles>),
                     reinterpret_cast<const void*>(&sm90_router_gemm_few_tokens<float16, kExpertTiles>)},
          .threads = [](int hidden) { return 32 * F::stages(hidden); },
          .shared_bytes = &F::shared_bytes,
          .cost = cost};
}

}  // namespace

const Config few_tokens_configs[kFewTokensConfigs] = {
    config<1>("few_16x8_c8", {2.182, 0.3201, 0, 0.1254}),
    config<2>("few_16x16_c8", {2, 0, 0, 0.2194}),
    config<4>("few_16x32_c8", {2.405, 1.771, 0, 0.1274}),
};

}  // namespace jax_router
