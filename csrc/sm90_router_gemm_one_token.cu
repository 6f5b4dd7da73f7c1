// Router GEMM for one token, a matrix-vector product: a block computes two or four logits alone, so nothing is
// exchanged between blocks. Up to eight tokens get blocks of their own.
//
// What limits it: latency, and how many lines of memory a multiprocessor can ask for. So every thread has all of its
// copies in flight at once, each instruction asks for four whole lines, and a warp waits for nothing but its own
// copies; then come the eight steps of a slice, one barrier and a short tree.
//
// The tensor core multiplies slices instead of tokens: one k16 step of eight slices of two experts (rows 0-7 and 8-15
// of A) by the same slices of x (columns of B). The diagonal is what the tree needs; it costs nothing that the
// rest is computed too. A warp takes the same slice of eight neighbouring groups.
//
// Work: grid.x = tokens, grid.y = expert tiles. Bytes: (experts + 1) * hidden * 2 per block. Shared memory: the slice
// sums [slice][expert][group]; per warp the slices of x and of every expert as [operand][unit][group] rows of 128
// bytes, chunk c of row r at c ^ r.
#include <type_traits>

#include "sm90_router_gemm.cuh"

namespace jax_router {

namespace {

constexpr int kMaxSlices = 4;   // of a group
constexpr int kWarpGroups = 8;  // groups of a warp: rows of an MMA
constexpr int kHalves = kGroups / kWarpGroups;
constexpr int kCopiedRows = 4, kCopies = kWarpGroups / kCopiedRows;  // rows that one instruction of a warp copies
constexpr int kUnitBytes = kWarpGroups * kRowBytes, kOperandBytes = kUnitsPerSlice * kUnitBytes;  // of a warp

template <int kExperts>
struct OneToken {
  static_assert(kExperts % 2 == 0, "an MMA takes two");
  static constexpr int kPairs = kExperts / 2;  // of experts
  static constexpr int kWarpBytes = (kExperts + 1) * kOperandBytes, kSumBytes = kMaxSlices * kExperts * kGroups * 4;
  static constexpr int warps(int hidden) { return kHalves * slices_per_group(hidden); }
};

}  // namespace

template <typename Element, int kExperts>
__global__ void __launch_bounds__(32 * kHalves * kMaxSlices) sm90_router_gemm_one_token(const Problem p) {
  using O = OneToken<kExperts>;
  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const unsigned slice = warp / kHalves, first_group = warp % kHalves * kWarpGroups;
  const unsigned block_expert = blockIdx.y * kExperts;
  const unsigned units = units_of(p.hidden), row_bytes = p.hidden * 2;
  const uint32_t sums_base = shared_address(shared), stage = sums_base + O::kSumBytes + warp * O::kWarpBytes;

  // Lane i copies chunk i % 8 of the slices of groups i / 8 and i / 8 + 4.
  const unsigned row = lane / 8, chunk = lane % 8;
  const uint8_t* sources[kExperts + 1];  // x, then the weight's rows; experts past the end repeat the last
  sources[0] = static_cast<const uint8_t*>(p.x) + uint64_t(blockIdx.x) * row_bytes + chunk * 16;
#pragma unroll
  for (unsigned e = 0; e < kExperts; ++e) {
    const unsigned expert = min(block_expert + e, p.experts - 1u);
    sources[e + 1] = static_cast<const uint8_t*>(p.weight) + uint64_t(expert) * row_bytes + chunk * 16;
  }
  unsigned starts[kCopies];  // of the slices in a row, and how many bytes they have from the chunk on
  int left[kCopies];
#pragma unroll
  for (int j = 0; j < kCopies; ++j) {
    const unsigned scaled = units * (first_group + row + j * kCopiedRows);  // kGroups times the group's first unit
    starts[j] = (scaled / kGroups + slice * kUnitsPerSlice) * kRowBytes;
    left[j] = int(min((scaled + units) / kGroups * kRowBytes, row_bytes) - starts[j]) - int(chunk * 16);
  }
  const uint32_t place = stage + row * kRowBytes + (chunk ^ row) * 16;  // four rows on, the chunk is another
  grid_dependency_wait();
  const auto copy_unit = [&]<int kNumber>(std::integral_constant<int, kNumber>) {
#pragma unroll
    for (int operand = 0; operand <= kExperts; ++operand) {
#pragma unroll
      for (int j = 0; j < kCopies; ++j)
        copy_16_bytes<kNumber * kRowBytes>((place ^ j * kCopiedRows * 16) + j * kCopiedRows * kRowBytes +
                                               operand * kOperandBytes + kNumber * kUnitBytes,
                                           sources[operand] + starts[j], left[j] > kNumber * kRowBytes);
    }
    commit_copies();
  };
  copy_unit(std::integral_constant<int, 0>());
  copy_unit(std::integral_constant<int, 1>());
  if (p.followed) grid_launch_next();

  // Meanwhile: what else a thread needs to know, and then the bias, whose branch keeps the compiler from working that
  // out where the sums wait for it. The diagonal is column g of row g: one of the columns 2t and 2t + 1 of the thread
  // with t = g / 2. Lane i addresses row i % 8 of matrix i / 8: chunks of x; experts and chunks of the weight.
  constexpr uint32_t kDiagonal = 1, kOddColumn = 2, kSecondUnit = 4;
  const unsigned scaled = units * (first_group + g);
  const bool second_unit = (scaled + units) / kGroups - scaled / kGroups > slice * kUnitsPerSlice + 1;
  const uint32_t is =
      settled((t == g / 2 ? kDiagonal : 0) | (g % 2 ? kOddColumn : 0) | (second_unit ? kSecondUnit : 0));
  const uint32_t mine = settled(sums_base + (slice * kExperts * kGroups + first_group + g) * 4);
  const uint32_t matrix_row = lane % 8, matrix = lane / 8;
  const uint32_t x_chunk = settled(stage + matrix_row * kRowBytes + (matrix ^ matrix_row) * 16);
  const uint32_t weight_chunk = settled(stage + matrix_row * kRowBytes + (matrix / 2 ^ matrix_row) * 16);
  // Four threads per expert will sum up its groups.
  const float bias = threadIdx.x < 4 * kExperts ? load_bias<Element>(p, block_expert + lane / 4) : 0.f;

  using Sums = float4[O::kPairs];
  const auto multiply_unit = [&](int unit, Sums& sums, const Sums& start) {
#pragma unroll
    for (int step = 0; step < kUnit / 16; ++step) {
      uint32_t b[4];  // of this step and its neighbour
      load_matrices(b, (x_chunk ^ step / 2 * 64) + unit * kUnitBytes);
#pragma unroll
      for (int pair = 0; pair < O::kPairs; ++pair) {
        const unsigned operand = 1 + 2 * pair + matrix % 2;
        uint32_t a[4];
        load_matrices(a, (weight_chunk ^ step * 32) + operand * kOperandBytes + unit * kUnitBytes);
        mma_m16n8k16(sums[pair], a, b[step % 2 * 2], b[step % 2 * 2 + 1], step == 0 ? start[pair] : sums[pair],
                     Element());
      }
    }
  };
  Sums first = {}, both;  // of the first unit, and of two
  const auto store_diagonal = [&](const Sums& sums) {
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      // A slice without a second unit ends with the first, as in the other kernels, which add no zeros behind it.
      const float4 pair = is & kSecondUnit ? sums[e / 2] : first[e / 2];
      const float sum = e % 2 == 0 ? (is & kOddColumn ? pair.y : pair.x) : (is & kOddColumn ? pair.w : pair.z);
      store_shared(mine + e * kGroups * 4, sum, is & kDiagonal);
    }
  };
  wait_for_copies<1>();
  __syncwarp();
  multiply_unit(0, first, first);
  if (slice * kUnitsPerSlice + 1 < unsigned(ceil_div(units, kGroups))) {  // some group has a second unit in this slice
    wait_for_copies<0>();
    __syncwarp();
    multiply_unit(1, both, first);
    store_diagonal(both);
  } else {
    wait_for_copies<0>();  // zeros
    store_diagonal(first);
  }
  __syncthreads();
  if (warp > 0) return;

