// Router GEMM with float32 weights for one token or a few, x in bfloat16 or float32: a block computes one or two
// experts' logits with all of K, so nothing is exchanged between blocks. The counterpart of
// sm90_router_gemm_one_token.cu.
//
// What limits it: latency, and the bytes of the weights. So every thread has all of its copies in flight at once, each
// instruction asks for four whole lines, and a warp waits for nothing but its own copies, in two halves of every unit;
// then come the products of a slice, with x in float32 a chain of twenty, one barrier and a short tree.
//
// The tensor core multiplies slices, which are units here: one k16 step of eight units of one or two experts (rows 0-7
// and 8-15 of A) by the same units of a token (columns of B). The diagonal is what the tree needs. A warp takes eight
// neighbouring units of all the block's experts and tokens.
//
// Work: grid.x = token tiles, grid.y = expert tiles. Bytes: (experts * 4 + tokens * bytes of x) * hidden per block.
// Shared memory: the unit sums [token][expert][unit]; per warp eight rows for every expert and every token, a unit
// each: of float32 as in sm90_float32.cuh, of bfloat16 128 bytes, chunk c of row r at c ^ r.
#include <type_traits>

#include "sm90_float32.cuh"
#include "sm90_router_gemm.cuh"

namespace jax_router {

namespace {

constexpr int kWarpUnits = 8, kMaxWarps = 16, kMaxUnits = kMaxWarps * kWarpUnits;
constexpr int kMaxUnitsOfGroup = kMaxUnits / kGroups;
constexpr int kLineBytes = 128, kCopiedRows = 4;  // rows that one instruction of a warp copies a line of
constexpr int kWarpLogits = 32 / kGroups;         // that a warp adds up at a time

template <typename X, int kTokens, int kExperts>
struct OneToken {
  static_assert(kExperts <= 2, "rows of an MMA");
  static constexpr int kXRowBytes = kUnit * int(sizeof(X)), kXBytes = kWarpUnits * kXRowBytes;  // of a token and warp
  static constexpr int kWeightBytes = kWarpUnits * kFloatRowBytes;                              // of an expert and warp
  static constexpr int kWarpBytes = kExperts * kWeightBytes + kTokens * kXBytes;
  static constexpr int kLogits = kTokens * kExperts, kPasses = ceil_div(kLogits, kWarpLogits);
  static constexpr int kPitch = kMaxUnits + 1;  // of the sums of two logits, so that they lie in different banks
  static constexpr int kSumBytes = ceil_div(kLogits * kPitch * 4, kFloatRowBytes) * kFloatRowBytes;
  static constexpr int warps(int hidden) { return ceil_div(units_of(hidden), kWarpUnits); }
};

}  // namespace

template <typename X, int kTokens, int kExperts>
__global__ void __launch_bounds__(32 * kMaxWarps) sm90_router_gemm_float32_one_token(const Problem p) {
  using O = OneToken<X, kTokens, kExperts>;
  constexpr bool kFloatX = std::is_same_v<X, float>;
  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const unsigned block_token = blockIdx.x * kTokens, block_expert = blockIdx.y * kExperts;
  const unsigned units = units_of(p.hidden);
  const uint32_t sums_base = shared_address(shared), weights = sums_base + O::kSumBytes + warp * O::kWarpBytes;
  const uint32_t xs = weights + kExperts * O::kWeightBytes;

  // Lane i copies chunk i % 8 of lines of rows i / 8 and i / 8 + 4.
  const unsigned row = lane / 8, chunk = lane % 8;
  const uint32_t float_place = row * kFloatRowBytes + (chunk ^ row * 2) * 16;
  const unsigned float_offset = warp * O::kWeightBytes + row * kFloatRowBytes + chunk * 16;
  const int float_left = p.hidden * 4 - int(float_offset);  // bytes of a row of the matrix from there on
  const auto copy_float_lines = [&]<int kNumber>(uint32_t to, const uint8_t* from, bool exists,
                                                 std::integral_constant<int, kNumber>) {
    const auto copy = [&]<int kRows>(std::integral_constant<int, kRows>) {
      constexpr int kOffset = kRows * kFloatRowBytes + kNumber * kLineBytes;
      copy_16_bytes<kOffset>(to + float_place + kOffset, from, exists && float_left > kOffset);
    };
    copy(std::integral_constant<int, 0>());
    copy(std::integral_constant<int, kCopiedRows>());
  };
  const uint64_t row_bytes = uint64_t(p.hidden) * 4;
  const uint8_t* of_expert[kExperts];  // experts past the end repeat the last
#pragma unroll
  for (unsigned e = 0; e < kExperts; ++e)
    of_expert[e] =
        static_cast<const uint8_t*>(p.weight) + min(block_expert + e, p.experts - 1u) * row_bytes + float_offset;
  const uint32_t x_place = row * O::kXRowBytes + (chunk ^ row) * 16;  // of bfloat16; four rows on, the chunk is another
  const unsigned x_offset = kFloatX ? float_offset : warp * O::kXBytes + row * O::kXRowBytes + chunk * 16;
  const int x_left = p.hidden * int(sizeof(X)) - int(x_offset);
  const uint8_t* const x = static_cast<const uint8_t*>(p.x) + uint64_t(block_token) * p.hidden * sizeof(X) + x_offset;
  grid_dependency_wait();
  const auto copy_half = [&]<int kNumber>(std::integral_constant<int, kNumber> half) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const bool exists = token == 0 || block_token + token < unsigned(p.tokens);
      const uint8_t* const from = x + uint64_t(token) * p.hidden * sizeof(X);
      if constexpr (kFloatX) {
        copy_float_lines(xs + token * O::kXBytes, from, exists, half);
      } else if constexpr (kNumber == 0) {
        const uint32_t to = xs + token * O::kXBytes;
        constexpr int kOffset = kCopiedRows * O::kXRowBytes;
        copy_16_bytes<0>(to + x_place, from, exists && x_left > 0);
        copy_16_bytes<kOffset>(to + (x_place ^ kCopiedRows * 16) + kOffset, from, exists && x_left > kOffset);
      }
    }
#pragma unroll
    for (int e = 0; e < kExperts; ++e) copy_float_lines(weights + e * O::kWeightBytes, of_expert[e], true, half);
    commit_copies();
  };
  copy_half(std::integral_constant<int, 0>());
  copy_half(std::integral_constant<int, 1>());
  if (p.followed) grid_launch_next();

  // Meanwhile: what else a thread needs to know, and then the bias, whose branch keeps the compiler from working that
  // out where the sums wait for it. The diagonal is column g of row g: one of the columns 2t and 2t + 1 of the thread
  // with t = g / 2. Of x in bfloat16 lane i addresses row i % 8 of matrix i / 8: chunks. Behind the barrier half a warp
  // adds up a logit, a group per lane.
  constexpr uint32_t kDiagonal = 1, kOddColumn = 2;
  const uint32_t is = settled((t == g / 2 ? kDiagonal : 0) | (g % 2 ? kOddColumn : 0));
  const uint32_t mine = settled(sums_base + (warp * kWarpUnits + g) * 4);
  const uint32_t weight_pair = settled(pair_of(weights, lane));
  const uint32_t x_chunk =
      settled(kFloatX ? pair_of(xs, lane) : xs + lane % 8 * O::kXRowBytes + (lane / 8 ^ lane % 8) * 16);
  const unsigned group = lane % kGroups, begin = group_begin(units, group);
  const uint32_t first_of_group = settled(sums_base + begin * 4);
  const uint32_t units_of_group = settled(group_begin(units, group + 1) - begin);
  const unsigned expert = block_expert + lane / kGroups % kExperts;
  const float bias = warp < O::kPasses ? load_bias<bfloat16>(p, expert) : 0.f;  // or float32, for any x

  SliceSum sums[kTokens] = {};
  const auto multiply_half = [&](int half) {
    uint32_t matrices[kTokens][4];  // of bfloat16: both steps
#pragma unroll
    for (int token = 0; !kFloatX && token < kTokens; ++token)
      load_matrices(matrices[token], (x_chunk ^ half * 64) + token * O::kXBytes);
#pragma unroll
    for (int step = half * 2; step < half * 2 + 2; ++step) {
      Fragment<float, 4> weight = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i % 2 < kExperts)
          weight.set(i, load_shared_float2((weight_pair ^ (step * kStep + i / 2 * kHalf)) + i % 2 * O::kWeightBytes));
      }
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        Fragment<X, 2> of_token;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (kFloatX) {
            of_token.set(i, load_shared_float2((x_chunk ^ (step * kStep + i * kHalf)) + token * O::kXBytes));
          } else {
            of_token.terms[0][i] = matrices[token][step % 2 * 2 + i];
          }
        }
        sums[token].multiply(of_token, weight);
      }
    }
  };
  wait_for_copies<1>();
  __syncwarp();
  multiply_half(0);
  wait_for_copies<0>();
  __syncwarp();
  multiply_half(1);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float4 total = sums[token].total();
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const float sum = e == 0 ? (is & kOddColumn ? total.y : total.x) : (is & kOddColumn ? total.w : total.z);
      store_shared(mine + (token * kExperts + e) * O::kPitch * 4, sum, is & kDiagonal);
    }
  }
  __syncthreads();

  for (unsigned pass = warp; pass < O::kPasses; pass += blockDim.x / 32) {
    const unsigned logit = pass * kWarpLogits + lane / kGroups, token = block_token + logit / kExperts;
    const uint32_t unit_sums = first_of_group + min(logit, O::kLogits - 1u) * O::kPitch * 4;
    float of_unit[kMaxUnitsOfGroup], sum = 0.f;
#pragma unroll
    for (unsigned i = 0; i < kMaxUnitsOfGroup; ++i) {
      if (i < units_of_group) of_unit[i] = load_shared_float(unit_sums + i * 4);
    }
#pragma unroll
    for (unsigned i = 0; i < kMaxUnitsOfGroup; ++i) {
      if (i < units_of_group) sum += of_unit[i];
    }
#pragma unroll
    for (int neighbour = 1; neighbour < kGroups; neighbour *= 2) sum += __shfl_xor_sync(~0u, sum, neighbour);
    if (group == 0 && logit < O::kLogits && token < unsigned(p.tokens) && expert < unsigned(p.experts))
      store_one<X>(p, uint64_t(token) * p.experts + expert, sum + bias);
    if (O::kPasses == 1) break;
  }
}

