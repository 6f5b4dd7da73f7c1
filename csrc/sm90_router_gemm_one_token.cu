// Router GEMM for one token, a matrix-vector product: a block computes one to four logits alone, so nothing is
// exchanged between blocks. Up to eight tokens get blocks of their own.
//
// What limits it: latency. So every thread has all of its loads in flight at once, straight into the registers that
// the tensor core reads, without shared memory between; then come the eight steps of a slice, one barrier and a short
// tree. The tail is one basic block, so that the compiler works out addresses while it waits.
//
// The tensor core multiplies slices instead of tokens: one k16 step of eight slices of two experts (rows 0-7 and 8-15
// of A) by the same slices of x (columns of B). The diagonal is what the tree needs; it costs nothing that the
// rest is computed too. A warp takes the same slice of eight neighbouring groups.
//
// Which of a step's 16 elements meet in which of its 16 places does not matter to the sum. So a thread loads 16 bytes,
// half of a step, and swaps a quarter of two steps with the thread that has the other half.
//
// Work: grid.x = tokens, grid.y = expert tiles. Bytes: (experts + 1) * hidden * 2 per block. Shared memory: slice sums
// [slice][expert][group].
#include "sm90_router_gemm.cuh"

namespace jax_router {

namespace {

constexpr int kWarpGroups = 8;  // groups of a warp: rows of an MMA
constexpr int kHalves = kGroups / kWarpGroups;
constexpr int kLoads = kUnitsPerSlice * kRowBytes / 64, kLoadBytes = 64;  // of a row; four threads load 64 bytes

template <int kExperts, int kMaxSlices>  // kMaxSlices of a group
struct OneToken {
  static constexpr int kMaxHidden = kMaxSlices * kUnitsPerSlice * kGroups * kUnit;
  static constexpr int kPairs = (kExperts + 1) / 2;  // of experts
  static constexpr int kSharedBytes = kMaxSlices * kExperts * kGroups * 4;
  static constexpr int threads(int hidden) { return 32 * kHalves * slices_per_group(hidden); }
};

}  // namespace

template <typename Element, int kExperts, int kMaxSlices>
__global__ void __launch_bounds__((OneToken<kExperts, kMaxSlices>::threads(OneToken<kExperts, kMaxSlices>::kMaxHidden)))
    sm90_router_gemm_one_token(const Problem p) {
  using O = OneToken<kExperts, kMaxSlices>;
  extern __shared__ __align__(16) uint8_t shared[];
  float* const slice_sums = reinterpret_cast<float*>(shared);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const unsigned slice = warp / kHalves, group = warp % kHalves * kWarpGroups + g;
  const unsigned block_expert = blockIdx.y * kExperts;

  // Where this thread's loads begin in a row, and how many bytes of its slice lie from there on.
  const unsigned units = units_of(p.hidden), row_bytes = p.hidden * 2;
  const unsigned scaled = units * group;  // kGroups times the group's first unit
  const unsigned start = (scaled / kGroups + slice * kUnitsPerSlice) * kRowBytes, offset = start + t * 16;
  const int slice_bytes = int(min((scaled + units) / kGroups * kRowBytes, row_bytes) - start);
  const int left = slice_bytes - int(t * 16);
  const uint8_t* sources[kExperts + 1];  // x, then the weight's rows; experts past the end repeat the last
  sources[0] = static_cast<const uint8_t*>(p.x) + uint64_t(blockIdx.x) * row_bytes + offset;
#pragma unroll
  for (unsigned e = 0; e < kExperts; ++e) {
    const unsigned expert = kExperts == 1 ? block_expert : min(block_expert + e, p.experts - 1u);
    sources[e + 1] = static_cast<const uint8_t*>(p.weight) + uint64_t(expert) * row_bytes + offset;
  }
  grid_dependency_wait();
  uint4 rows[kLoads][kExperts + 1];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
#pragma unroll
    for (int operand = 0; operand <= kExperts; ++operand)
      rows[i][operand] = load_16_bytes(sources[operand] + i * kLoadBytes, left > i * kLoadBytes);
  }
  // Four threads per expert will sum up its groups.
  const float bias = threadIdx.x < 4 * kExperts ? load_bias<Element>(p, block_expert + lane / 4) : 0.f;

