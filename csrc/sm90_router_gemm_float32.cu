// Router GEMM with float32 weights, x in bfloat16 or float32: a cluster of 8 blocks shares one output tile and splits
// K; inside a block every unit of K has a warp of its own, which waits for nothing but its own copies, splits what it
// loads into terms and multiplies them with mma.sync (sm90_float32.cuh). One kernel for any number of tokens.
//
// What limits it: for few tokens latency and bytes, of which the weights have twice as many as 16-bit ones; for many
// the bytes that tiles of at most 32 tokens read again and again.
//
// Work: grid.x = cluster * token tiles, grid.y = expert tiles; blockIdx.x % cluster is the block's rank and its share
// of K. Bytes: (tokens * bytes of x + experts * 4) * hidden / cluster per block. Shared memory: one stage per unit in
// flight, the slice sums as quads [slot][tile][lane], the cluster's exchange buffer. In a stage float32 rows lie as in
// sm90_float32.cuh; rows of bfloat16 have 128 bytes, chunk c of row r at c ^ (r % 8); weights [hidden, experts] a row
// of the tile's experts per element k of K, chunk c of all of them at c ^ (k / 2 % 4 * 2).
#include <type_traits>

#include "sm90_float32.cuh"
#include "sm90_router_gemm.cuh"
#include "sm90_slice_sums.cuh"

namespace jax_router {

namespace {

constexpr int kCluster = 8;

template <typename X, int kTokenTiles, int kExpertTiles>
struct Float32 {
  static constexpr int kTokens = kTokenTiles * kTileTokens, kExperts = kExpertTiles * kTileExperts;
  static constexpr int kXRowBytes = kUnit * int(sizeof(X)), kWeightBytes = kExperts * kFloatRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kXRowBytes;
  static constexpr int kMaxWarps = kTokenTiles * kExpertTiles <= 2 ? 16 : 8;
  static constexpr int kGroupsPerBlock = kGroups / kCluster;
  using Sum = ClusterSum<X, kTokens, kExperts, kCluster>;