namespace {

template <typename X, int kTokens, int kExperts>
constexpr Config config(const char* name, Cost cost) {
  using O = OneToken<X, kTokens, kExperts>;
  constexpr int kOperands = std::is_same_v<X, float> ? int(JR_FLOAT32) : kFloat32Weight;
  Config one = {.name = name,
                .block_tokens = kTokens,
                .block_experts = kExperts,
                .registers = kTokens <= 2 ? 64 : 88,  // at most
                .kernel = {},
                .threads = [](int hidden) { return 32 * O::warps(hidden); },
                .shared_bytes = [](int hidden) { return O::kSumBytes + O::warps(hidden) * O::kWarpBytes; },
                .max_hidden = kMaxUnits * kUnit,
                .max_tokens = 8,  // beyond, the weights would be read too often
                .cost = {cost}};
  one.kernel[JR_EXPERTS_HIDDEN][kOperands] =
      reinterpret_cast<const void*>(&sm90_router_gemm_float32_one_token<X, kTokens, kExperts>);
  return one;
}

}  // namespace

const Config float32_one_token_configs[kFloat32OneTokenConfigs] = {
    config<bfloat16, 1, 1>("float32_weight_one_1x1", {1.73, 0.071, 0.00821, 0.0886}),
    config<bfloat16, 2, 2>("float32_weight_one_2x2", {1.33, 0.0491, 0.026, 0.0599}),
    config<float, 1, 1>("float32_one_1x1", {1.78, 0.048, 0.0062, 0.126}),
    config<float, 2, 2>("float32_one_2x2", {2.4, 0.749, 0.00355, 0.07}),
    config<float, 4, 2>("float32_one_4x2", {2.8, 0.23, 0.00888, 0.0539}),
};

}  // namespace jax_router
