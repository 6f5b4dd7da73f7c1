// Router GEMM for one token, a matrix-vector product: a block computes two or four logits alone, so nothing is
// exchanged between blocks. Up to eight tokens get blocks of
// their own.
//
// What limits it: latency. Every warp copies its share of K at once, 128 neighbouring bytes per eight lanes (a quarter
// of a row per four lanes takes half as long again), then come the eight steps of a slice, one barrier and a short
// tree.
//
// The tensor core multiplies slices instead of tokens: one k16 step of eight slices of two experts (rows 0-7 and 8-15
// of A) by the same slices of x (columns of B). The diagonal is what the tree needs; it costs nothing that the
// rest is computed too. A warp takes slice `i` of eight neighbouring groups.
//
// Work: grid.x = tokens, grid.y = expert tiles. Bytes: (experts + 1) * hidden * 2 per block. Shared memory: per warp,
// for every expert and for x, eight rows of one slice each, 16-byte chunk c of a unit of row r at c ^ r.
#include "sm90_router_gemm.cuh"

namespace jax_router {

namespace {

constexpr int kMaxSlices = 8;  // of a group: hidden up to 16384
constexpr int kMaxWarps = 2 * kMaxSlices;
constexpr int kSliceBytes = kUnitsPerSlice * kRowBytes;
constexpr int kOperandBytes = 8 * kSliceBytes;  // of a warp

constexpr int warps(int hidden) { return 2 * slices_per_group(hidden); }

}  // namespace

template <typename Element, int kExperts>
__global__ void __launch_bounds__(32 * kMaxWarps) sm90_router_gemm_one_token(const Problem p) {
  constexpr int kPairs = kExperts / 2;
  static_assert(kExperts % 2 == 0, "the tensor core takes two experts at a time");
  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int slice = warp / 2, first_group = warp % 2 * 8, slices = blockDim.x / 64;
  const int block_expert = blockIdx.y * kExperts;
  constexpr int kWarpBytes = (kExperts + 1) * kOperandBytes;
  const uint32_t stage = shared_address(shared) + warp * kWarpBytes;

  // Copy the warp's slices, zeros where they end early: unit by unit, four rows of one unit at a time.
  const unsigned units = units_of(p.hidden), row_bytes = p.hidden * 2, chunk = lane % 8;
  const uint8_t* sources[2]
                        [kExperts + 1];  // in the weight's rows and, last, in x; experts past the end repeat the last
  uint32_t destinations[2];
  int left[2];  // bytes of the slice from there on
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned row = half * 4 + lane / 8, group = first_group + row;
    const unsigned byte = (group_begin(units, group) + slice * kUnitsPerSlice) * kRowBytes + chunk * 16;
    left[half] = min(unsigned(group_begin(units, group + 1) * kRowBytes), row_bytes) - byte;
    destinations[half] = stage + row * kSliceBytes + (chunk ^ row) * 16;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const uint64_t expert_row = min(unsigned(block_expert + e), unsigned(p.experts - 1));
      sources[half][e] = static_cast<const uint8_t*>(p.weight) + expert_row * row_bytes + byte;
    }
    sources[half][kExperts] = static_cast<const uint8_t*>(p.x) + uint64_t(blockIdx.x) * row_bytes + byte;
  }
  grid_dependency_wait();
#pragma unroll
  for (int unit = 0; unit < kUnitsPerSlice; ++unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int operand = 0; operand <= kExperts; ++operand)
        copy_chunk(destinations[half] + operand * kOperandBytes + unit * kRowBytes,
                   sources[half][operand] + unit * kRowBytes, left[half] > unit * kRowBytes);
    }
    commit_chunks();
  }
  // Four threads per expert will sum up its groups.
  const int expert = threadIdx.x / 4, quarter = threadIdx.x % 4;
  const float bias = expert < kExperts ? load_bias<Element>(p, block_expert + expert) : 0.f;

  // Multiply.
  const int matrix = lane / 8, matrix_row = lane % 8;
  const auto chunk_address = [&](int operand, int unit, int chunk) {
    return stage + operand * kOperandBytes + matrix_row * kSliceBytes + unit * kRowBytes + (chunk ^ matrix_row) * 16;
  };
  float4 sums[kPairs] = {}, first_unit[kPairs];
