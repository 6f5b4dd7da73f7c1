// Router GEMM for few tokens: a cluster of 8 blocks shares one output tile and splits K; inside a block every slice of
// K has a warp of its own, which waits for nothing but its own copies before it multiplies with mma.sync.
//
// What limits it: latency, and the bytes one multiprocessor can pull (about 60 per clock from L2). So the weights are
// spread over the multiprocessors, all slices are in flight at once (up to 16 per block), and each byte of x and weight
// is read once per block. Plain asynchronous copies, because the copy engine's first data come some 400 cycles later:
// it fetches its tensor maps first.
//
// Work: grid.x = cluster * token tiles, grid.y = expert tiles; blockIdx.x % cluster is the block's rank and its share
// of K. Bytes: (tokens + experts) * hidden / cluster * 2 per block. Shared memory: one stage per slice in flight (two
// units of weight and of x, rows of 128 bytes, chunk c of row r at c ^ (r % 8); weights [hidden, experts] see
// kColumnTiles), the slice sums as quads [slot][tile][lane], the cluster's exchange buffer. Alone: csrc/check.cu
// runs it without Python.
#include <type_traits>

#include "sm90_router_gemm.cuh"
#include "sm90_slice_sums.cuh"

namespace jax_router {

namespace {

constexpr int kMaxWarps = 16, kCluster = 8;

template <typename Element, int kTokenTiles, int kExpertTiles>
struct FewTokens {
  static constexpr int kTokens = kTokenTiles * kTileTokens, kExperts = kExpertTiles * kTileExperts;
  static constexpr int kStageBytes = kUnitsPerSlice * (kTokens + kExperts) * kRowBytes;
  static constexpr int kGroupsPerBlock = kGroups / kCluster;
  static_assert(kGroupsPerBlock == 2, "slots are mapped to two groups");
  using Sum = ClusterSum<Element, kTokens, kExperts, kCluster>;

  // A slot is one slice of one of the block's groups.
  static constexpr int slots(int hidden) { return kGroupsPerBlock * slices_per_group(hidden); }
  static constexpr int stages(int hidden) { return slots(hidden) < kMaxWarps ? slots(hidden) : kMaxWarps; }
  static int shared_bytes(int hidden) {
    return stages(hidden) * kStageBytes + slots(hidden) * Sum::kQuads * 16 + static_cast<int>(sizeof(Sum));
  }
};

// A unit of weights that are stored [hidden, experts], of 16 experts: rows of K lie 32 bytes here and 32 bytes there,
// so a copy of a warp asks for 16 lines of memory where rows of experts have 4; more experts in a block wait longer
// than the copy engine takes (sm90_router_gemm_many_tokens.cu). In shared memory a tile of experts has 16 bytes for
// each element of K, element k at k ^ (tile * kTurn), so that neither copies nor ldmatrix meet in a bank.
constexpr int kColumnTiles = 2, kRowsPerCopy = 32 / kColumnTiles, kTurn = 4;

// Multiplies one unit: all tiles of tokens by all tiles of experts. `x_chunk` and `weight_chunk` are where this lane's
// row of an 8x8 matrix begins in the unit; another chunk of that row differs in bits of its number.
template <typename Element, int kTokenTiles, int kExpertTiles, bool kHiddenExperts>
__device__ __forceinline__ void multiply_unit(float4 (&sums)[kTokenTiles][kExpertTiles], uint32_t x_chunk,
                                              uint32_t weight_chunk) {
#pragma unroll
  for (int k32 = 0; k32 < kUnit / 32; ++k32) {
    uint32_t b[kExpertTiles][4];  // both k16 steps
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      const uint32_t tile = n * kTileExperts * kRowBytes;
      if constexpr (kHiddenExperts) {
        load_transposed_matrices(b[n], (weight_chunk ^ n * kTurn * 16) + k32 * 512 + tile);
      } else {
        load_matrices(b[n], (weight_chunk ^ k32 * 64) + tile);
      }
    }
#pragma unroll
    for (int k16 = 0; k16 < 2; ++k16) {
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        uint32_t a[4];
        load_matrices(a, (x_chunk ^ (k32 * 64 + k16 * 32)) + m * kTileTokens * kRowBytes);
#pragma unroll
        for (int n = 0; n < kExpertTiles; ++n)
          mma_m16n8k16(sums[m][n], a, b[n][2 * k16], b[n][2 * k16 + 1], sums[m][n], Element());
      }
    }
  }
}

}  // namespace