  // A slot is one unit of one of the block's groups.
  static constexpr int slots(int hidden) { return kGroupsPerBlock * units_per_group(hidden); }
  static constexpr int sum_bytes(int hidden) { return slots(hidden) * Sum::kQuads * 16 + int(sizeof(Sum)); }
  static constexpr int stages(int hidden) {
    const int room = (kMaxSharedBytes - sum_bytes(hidden)) / kStageBytes;
    return max(1, min_of(min_of(slots(hidden), kMaxWarps), room));
  }
  static int shared_bytes(int hidden) { return stages(hidden) * kStageBytes + sum_bytes(hidden); }
};

// Copies `kRows` rows of one unit of a row-major float32 matrix: a lane chunk lane % 16 of every other row. `source` is
// where that chunk of row lane / 16 lies; rows from `rows` on become zeros, as does a chunk that does not exist.
template <int kRows>
__device__ __forceinline__ void copy_float_rows(uint32_t to, const uint8_t* source, uint64_t pitch, int rows,
                                                bool exists, unsigned lane) {
  const unsigned row = lane / 16, chunk = lane % 16;
  const uint32_t place = to + row * kFloatRowBytes + (chunk ^ row * 2) * 16;
#pragma unroll
  for (int i = 0; i < kRows; i += 2)
    copy_16_bytes<0>((place ^ i % 4 * 32) + i * kFloatRowBytes, source + i * pitch, exists && i + int(row) < rows);
}

}  // namespace

template <typename X, int kTokenTiles, int kExpertTiles, bool kHiddenExperts>
__global__ void __launch_bounds__(32 * Float32<X, kTokenTiles, kExpertTiles>::kMaxWarps, 1)
    sm90_router_gemm_float32(const Problem p) {
  using F = Float32<X, kTokenTiles, kExpertTiles>;
  using Sum = typename F::Sum;
  const unsigned lane = threadIdx.x % 32, stage = uniform_warp(), stages = blockDim.x / 32;
  const unsigned rank = blockIdx.x % kCluster, block_token = blockIdx.x / kCluster * F::kTokens;
  const unsigned block_expert = blockIdx.y * F::kExperts;
  const int log2_tiles = Sum::log2_tiles(p, block_token);
  const unsigned units = units_of(p.hidden), slices = units_per_group(p.hidden), slots = F::kGroupsPerBlock * slices;

  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  float4* slice_sums = reinterpret_cast<float4*>(shared + stages * F::kStageBytes);
  Sum& cluster_sum = *reinterpret_cast<Sum*>(slice_sums + slots * Sum::kQuads);
  const uint32_t weight_stage = uniform(shared_address(shared) + stage * F::kStageBytes);
  const uint32_t x_stage = weight_stage + F::kWeightBytes;

  const int x_rows = int(min(unsigned(p.tokens) - block_token, unsigned(F::kTokens)));
  const int weight_rows = int(min(unsigned(p.experts) - block_expert, unsigned(F::kExperts)));
  const uint64_t x_pitch = uint64_t(p.hidden) * sizeof(X);
  const uint8_t* const x = static_cast<const uint8_t*>(p.x) + block_token * x_pitch;
  const auto copy_x = [&](unsigned unit) {
    if constexpr (std::is_same_v<X, float>) {
      const unsigned row = lane / 16, offset = unit * F::kXRowBytes + lane % 16 * 16;
      copy_float_rows<F::kTokens>(x_stage, x + row * x_pitch + offset, x_pitch, x_rows, offset < x_pitch, lane);
    } else {
      const unsigned row = lane / 8, chunk = lane % 8, offset = unit * F::kXRowBytes + chunk * 16;
      const uint32_t place = row * F::kXRowBytes + (chunk ^ row) * 16;  // four rows on, the chunk is another
#pragma unroll
      for (int rows = 0; rows < F::kTokens; rows += 4)
        copy_16_bytes<0>(x_stage + rows * F::kXRowBytes + (place ^ rows % 8 * 16), x + (row + rows) * x_pitch + offset,
                         offset < x_pitch && rows + int(row) < x_rows);
    }
  };
  const auto copy_weight = [&](unsigned unit) {
    const uint8_t* const weight = static_cast<const uint8_t*>(p.weight);
    if constexpr (kHiddenExperts) {
      constexpr unsigned kChunks = F::kExperts / 4, kRows = 32 / kChunks;  // of a row; that a copy of the warp takes
      const unsigned chunk = lane % kChunks, first = lane / kChunks;
      const uint64_t pitch = uint64_t(p.experts) * 4;
      const uint8_t* const source = weight + (unit * kUnit + first) * pitch + block_expert * 4 + chunk * 16;
#pragma unroll
      for (unsigned rows = 0; rows < kUnit; rows += kRows) {
        const unsigned k = first + rows;
        copy_16_bytes<0>(weight_stage + ((k * F::kExperts * 4 + chunk * 16) ^ k / 2 % 4 * 32), source + rows * pitch,
                         unit * kUnit + k < unsigned(p.hidden) && int(chunk * 4) < weight_rows);
      }
    } else {
      const uint64_t pitch = uint64_t(p.hidden) * 4;
      const unsigned offset = unit * kFloatRowBytes + lane % 16 * 16;
      copy_float_rows<F::kExperts>(weight_stage, weight + (block_expert + lane / 16) * pitch + offset, pitch,
                                   weight_rows, offset < pitch, lane);
    }
  };
  grid_dependency_wait();

  // Slots past the end of a group are +0.
  for (unsigned slot = stage; slot < slots; slot += stages) {
    const unsigned block_group = slot >= slices, group = rank * F::kGroupsPerBlock + block_group;
    const unsigned unit = group_begin(units, group) + (slot - block_group * slices);
    const bool exists = unit < unsigned(group_begin(units, group + 1));
    __syncwarp();  // the unit before this one has been read
    if (exists) {
      copy_weight(unit);
      copy_x(unit);
    }
    commit_copies();
    if (slot == stage) {
      if (threadIdx.x == 0) {
        cluster_sum.init();
        barrier_init_fence();
      }
      if (p.followed) grid_launch_next();
      cluster_sum.fetch_bias(p, block_expert);
      cluster_sum.arrive(log2_tiles);
    }
    // Of x in bfloat16 lane i addresses row i % 8 of matrix i / 8: tokens (in eights) and chunks.
    const uint32_t matrix = lane / 8, matrix_row = lane % 8, a_row = matrix % 2 * 8 + matrix_row;
    const uint32_t x_chunk = std::is_same_v<X, float>
                                 ? pair_of(x_stage, lane)
                                 : x_stage + a_row * F::kXRowBytes + (matrix / 2 ^ matrix_row) * 16;
    // Weights [hidden, experts]: expert lane / 4 of the rows of K of the lane's first pair.
    const uint32_t column = weight_stage + lane % 4 * 2 * F::kExperts * 4 + (lane / 4 * 4 ^ lane % 4 * 32);
    const uint32_t weight_pair = pair_of(weight_stage, lane);
    SliceSum sums[kTokenTiles][kExpertTiles] = {};
    wait_for_copies<0>();
    __syncwarp();
    if (exists) {
#pragma unroll
      for (int k16 = 0; k16 < kUnit / 16; ++k16) {
        Fragment<float, 2> weights[kExpertTiles];
#pragma unroll
        for (int n = 0; n < kExpertTiles; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if constexpr (kHiddenExperts) {
              constexpr int kRow = F::kExperts * 4;
              const uint32_t first = (column ^ n * 32) + (k16 * 16 + half * 8) * kRow;
              weights[n].set(half, make_float2(load_shared_float(first),
                                               load_shared_float(kRow == 64 ? first ^ kRow : first + kRow)));
            } else {
              const uint32_t tile = n * kTileExperts * kFloatRowBytes;
              weights[n].set(half, load_shared_float2((weight_pair ^ (k16 * kStep + half * kHalf)) + tile));
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kTokenTiles; ++m) {
          Fragment<X, 4> tokens;
          if constexpr (std::is_same_v<X, float>) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint32_t row = (m * kTileTokens + i % 2 * 8) * kFloatRowBytes;
              tokens.set(i, load_shared_float2((x_chunk ^ (k16 * kStep + i / 2 * kHalf)) + row));
            }
          } else {
            load_matrices(tokens.terms[0], (x_chunk ^ k16 * 32) + m * kTileTokens * F::kXRowBytes);
          }
#pragma unroll
          for (int n = 0; n < kExpertTiles; ++n) sums[m][n].multiply(tokens, weights[n]);
        }
      }
    }
    float4* slot_sums = slice_sums + slot * Sum::kQuads + lane;
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kExpertTiles; ++n) slot_sums[(m * kExpertTiles + n) * 32] = sums[m][n].total();
    }
  }
  cluster_sum.wait_for_owners();
  __syncthreads();  // every slice sum of the block, and the bias, are in shared memory
  push_groups(cluster_sum, slice_sums, slices, rank, log2_tiles);
  cluster_sum.store_owned(p, rank, block_token, block_expert, blockDim.x, log2_tiles, nullptr);
}