  // One thread adds up the slices of four neighbouring groups, then four walk the binary tree.
  const float4* const quarters = reinterpret_cast<const float4*>(shared) + lane % (4 * kExperts);
  float4 groups = quarters[0];
#pragma unroll
  for (unsigned i = 1; i < kMaxSlices; ++i) {
    if (i * kUnitsPerSlice * kGroups < units) groups = groups + quarters[i * kExperts * (kGroups / 4)];
  }
  float sum = (groups.x + groups.y) + (groups.z + groups.w);
#pragma unroll
  for (int neighbour = 1; neighbour < 4; neighbour *= 2) sum += __shfl_xor_sync(~0u, sum, neighbour);
  sum = (sum + 0.f) + bias;  // the other kernels start from +0
  const bool stores = lane / 4 < kExperts && t == 0 && block_expert + lane / 4 < unsigned(p.experts);
  const bool wide = p.out_dtype == JR_FLOAT32;
  uint8_t* const out = static_cast<uint8_t*>(p.out) +
                       uint64_t(blockIdx.x * p.experts + block_expert + lane / 4) * (wide ? 4 : sizeof(Element));
  if (stores && wide) *reinterpret_cast<float*>(out) = sum;
  if (stores && !wide) *reinterpret_cast<Element*>(out) = from_float<Element>(sum);
}

namespace {

template <int kExperts>
constexpr Config config(const char* name, Cost cost) {
  using O = OneToken<kExperts>;
  return {.name = name,
          .block_tokens = 1,
          .block_experts = kExperts,
          .registers = 64,  // at most
          .kernel = {{reinterpret_cast<const void*>(&sm90_router_gemm_one_token<bfloat16, kExperts>),
                      reinterpret_cast<const void*>(&sm90_router_gemm_one_token<float16, kExperts>)}},
          .threads = [](int hidden) { return 32 * O::warps(hidden); },
          .shared_bytes = [](int hidden) { return O::kSumBytes + O::warps(hidden) * O::kWarpBytes; },
          .max_hidden = kMaxSlices * kUnitsPerSlice * kGroups * kUnit,
          .max_tokens = 8,  // beyond, x would be read too often
          .cost = {cost}};
}

}  // namespace

const Config one_token_configs[kOneTokenConfigs] = {
    config<2>("one_1x2", {1.3, 0.249, 0.00384, 0.0839}),
    config<4>("one_1x4", {1.31, 0.443, 0.00508, 0.0407}),
};

}  // namespace jax_router
