// PTX that CUDA C++ has no name for, one thin function each. Names follow the PTX ISA.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace jax_router {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// ---- Launch overlap: a kernel touches global memory, but for prefetching into L2, only after the wait, and a block
// lets the next grid start when it ends. So it is safe beside neighbours that were launched programmatically. The wait
// returns at once in a plain launch. Only a grid that is followed by another of the same call lets that one start
// earlier, after its own wait: the other's wait then covers both.

// Returns when all grids this one depends on have completed and their writes are visible.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next grid start once all blocks of this one got here or ended.
__device__ __forceinline__ void grid_launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- Warps ---------------------------------------------------------------------------------------------------------

// This thread's warp in the block, in a form the compiler knows to be the same for all lanes.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0); }

// The same value in all lanes, in a form the compiler knows to be uniform and does not work out again.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// Each lane's own value: worked out here, and not once it is needed.
__device__ __forceinline__ uint32_t settled(uint32_t value) {
  return __shfl_sync(0xFFFFFFFFu, value, threadIdx.x % 32);
}

// True in one lane of a converged warp. The compiler then issues copies without a loop over lanes.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

// 1 / value to one ulp, for values of at least 1.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// ---- Clusters and distributed shared memory -----------------------------------------------------------------------

// Arrives at the cluster's barrier and publishes nothing but barriers initialised before a barrier_init_fence(); to
// publish more costs a fence over the whole GPU.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same shared-memory offset in block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After a thread's barrier_init calls: shows them to the copy engine and, past a cluster barrier, to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until phase `phase` (0, 1, 2, ...) of `barrier` is complete; the phase must be the current one or the one
// before it. barrier_wait sees what this block and its copies did to complete it, barrier_wait_for_cluster what any
// block of the cluster did, and empties the multiprocessor's L1 cache.
#define JR_BARRIER_WAIT(NAME, SCOPE)                                           \
  __device__ __forceinline__ void NAME(uint32_t barrier, uint32_t phase) {     \
    uint32_t done;                                                             \
    do {                                                                       \
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire." SCOPE \
                   ".shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n" \
                   : "=r"(done)                                                \
                   : "r"(barrier), "r"(phase & 1)                              \
                   : "memory");                                                \
    } while (done == 0);                                                       \
  }
JR_BARRIER_WAIT(barrier_wait, "cta")
JR_BARRIER_WAIT(barrier_wait_for_cluster, "cluster")
#undef JR_BARRIER_WAIT

// Stores 16 bytes in another block's shared memory and counts them on that block's barrier.
__device__ __forceinline__ void store_remote_counted(uint32_t address, float4 value, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
      "r"(__float_as_uint(value.w)), "r"(barrier)
      : "memory");
}

// Copies `bytes` (a multiple of 16) from this block's shared memory to another block's and counts them on that block's
// barrier. One thread; its source was written before a fence_for_copies() and a barrier, and stays until it arrived.
__device__ __forceinline__ void copy_to_remote(uint32_t address, uint32_t source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}
// Shows what this thread wrote to shared memory to the copy engine.
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for `threads` threads (whole warps) at the block's barrier `index`, 1 to 15.
__device__ __forceinline__ void named_barrier(int index, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(threads) : "memory");
}

// Counts this thread in at the block's barrier `index` without waiting.
__device__ __forceinline__ void named_barrier_arrive(int index, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(index), "r"(threads) : "memory");
}

// ---- Loads and copies ---------------------------------------------------------------------------------------------

// 16 bytes past L1. Not through the read-only path: a predecessor may write them while this grid already runs.
__device__ __forceinline__ uint4 load_streamed(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer)
               : "memory");
  return v;
}

// Copies the 16 bytes that lie kOffset behind `source` to shared memory past L1, or writes zeros. Of one thread's
// copies, all but the last kPending commits have come when wait_for_copies returns.
template <int kOffset>
__device__ __forceinline__ void copy_16_bytes(uint32_t destination, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1 + %3], 16, %2;" ::"r"(destination), "l"(source),
               "r"(exists ? 16 : 0), "n"(kOffset)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Stores a float in shared memory, or nothing: predicated, where the compiler would branch.
__device__ __forceinline__ void store_shared(uint32_t address, float value, bool exists) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p st.shared.f32 [%0], %1;\n}\n" ::"r"(address), "f"(value),
               "r"(int(exists))
               : "memory");
}

// The copy engine's description of a matrix; a kernel parameter, so no predecessor writes it.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies one box of `map` at (element, row) to shared memory and counts its bytes on `barrier`. One thread.
__device__ __forceinline__ void copy_box(uint32_t destination, const CUtensorMap& map, int element, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(destination),
      "l"(&map), "r"(element), "r"(row), "r"(barrier)
      : "memory");
}

// Brings one box of `map` into L2, the point of coherence: allowed before the dependency wait. One thread.
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, int element, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(element), "r"(row)
               : "memory");
}

// Four 8x8 matrices of two-byte elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed_matrices(uint32_t (&d)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address)
               : "memory");
}

__device__ __forceinline__ float load_shared_float(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

// Both rounded to the nearest bfloat16, x in the low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float2 v) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
  return pair;
}

// ---- mma.sync m16n8k16: d = a[16, 16] @ b[8, 16].T + c in float32, e.g. 16 tokens x 8 experts -----------------------

#define JR_MMA(ELEMENT, TYPE)                                                                                  \
  __device__ __forceinline__ void mma_m16n8k16(float4& d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,    \
                                               const float4& c, ELEMENT) {                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                        \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                              \
                 : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w)                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), \
                   "f"(c.w));                                                                                  \
  }
JR_MMA(bfloat16, "bf16")
JR_MMA(float16, "f16")
#undef JR_MMA

}  // namespace jax_router