namespace {

template <typename X, int kTokenTiles, int kExpertTiles>
constexpr Config config(const char* name, Cost cost, Cost hidden_experts) {
  using F = Float32<X, kTokenTiles, kExpertTiles>;
  constexpr int kOperands = std::is_same_v<X, float> ? int(JR_FLOAT32) : kFloat32Weight;
  Config float32 = {.name = name,
                    .block_tokens = F::kTokens,
                    .block_experts = F::kExperts,
                    .cluster = kCluster,
                    .registers = kRegisters / (32 * F::kMaxWarps),
                    .kernel = {},
                    .threads = [](int hidden) { return 32 * F::stages(hidden); },
                    .shared_bytes = &F::shared_bytes,
                    .cost = {cost, hidden_experts}};
  float32.kernel[JR_EXPERTS_HIDDEN][kOperands] =
      reinterpret_cast<const void*>(&sm90_router_gemm_float32<X, kTokenTiles, kExpertTiles, false>);
  float32.kernel[JR_HIDDEN_EXPERTS][kOperands] =
      reinterpret_cast<const void*>(&sm90_router_gemm_float32<X, kTokenTiles, kExpertTiles, true>);
  return float32;
}

}  // namespace

const Config float32_configs[kFloat32Configs] = {
    config<bfloat16, 1, 2>("float32_weight_16x16_c8", {2.2, 0.0673, 0.0204, 0.0633}, {2.16, 0, 0.00919, 0.191}),
    config<bfloat16, 2, 4>("float32_weight_32x32_c8", {2.51, 0.749, 0.0112, 0.183}, {2.23, 1.22, 0.0215, 0.0528}),
    config<float, 1, 2>("float32_16x16_c8", {2.46, 0.152, 0.011, 0.188}, {2.16, 0, 0.00919, 0.191}),
    config<float, 2, 4>("float32_32x32_c8", {1.93, 0.935, 0.0325, 0.0328}, {2.23, 1.22, 0.0215, 0.0528}),
};

}  // namespace jax_router