#pragma unroll
  for (int unit = 0; unit < kUnitsPerSlice; ++unit) {
    if (unit == 0) {
      wait_chunks<1>();
    } else {
      wait_chunks<0>();
    }
    __syncwarp();
    uint32_t b[2][4], a[kPairs][4][4];  // of four k16 steps
#pragma unroll
    for (int k32 = 0; k32 < 2; ++k32) load_matrices(b[k32], chunk_address(kExperts, unit, k32 * 4 + matrix));
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int k16 = 0; k16 < 4; ++k16)
        load_matrices(a[pair][k16], chunk_address(2 * pair + matrix % 2, unit, k16 * 2 + matrix / 2));
    }
#pragma unroll
    for (int k16 = 0; k16 < 4; ++k16) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
        mma_m16n8k16(sums[pair], a[pair][k16], b[k16 / 2][k16 % 2 * 2], b[k16 / 2][k16 % 2 * 2 + 1], Element());
    }
    if (unit == 0) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) first_unit[pair] = sums[pair];
    }
  }

  // Sum up: one of four threads adds the slices of four neighbouring groups, then they walk the binary tree. A warp
  // leaves its sums, [expert][group], where its first rows were.
  const auto sums_of = [&](int warp, int expert) {
    return reinterpret_cast<float*>(shared + warp * kWarpBytes) + expert * 8;
  };
  __syncwarp();
  if (t == g / 2) {  // the diagonal is column g, of the quad's columns 2t and 2t + 1
    // A slice of one unit ends there: the other kernels do not add the zeros behind it either.
    const int group = first_group + g;
    const bool one_unit = group_begin(units, group + 1) - group_begin(units, group) - slice * kUnitsPerSlice < 2;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const float4 sum = one_unit ? first_unit[e / 2] : sums[e / 2];
      sums_of(warp, e)[g] = e % 2 == 0 ? (g % 2 ? sum.y : sum.x) : (g % 2 ? sum.w : sum.z);
    }
  }
  __syncthreads();
  if (warp > 0) return;
  float4 groups = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kMaxSlices; ++i) {
    if (i < slices)
      groups = groups +
               reinterpret_cast<const float4*>(sums_of(2 * i + quarter / 2, min(expert, kExperts - 1)))[quarter % 2];
  }
  float sum = (groups.x + groups.y) + (groups.z + groups.w);
#pragma unroll
  for (int neighbour = 1; neighbour < 4; neighbour *= 2) sum += __shfl_xor_sync(~0u, sum, neighbour);
  if (p.bias_dtype != JR_NONE) sum += bias;
  if (expert < kExperts && quarter == 0 && block_expert + expert < p.experts)
    store_one<Element>(p, int64_t(blockIdx.x) * p.experts + block_expert + expert, sum);
}

namespace {

template <int kExperts>
constexpr Config config(const char* name, Cost cost) {
  return {.name = name,
          .block_tokens = 1,
          .block_experts = kExperts,
          .registers = kRegisters / (32 * kMaxWarps),
          .kernel = {reinterpret_cast<const void*>(&sm90_router_gemm_one_token<bfloat16, kExperts>),
                     reinterpret_cast<const void*>(&sm90_router_gemm_one_token<float16, kExperts>)},
          .threads = [](int hidden) { return 32 * warps(hidden); },
          .shared_bytes = [](int hidden) { return warps(hidden) * (kExperts + 1) * kOperandBytes; },
          .max_hidden = kMaxSlices * kUnitsPerSlice * kGroups * kUnit,
          .max_tokens = 8,  // beyond, x would be read too often
          .cost = cost};
}

}  // namespace

const Config one_token_configs[kOneTokenConfigs] = {
    config<2>("one_1x2", {1.44, 0, 0, 0.1114}),
    config<4>("one_1x4", {1.424, 0, 0.00419, 0.1069}),
};

}  // namespace jax_router
