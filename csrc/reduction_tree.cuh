// The one statement of the order in which every kernel adds up K. A token's bits depend on nothing but the token
// because all kernels, for any number of tokens, walk this tree, which depends on the hidden size alone:
//
//   unit    64 elements of K, four MMA steps of k16 in ascending K.
//   slice   up to two units, accumulated by the tensor core from zero. Short, because the tensor core truncates: eight
//           steps lose at most a few ulps of the slice, a chain of hundreds drifts. With float32 weights it is one unit
//           and the sum of what sm90_float32.cuh says.
//   group   one of 16 runs of units; group sum = ((0 + slice 0) + slice 1) + ... in float32, round to nearest.
//   total   a balanced binary tree over the groups, neighbours first: ((g0 + g1) + (g2 + g3)) + ...; then the bias.
//
// The binary tree lets the blocks of a cluster, up to 8, share one output tile and send one number each per output.
// Empty groups and slices add +0, which changes nothing because no sum here is ever -0.
#pragma once

namespace jax_router {

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

constexpr int kUnit = 64;  // elements of K
constexpr int kUnitsPerSlice = 2;
constexpr int kGroups = 16;
constexpr int kMaxHidden = 65536;

// Sizes are not negative: unsigned divisions spare the instructions that round negative ones.
__host__ __device__ constexpr int ceil_div(int a, int b) { return int((unsigned(a) + unsigned(b) - 1) / unsigned(b)); }
__host__ __device__ constexpr int log2_of(int power_of_two) {
  return power_of_two < 2 ? 0 : 1 + log2_of(power_of_two / 2);
}
constexpr int min_of(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int units_of(int hidden) { return ceil_div(hidden, kUnit); }

// First unit of a group; group_begin(kGroups) is the end of the last one.
__host__ __device__ constexpr int group_begin(int units, int group) { return int(unsigned(group * units) / kGroups); }

// ((node 0 + node 1) + (node 2 + node 3)) + ... of `kCount` neighbouring nodes; value(i) is node i.
template <int kCount, typename Value>
__device__ __forceinline__ auto tree_sum(int first, const Value& value) {
  if constexpr (kCount == 1) {
    return value(first);
  } else {
    const auto left = tree_sum<kCount / 2>(first, value);
    return left + tree_sum<kCount / 2>(first + kCount / 2, value);
  }
}

// The most slices any group of this hidden size has.
__host__ __device__ constexpr int slices_per_group(int hidden) {
  return ceil_div(ceil_div(units_of(hidden), kGroups), kUnitsPerSlice);
}

}  // namespace jax_router