template <typename Element, int kTokenTiles, int kExpertTiles, bool kHiddenExperts>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) sm90_router_gemm_few_tokens(const Problem p) {
  using F = FewTokens<Element, kTokenTiles, kExpertTiles>;
  using Sum = typename F::Sum;
  const unsigned lane = threadIdx.x % 32, stage = uniform_warp(), stages = blockDim.x / 32;
  const unsigned rank = blockIdx.x % kCluster, block_token = blockIdx.x / kCluster * F::kTokens;
  const unsigned block_expert = blockIdx.y * F::kExperts;
  const int log2_tiles = Sum::log2_tiles(p, block_token);
  const unsigned units = units_of(p.hidden), slices = slices_per_group(p.hidden), slots = F::kGroupsPerBlock * slices;

  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  float4* slice_sums = reinterpret_cast<float4*>(shared + stages * F::kStageBytes);
  Sum& cluster_sum = *reinterpret_cast<Sum*>(slice_sums + slots * Sum::kQuads);
  const uint32_t weight_stage = uniform(shared_address(shared) + stage * F::kStageBytes);
  const uint32_t x_stage = weight_stage + kUnitsPerSlice * F::kExperts * kRowBytes;

  // Lane i copies chunk i % 8 of rows i / 8, i / 8 + 4, ... of x and of the weight. Rows of tokens that do not exist
  // are zeros or left as they are: they have logits of their own, which nobody stores.
  const unsigned row = lane / 8, chunk = lane % 8, row_bytes = p.hidden * 2;
  const uint32_t place = row * kRowBytes + (chunk ^ row) * 16;  // of the first row; 4 rows on, the chunk is another
  const uint8_t* const x = static_cast<const uint8_t*>(p.x) + uint64_t(block_token + row) * row_bytes;
  const unsigned x_rows = min(unsigned(p.tokens) - block_token, unsigned(F::kTokens));
  // The weights that this lane copies: chunks of rows, or of rows of K those of one tile of experts.
  static_assert(!kHiddenExperts || kExpertTiles == kColumnTiles);
  const unsigned tile = lane % kColumnTiles, first_k = lane / kColumnTiles;
  const unsigned pitch = kHiddenExperts ? p.experts * 2 : row_bytes;
  const uint8_t* const weight = static_cast<const uint8_t*>(p.weight) +
                                (kHiddenExperts ? uint64_t(first_k) * pitch + (block_expert + tile * kTileExperts) * 2
                                                : uint64_t(block_expert + row) * pitch);
  const int weight_rows = p.experts - int(block_expert + (kHiddenExperts ? tile * kTileExperts : row));
  const auto copy_weights = [&](unsigned unit, uint32_t to) {
    if constexpr (kHiddenExperts) {
      const unsigned k = unit * kUnit + first_k;
      const uint8_t* const source = weight + uint64_t(unit) * kUnit * pitch;
#pragma unroll
      for (unsigned rows = 0; rows < kUnit; rows += kRowsPerCopy)
        copy_16_bytes<0>(to + tile * kTileExperts * kRowBytes + ((rows + first_k) ^ tile * kTurn) * 16,
                         source + rows * pitch, k + rows < unsigned(p.hidden) && weight_rows > 0);
    } else {
      const unsigned offset = unit * kRowBytes + chunk * 16;
      const bool exists = offset < row_bytes;
#pragma unroll
      for (int rows = 0; rows < F::kExperts; rows += 4)
        copy_16_bytes<0>(to + rows * kRowBytes + (place ^ rows % 8 * 16), weight + rows * row_bytes + offset,
                         exists && rows < weight_rows);
    }
  };
  grid_dependency_wait();

  // Slots past the end of a group are +0.
  for (unsigned slot = stage; slot < slots; slot += stages) {
    const unsigned block_group = slot >= slices, group = rank * F::kGroupsPerBlock + block_group;
    const int unit = group_begin(units, group) + (slot - block_group * slices) * kUnitsPerSlice;
    const int slice_units = max(min(group_begin(units, group + 1) - unit, kUnitsPerSlice), 0);
    __syncwarp();  // the slice before this one has been read
#pragma unroll
    for (int i = 0; i < kUnitsPerSlice; ++i) {
      const unsigned offset = (unit + i) * kRowBytes + chunk * 16;
      const bool exists = offset < row_bytes;
      if (i < slice_units) {
        copy_weights(unit + i, weight_stage + i * F::kExperts * kRowBytes);
#pragma unroll
        for (int rows = 0; rows < F::kTokens; rows += 4) {
          if (unsigned(rows) < x_rows)
            copy_16_bytes<0>(x_stage + (i * F::kTokens + rows) * kRowBytes + (place ^ rows % 8 * 16),
                             x + rows * row_bytes + offset, exists && rows + row < x_rows);
        }
      }
      commit_copies();
    }
    if (slot == stage) {
      if (threadIdx.x == 0) {
        cluster_sum.init();
        barrier_init_fence();
      }
      if (p.followed) grid_launch_next();
      cluster_sum.fetch_bias(p, block_expert);
      cluster_sum.arrive(log2_tiles);
    }
    // Lane i addresses row i % 8 of matrix i / 8: experts and chunks of weight, tokens (in eights) and chunks of x.
    const uint32_t matrix = lane / 8, matrix_row = lane % 8, x_row = matrix % 2 * 8 + matrix_row;
    const uint32_t weight_chunk =
        settled(weight_stage + (kHiddenExperts ? lane * 16 : matrix_row * kRowBytes + (matrix ^ matrix_row) * 16));
    const uint32_t x_chunk = settled(x_stage + x_row * kRowBytes + (matrix / 2 ^ matrix_row) * 16);
    float4* slot_sums = slice_sums + slot * Sum::kQuads + lane;
    float4 sums[kTokenTiles][kExpertTiles] = {};
    wait_for_copies<1>();
    __syncwarp();
    if (slice_units > 0) multiply_unit<Element, kTokenTiles, kExpertTiles, kHiddenExperts>(sums, x_chunk, weight_chunk);
    wait_for_copies<0>();
    __syncwarp();
    if (slice_units > 1)
      multiply_unit<Element, kTokenTiles, kExpertTiles, kHiddenExperts>(sums, x_chunk + F::kTokens * kRowBytes,
                                                                        weight_chunk + F::kExperts * kRowBytes);
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kExpertTiles; ++n) slot_sums[(m * kExpertTiles + n) * 32] = sums[m][n];
    }
  }
  cluster_sum.wait_for_owners();
  __syncthreads();  // every slice sum of the block, and the bias, are in shared memory

  push_groups(cluster_sum, slice_sums, slices, rank, log2_tiles);
  cluster_sum.store_owned(p, rank, block_token, block_expert, blockDim.x, log2_tiles, nullptr);
}

