// CUDA on a CPU, as far as the kernels in csrc need it. A block is an OS thread and its CUDA threads are fibers on it,
// so `__shared__` is thread_local; the blocks of a cluster run side by side. Nothing is asynchronous but the copies:
// they happen when every fiber of the block waits, which is the latest a correct kernel can bear. What it cannot show:
// memory order and everything that depends on time.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

// ---- The language --------------------------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = __float_as_uint(v);
  return {uint16_t(v != v ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
// By hand: where the CPU is not known to have an instruction for it, the compiler calls a slow function.
inline float __half2float(__half v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, moved = (v.bits & 0x7FFFu) << 13, infinity = 0x7C00u << 13;
  const uint32_t finite = __float_as_uint(__uint_as_float(moved) * 0x1p112f);  // 2^(127 - 15) for the exponent's bias
  const uint32_t special = 0x7F800000u | moved | (moved > infinity) << 22;     // a NaN becomes a quiet one
  return __uint_as_float(sign | (moved < infinity ? finite : special));
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline __half __float2half_rn(float v) {
  const _Float16 value = _Float16(v);
  __half result;
  memcpy(&result, &value, 2);
  return result;
}

// ---- Blocks and fibers ---------------------------------------------------------------------------------------------

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s\n", what);
  _Exit(3);
}

constexpr size_t kSharedBytes = 232448, kStackBytes = 256 << 10;

struct Barrier {  // of threads of one block
  int expected = 0, arrived = 0, generation = 0;
  int arrive() {
    const int mine = generation;
    if (++arrived == expected) arrived = 0, ++generation;
    return mine;
  }
};

struct MBarrier {
  int expected = 0, pending = 0, completed = 0;
  int64_t bytes = 0;
  void settle() {
    if (pending == 0 && bytes == 0) ++completed, pending = expected;
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf waiting;
  bool started = false;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready;  // empty: it can run
  int cluster_generation = 0;
  std::vector<std::function<void()>> copies;  // cp.async, not yet committed
  std::deque<std::vector<std::function<void()>>> committed;
  bool done = false;
};

struct Warp {
  Barrier barrier{32};
  uint64_t slots[32][4];
};

struct Block {
  int rank;
  uint8_t* shared = nullptr;  // known from the first shared_address() on
  Barrier everyone;
  std::map<int, Barrier> named;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::deque<std::function<void()>> copies;  // of the copy engine, in flight
  std::mutex mutex;                          // of what other blocks of the cluster reach
  std::map<uint32_t, MBarrier> barriers;
  jmp_buf scheduler;
  Fiber* current = nullptr;
};

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes;
  unsigned cluster;
  std::function<void()> kernel;
  std::vector<Block>* running;  // the cluster
  std::atomic<unsigned> arrived = 0, generation = 0;
  struct Matrix {
    const uint8_t* data;
    int64_t bytes;
  };
  Matrix x, weight;  // what copies may read

  bool reads(const uint8_t* from, int64_t bytes) const {
    const auto holds = [=](const Matrix& m) { return from >= m.data && from + bytes <= m.data + m.bytes; };
    return holds(x) || holds(weight);
  }
};

inline Grid* grid = nullptr;
inline thread_local Block* block = nullptr;

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Other fibers run until `ready`.
inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  const dim3 mine = threadIdx;
  Fiber& fiber = *block->current;
  fiber.ready = std::move(ready);
  if (_setjmp(fiber.waiting) == 0) _longjmp(block->scheduler, 1);
  threadIdx = mine;
}
inline void meet(Barrier& barrier) {
  const int mine = barrier.arrive();
  wait_until([&barrier, mine] { return barrier.generation != mine; });
}
inline Warp& warp() { return block->warps[threadIdx.x / 32]; }
inline unsigned lane() { return threadIdx.x % 32; }

// Every lane gives a value and sees those of all others until `use` returns.
template <typename Use>
inline auto exchange(const void* value, size_t bytes, const Use& use) {
  Warp& w = warp();
  memcpy(w.slots[lane()], value, bytes);
  meet(w.barrier);
  auto result = use(w.slots);
  meet(w.barrier);
  return result;
}

inline void fiber_main() {
  grid->kernel();
  if (!block->current->copies.empty() || !block->current->committed.empty()) fail("copies that nobody waited for");
  block->current->done = true;
  _longjmp(block->scheduler, 1);
}

// Runs the current fiber until it waits or is done. swapcontext would ask the kernel for the signal mask every time.
inline void resume(Block& b) {
  if (_setjmp(b.scheduler) != 0) return;
  if (b.current->started) _longjmp(b.current->waiting, 1);
  b.current->started = true;
  setcontext(&b.current->start);
}

inline void run_block(Block& b) {
  block = &b;
  const unsigned threads = grid->threads.x;
  b.everyone.expected = int(threads);
  b.warps.resize(threads / 32);
  b.fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : b.fibers) {
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.start);
    fiber.start.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  for (unsigned left = threads, idle = 0; left > 0;) {
    bool progress = false;
    for (unsigned turn = 0; turn < threads; ++turn) {
      const unsigned i = (blockIdx.x + blockIdx.y) % 2 == 0 ? turn : threads - 1 - turn;  // both orders are legal
      Fiber& fiber = b.fibers[i];
      if (fiber.done || (fiber.ready && !fiber.ready())) continue;
      fiber.ready = nullptr;
      b.current = &fiber;
      threadIdx = {i, 0, 0};
      resume(b);
      left -= fiber.done;
      progress = true;
    }
    if (!progress && !b.copies.empty()) {
      const auto copy = std::move(b.copies.front());
      b.copies.pop_front();
      copy();
      progress = true;
    }
    idle = progress ? 0 : idle + 1;
    if (idle > 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (idle > 100000) fail("deadlock: every thread of a block waits");
  }
}

extern void poison_shared_memory();

inline void launch(Grid& g) {
  grid = &g;
  for (unsigned plane = 0; plane < g.blocks.y * g.blocks.z; ++plane) {
    for (unsigned x = 0; x < g.blocks.x; x += g.cluster) {
      std::vector<Block> running(g.cluster);
      std::vector<std::thread> threads;
      g.running = &running;
      for (unsigned rank = 0; rank < g.cluster; ++rank) {
        running[rank].rank = int(rank);
        threads.emplace_back([&running, &g, rank, x, plane] {
          blockIdx = {x + rank, plane % g.blocks.y, plane / g.blocks.y}, blockDim = g.threads, gridDim = g.blocks;
          poison_shared_memory();
          run_block(running[rank]);
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
  grid = nullptr;
}

// What kernel<<<blocks, threads>>>(...) becomes.
inline void launch_plain(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  Grid grid;
  grid.blocks = {blocks};
  grid.threads = {threads};
  grid.shared_bytes = 0;
  grid.cluster = 1;
  grid.kernel = std::move(kernel);
  launch(grid);
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block->everyone); }
inline void __syncwarp() { emulation::meet(emulation::warp().barrier); }
template <typename T>
inline T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(&value, sizeof(T), [&](const auto& slots) {
    T got;
    memcpy(&got, slots[source & 31], sizeof(T));
    return got;
  });
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, int(emulation::lane()) ^ bits);
}

inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  return emulation::exchange(&value, 4, [](const auto& slots) {
    uint32_t most = 0;
    for (const auto& slot : slots) most = max(most, uint32_t(slot[0]));
    return most;
  });
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  return emulation::exchange(&value, 4, [](const auto& slots) {
    uint32_t sum = 0;
    for (const auto& slot : slots) sum += uint32_t(slot[0]);
    return sum;
  });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint32_t value = predicate != 0;
  return emulation::exchange(&value, 4, [](const auto& slots) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= unsigned(slots[lane][0] & 1) << lane;
    return all;
  });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }

#include "cuda_host.h"
