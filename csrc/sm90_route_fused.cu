// Routing in one launch, for few tokens: a cluster of 16 blocks takes 16 tokens and all experts. Every block multiplies
// one group of K and sends its part of a token's logits to the block that owns the token, where a warp of its own adds
// them up in the order of the tree and routes the token (sm90_route.cuh).
//
// What limits it: the bytes one multiprocessor can pull, because 16 of them read all weights; then latency. So all of a
// block's copies are in flight as soon as its shared memory takes them, and nothing waits for anything but its own
// copies: the warps of a block share its tokens' x, which comes first, and each copies the weights of its own experts
// and slices, two units ahead.
//
// Work: grid.x = 16 * token tiles; blockIdx.x % 16 is the block's rank, its group and the token of the tile that it
// owns. Bytes: (tokens + experts) * hidden / 16 * 2 per block. Warps: kSlots slices of the group by kColumns parts of
// the experts. Shared memory: per warp a ring of two units of weights, in rows of 128 bytes, chunk c of row r at
// c ^ (r % 8); x likewise, [unit][token]; slice sums [slice][token][expert]; what the owner receives, [block][expert].
#include "sm90_route_kernels.cuh"

namespace jax_router {

namespace {

constexpr int kCluster = kGroups;                                               // one group per block
constexpr int kSlots = 2, kColumns = 8, kMultipliers = 32 * kSlots * kColumns;  // threads that multiply
constexpr int kThreads = kMultipliers + 32;                                     // and the warp that routes
constexpr int kAllOfX = 1, kAllSums = 2;                                        // named barriers of the multipliers
constexpr int kRingUnits = 2;
constexpr int kRowsPerCopy = 4;  // lane i copies chunk i % 8 of row i / 8

template <typename Element, int kExpertTiles, int kScore, bool kPlain>
struct Fused {
  static constexpr int kWarpExperts = kExpertTiles * kTileExperts, kExperts = kColumns * kWarpExperts;
  static constexpr int kPerLane = kExperts / 32;
  static_assert(logits_per_lane(kExperts) == kPerLane, "as the other kernels that route these experts");
  static constexpr int kXUnitBytes = kTileTokens * kRowBytes, kWeightUnitBytes = kWarpExperts * kRowBytes;
  static constexpr int kSumRow = kExperts + 8;  // floats: rows 8 banks apart
  using Router = TokenRouter<kPerLane, kScore, kPlain>;