namespace {

template <int kTokenTiles, int kExpertTiles>
constexpr Config config(const char* name, Cost cost, Cost hidden_experts = {}) {
  using F = FewTokens<bfloat16, kTokenTiles, kExpertTiles>;
  Config few = {.name = name,
                .block_tokens = F::kTokens,
                .block_experts = F::kExperts,
                .cluster = kCluster,
                .registers = kRegisters / (32 * kMaxWarps),
                .kernel = {},
                .threads = [](int hidden) { return 32 * F::stages(hidden); },
                .shared_bytes = &F::shared_bytes,
                .cost = {cost, hidden_experts}};
  const auto add = [&]<typename Element>(Element) {
    constexpr int kDtype = std::is_same_v<Element, bfloat16> ? JR_BFLOAT16 : JR_FLOAT16;
    few.kernel[JR_EXPERTS_HIDDEN][kDtype] =
        reinterpret_cast<const void*>(&sm90_router_gemm_few_tokens<Element, kTokenTiles, kExpertTiles, false>);
    if constexpr (kExpertTiles == kColumnTiles)
      few.kernel[JR_HIDDEN_EXPERTS][kDtype] =
          reinterpret_cast<const void*>(&sm90_router_gemm_few_tokens<Element, kTokenTiles, kExpertTiles, true>);
  };
  add(bfloat16{});
  add(float16{});
  return few;
}

}  // namespace

const Config few_tokens_configs[kFewTokensConfigs] = {
    config<1, 2>("few_16x16_c8", {1.56, 0.0729, 0.000881, 0.194}, {1.95, 0.104, 0.00249, 0.216}),
    config<1, 4>("few_16x32_c8", {1.81, 0.963, 0.000676, 0.162}),
    config<2, 3>("few_32x24_c8", {1.98, 1.42, 0.00115, 0.146}),
};

}  // namespace jax_router