  float4 sums[O::kPairs] = {}, first_unit[O::kPairs];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    // Threads 0 and 1 of a quad loaded the halves of one step, 2 and 3 those of the next.
    uint2 steps[2][kExperts + 1];
#pragma unroll
    for (int operand = 0; operand <= kExperts; ++operand) {
      const uint4 v = rows[i][operand];
      const uint2 mine = make_uint2(v.x, v.y);
      const uint2 other = make_uint2(__shfl_xor_sync(~0u, v.z, 2), __shfl_xor_sync(~0u, v.w, 2));
      steps[0][operand] = t < 2 ? mine : other;
      steps[1][operand] = t < 2 ? other : mine;
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint2 x = steps[step][0];
#pragma unroll
      for (int pair = 0; pair < O::kPairs; ++pair) {
        const uint2 upper = steps[step][2 * pair + 1];
        const uint2 lower = steps[step][2 * pair + 1 < kExperts ? 2 * pair + 2 : 2 * pair + 1];
        mma_m16n8k16(sums[pair], {upper.x, lower.x, upper.y, lower.y}, x.x, x.y, Element());
      }
    }
    if (i + 1 == kLoads / kUnitsPerSlice) {
#pragma unroll
      for (int pair = 0; pair < O::kPairs; ++pair) first_unit[pair] = sums[pair];
    }
  }

  // The diagonal is column g of row g: one of the columns 2t and 2t + 1 of the thread with t = g / 2.
  if (t == g / 2) {
    // A slice without a second unit ends with the first, as in the other kernels, which add no zeros behind it.
    const bool whole = slice_bytes > kRowBytes;
    float* const mine = slice_sums + slice * kExperts * kGroups + group;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const float4 pair = whole ? sums[e / 2] : first_unit[e / 2];
      mine[e * kGroups] = e % 2 == 0 ? (g % 2 ? pair.y : pair.x) : (g % 2 ? pair.w : pair.z);
    }
  }
  __syncthreads();
  if (warp > 0) return;

  // One thread adds up the slices of four neighbouring groups, then four walk the binary tree.
  const float4* const quarters = reinterpret_cast<const float4*>(slice_sums) + lane % (4 * kExperts);
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

constexpr int kMostRegisters = 128;  // of a thread; the compiler uses fewer

template <int kExperts, int kMaxSlices>
constexpr Config config(const char* name, Cost cost) {
  using O = OneToken<kExperts, kMaxSlices>;
  return {.name = name,
          .block_tokens = 1,
          .block_experts = kExperts,
          .registers = kMostRegisters,
          .kernel = {reinterpret_cast<const void*>(&sm90_router_gemm_one_token<bfloat16, kExperts, kMaxSlices>),
                     reinterpret_cast<const void*>(&sm90_router_gemm_one_token<float16, kExperts, kMaxSlices>)},
          .threads = &O::threads,
          .shared_bytes = [](int) { return O::kSharedBytes; },
          .max_hidden = O::kMaxHidden,
          .max_tokens = 8,  // beyond, x would be read too often
          .cost = cost};
}

}  // namespace

const Config one_token_configs[kOneTokenConfigs] = {
    config<1, 4>("one_1x1", {1.412, 0, 0.002798, 0.1683}),
    config<2, 4>("one_1x2", {1.45, 0, 0.001485, 0.193}),
    config<3, 4>("one_1x3", {1.5, 0.000463, 0.003916, 0.1556}),
    config<4, 2>("one_1x4", {1.529, 0.6736, 0.00823, 0.1056}),
};

}  // namespace jax_router