  // Shared memory, in this order.
  static constexpr int kRingBytes = kSlots * kColumns * kRingUnits * kWeightUnitBytes;
  static __host__ __device__ constexpr int x_bytes(int hidden) {
    return ceil_div(units_of(hidden), kGroups) * kXUnitBytes;
  }
  static __host__ __device__ constexpr int sum_bytes(int hidden) {
    return slices_per_group(hidden) * kTileTokens * kSumRow * 4;
  }
  struct alignas(16) Last {
    float received[kCluster][kExperts];
    typename Router::Scratch scratch;
    uint64_t all_received;
  };
  static constexpr int shared_bytes(int hidden) {
    return kRingBytes + x_bytes(hidden) + sum_bytes(hidden) + int(sizeof(Last));
  }
};

}  // namespace

template <typename Element, int kExpertTiles, int kScore, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) sm90_route_fused(const RoutedProblem routed) {
  using F = Fused<Element, kExpertTiles, kScore, kPlain>;
  const Problem& p = routed.problem;
  const unsigned lane = threadIdx.x % 32, warp = uniform_warp(), slot = warp / kColumns, column = warp % kColumns;
  const unsigned rank = blockIdx.x % kCluster, block_token = blockIdx.x / kCluster * kTileTokens;
  const unsigned tokens = min(unsigned(p.tokens) - block_token, unsigned(kTileTokens));
  const unsigned units = units_of(p.hidden), first_unit = group_begin(units, rank);
  const unsigned block_units = group_begin(units, rank + 1) - first_unit;
  const unsigned slices = slices_per_group(p.hidden);

  extern __shared__ __align__(kSwizzleAlignment) uint8_t shared[];
  uint8_t* const x_shared = shared + F::kRingBytes;
  float* const slice_sums = reinterpret_cast<float*>(x_shared + F::x_bytes(p.hidden));
  typename F::Last& last =
      *reinterpret_cast<typename F::Last*>(reinterpret_cast<uint8_t*>(slice_sums) + F::sum_bytes(p.hidden));
  const uint32_t ring = uniform(shared_address(shared) + warp * kRingUnits * F::kWeightUnitBytes);
  const uint32_t x_stage = uniform(shared_address(x_shared)), all_received = shared_address(&last.all_received);

  if (warp == kSlots * kColumns) {
    // The warp that routes.
    const bool owns = rank < tokens;
    if (owns && elect_one()) {
      barrier_init(all_received, 1);
      barrier_init_fence();
      barrier_arrive_expect_bytes(all_received, kCluster * ceil_div(p.experts, 4) * 16);
    }
    __syncwarp();
    cluster_arrive_relaxed();
    grid_dependency_wait();
    typename F::Router router(lane);
    PerExpert<F::kPerLane> bias;
    if (owns) {
      router.fetch(p, routed.routing);
      bias.load(p.bias, p.bias_dtype, p.experts, lane);
    }
    cluster_wait();
    if (!owns) return;
    barrier_wait_for_cluster(all_received, 0);
    float logits[F::kPerLane];
    constexpr int kWidth = F::kPerLane % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int j = 0; j < F::kPerLane; j += kWidth) {
      const float4 total = tree_sum<kCluster>(0, [&](int block) {
        const float* const part = &last.received[block][lane * F::kPerLane + j];
        if constexpr (kWidth == 4) return *reinterpret_cast<const float4*>(part);
        return make_float4(part[0], part[1], 0.f, 0.f);
      });
      const float values[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        logits[j + i] = p.bias_dtype == JR_NONE ? values[i] : values[i] + bias.value(j + i, p.bias_dtype);
      }
    }
    if (routed.routing.logits != nullptr) store_logits(p, routed.routing.logits, block_token + rank, lane, logits);
    router.route(p, routed.routing, block_token + rank, logits, last.scratch);
    return;
  }

  const unsigned row = lane / 8, chunk = lane % 8, row_bytes = p.hidden * 2;
  const uint32_t place = row * kRowBytes + (chunk ^ row) * 16;  // of the first row; four rows on, the chunk is another
  const unsigned warp_expert = column * F::kWarpExperts;
  const uint8_t* const weight = static_cast<const uint8_t*>(p.weight) + uint64_t(warp_expert + row) * row_bytes;
  const int weight_rows = p.experts - int(warp_expert + row);
  // The units of this warp: those of its slices, in ascending order. Unit i of them is unit unit_of(i) of the group.
  const auto unit_of = [&](unsigned i) {
    return (i / kUnitsPerSlice * kSlots + slot) * kUnitsPerSlice + i % kUnitsPerSlice;
  };
  const auto copy_weights = [&](unsigned i) {
    const unsigned unit = unit_of(i);
    if (unit < block_units) {
      const unsigned offset = (first_unit + unit) * kRowBytes + chunk * 16;
#pragma unroll
      for (int rows = 0; rows < F::kWarpExperts; rows += kRowsPerCopy)
        copy_16_bytes<0>(ring + i % kRingUnits * F::kWeightUnitBytes + rows * kRowBytes + (place ^ rows % 8 * 16),
                         weight + rows * row_bytes + offset, offset < row_bytes && rows < weight_rows);
    }
    commit_copies();
  };
  grid_dependency_wait();

  // x of the block: warp w copies four rows of unit w / 4, w / 4 + 4, ... Rows of tokens that do not exist stay as they
  // are: they have logits of their own, which nobody uses.
  const unsigned x_row = warp % 4 * kRowsPerCopy + row;
  if (warp % 4 * kRowsPerCopy < tokens) {
    const uint8_t* const x = static_cast<const uint8_t*>(p.x) + uint64_t(block_token + x_row) * row_bytes;
    for (unsigned unit = warp / 4; unit < block_units; unit += kSlots * kColumns / 4) {
      const unsigned offset = (first_unit + unit) * kRowBytes + chunk * 16;
      copy_16_bytes<0>(x_stage + unit * F::kXUnitBytes + x_row * kRowBytes + (chunk ^ x_row % 8) * 16, x + offset,
                       offset < row_bytes && x_row < tokens);
    }
  }
  commit_copies();
  copy_weights(0);
  copy_weights(1);

  cluster_arrive_relaxed();

  wait_for_copies<2>();
  named_barrier(kAllOfX, kMultipliers);

  // Lane i addresses row i % 8 of matrix i / 8: tokens (in eights) and chunks of x, experts and chunks of weight.
  const uint32_t matrix = lane / 8, matrix_row = lane % 8, a_row = matrix % 2 * 8 + matrix_row;
  const uint32_t a_place = a_row * kRowBytes + (matrix / 2 ^ matrix_row) * 16;
  const uint32_t b_place = matrix_row * kRowBytes + (matrix ^ matrix_row) * 16;
  for (unsigned slice = slot; slice < slices; slice += kSlots) {
    float4 sums[kExpertTiles] = {};
    const unsigned before = slice / kSlots * kUnitsPerSlice;
#pragma unroll
    for (unsigned i = 0; i < kUnitsPerSlice; ++i) {
      wait_for_copies<1>();
      __syncwarp();
      const unsigned unit = slice * kUnitsPerSlice + i;
      if (unit < block_units) {
        const uint32_t x_unit = x_stage + unit * F::kXUnitBytes + a_place;
        const uint32_t weight_unit = ring + i * F::kWeightUnitBytes + b_place;
#pragma unroll
        for (int k32 = 0; k32 < kUnit / 32; ++k32) {
          uint32_t a[2][4];
          load_matrices(a[0], x_unit ^ k32 * 64);
          load_matrices(a[1], x_unit ^ (k32 * 64 + 32));
#pragma unroll
          for (int n = 0; n < kExpertTiles; ++n) {
            uint32_t b[4];
            load_matrices(b, (weight_unit ^ k32 * 64) + n * kTileExperts * kRowBytes);
            mma_m16n8k16(sums[n], a[0], b[0], b[1], sums[n], Element());
            mma_m16n8k16(sums[n], a[1], b[2], b[3], sums[n], Element());
          }
        }
        __syncwarp();  // the unit has been read
      }
      copy_weights(before + i + kRingUnits);
    }
    float* const out = slice_sums + (slice * kTileTokens + lane / 4) * F::kSumRow + warp_expert + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kExpertTiles; ++n) {
      *reinterpret_cast<float2*>(out + n * kTileExperts) = make_float2(sums[n].x, sums[n].y);
      *reinterpret_cast<float2*>(out + 8 * F::kSumRow + n * kTileExperts) = make_float2(sums[n].z, sums[n].w);
    }
  }
  wait_for_copies<0>();
  cluster_wait();
  named_barrier(kAllSums, kMultipliers);

  // The group: slices in ascending order, four experts of a token at a time, and away to the token's owner.
  const unsigned quads = ceil_div(p.experts, 4);
  for (unsigned i = threadIdx.x; i < tokens * (F::kExperts / 4); i += kMultipliers) {
    const unsigned token = i / (F::kExperts / 4), quad = i % (F::kExperts / 4);
    if (quad >= quads) continue;
    float4 group = {};
    for (unsigned slice = 0; slice < slices; ++slice)
      group =
          group + *reinterpret_cast<const float4*>(slice_sums + (slice * kTileTokens + token) * F::kSumRow + quad * 4);
    store_remote_counted(remote_address(shared_address(&last.received[rank][quad * 4]), token), group,
                         remote_address(all_received, token));
  }
}

namespace {

template <int kExpertTiles>
constexpr FusedConfig config(const char* name) {
  using F = Fused<bfloat16, kExpertTiles, JR_SOFTMAX, true>;
  FusedConfig fused = {.name = name,
                       .block_tokens = kTileTokens,
                       .block_experts = F::kExperts,
                       .cluster = kCluster,
                       .kernel = {},
                       .threads = kThreads,
                       .shared_bytes = &F::shared_bytes};
  const auto add = [&]<typename Element>(Element) {
    list_kinds(fused.kernel[std::is_same_v<Element, bfloat16> ? JR_BFLOAT16 : JR_FLOAT16],
               []<int kScore, bool kPlain>(std::integral_constant<int, kScore>, std::bool_constant<kPlain>) {
                 return reinterpret_cast<const void*>(&sm90_route_fused<Element, kExpertTiles, kScore, kPlain>);
               });
  };
  add(bfloat16{});
  add(float16{});
  return fused;
}

}  // namespace

const FusedConfig fused_configs[kFusedConfigs] = {
    config<1>("fused_16x64_c16"),
    config<2>("fused_16x128_c16"),
    config<4>("fused_16x256_c16"),
};

}  // namespace jax_router
