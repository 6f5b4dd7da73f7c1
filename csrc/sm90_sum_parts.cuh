// The top of the reduction tree across blocks that are no cluster: each leaves the sum of its own groups for its tile
// in the workspace, and the next launch adds them up: sm90_sum_parts.cu, or the one that routes. For tiles too many or
// too large for clusters, of which a GPU runs fewer than its multiprocessors make (120 blocks of 132 on an H200) and
// whose exchange is slow (sm90_cluster_sum.cuh).
//
// Workspace: float [kSplits][tokens][part_row], every element written by every launch.
#pragma once

#include "sm90_router_gemm.cuh"

namespace jax_router {

// Leaves a block's sum of one quad.
__device__ __forceinline__ void leave_part(const Problem& p, unsigned part, unsigned tile_token, unsigned tile_expert,
                                           unsigned lane, const float4& sum) {
  const unsigned token = tile_token + lane / 4, expert = tile_expert + lane % 4 * 2, row = unsigned(p.part_row);
  if (expert >= row) return;
  float* const to = p.parts + (uint64_t(part) * unsigned(p.tokens) + token) * row + expert;
  if (token < unsigned(p.tokens)) *reinterpret_cast<float2*>(to) = make_float2(sum.x, sum.y);
  if (token + 8 < unsigned(p.tokens)) *reinterpret_cast<float2*>(to + 8 * row) = make_float2(sum.z, sum.w);
}

// Four neighbouring logits of a token without the bias; `expert` is a multiple of four. After the dependency wait.
__device__ __forceinline__ float4 sum_parts(const Problem& p, unsigned token, unsigned expert) {
  const float* const first = p.parts + uint64_t(token) * unsigned(p.part_row) + expert;
  const uint64_t stride = uint64_t(unsigned(p.tokens)) * unsigned(p.part_row);
  float4 parts[kSplits];
#pragma unroll
  for (int part = 0; part < kSplits; ++part) parts[part] = *reinterpret_cast<const float4*>(first + part * stride);
  return tree_sum<kSplits>(0, [&](int part) { return parts[part]; });
}

}  // namespace jax_router
