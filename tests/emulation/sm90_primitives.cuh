// The same functions as csrc/sm90_primitives.cuh, on the CPU (see cuda_runtime.h here).
#pragma once

#include <cuda_runtime.h>

namespace jax_router {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

using emulation::block;
using emulation::fail;

inline float widened(uint16_t bits, bfloat16) { return __bfloat162float({bits}); }
inline float widened(uint16_t bits, float16) { return __half2float({bits}); }

inline void grid_dependency_wait() {}
inline void grid_launch_next() {}

inline int uniform_warp() { return __shfl_sync(~0u, int(threadIdx.x) / 32, 0); }
inline uint32_t uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }
inline uint32_t settled(uint32_t value) { return __shfl_sync(~0u, value, int(threadIdx.x % 32)); }
inline float reciprocal(float value) { return 1.f / value; }
inline bool elect_one() { return threadIdx.x % 32 == 0; }

// ---- Shared memory: offset, and the block's rank in the bits above -------------------------------------------------

constexpr int kRankShift = 24;

extern thread_local uint8_t shared[], dynamic_shared[];

inline uint32_t shared_address(const void* pointer) {
  for (uint8_t* base : {shared, dynamic_shared}) {
    const ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - base;
    if (offset < 0 || size_t(offset) >= emulation::kSharedBytes) continue;
    block->shared = base;
    return uint32_t(offset) | uint32_t(block->rank) << kRankShift;
  }
  fail("no shared memory there");
}
inline emulation::Block& owner_of(uint32_t address) {
  if (address >> kRankShift >= emulation::grid->cluster) fail("a block that the cluster does not have");
  return (*emulation::grid->running)[address >> kRankShift];
}
inline uint8_t* memory_at(uint32_t address, size_t bytes) {
  const uint32_t offset = address & ((1u << kRankShift) - 1);
  if (offset + bytes > emulation::grid->shared_bytes) fail("access outside the shared memory that was asked for");
  return owner_of(address).shared + offset;
}

inline void cluster_arrive_relaxed() {
  emulation::Grid& g = *emulation::grid;
  block->current->cluster_generation = int(g.generation);
  if (++g.arrived == g.cluster * g.threads.x) g.arrived = 0, ++g.generation;
}
inline void cluster_wait() {
  emulation::wait_until(
      [mine = unsigned(block->current->cluster_generation)] { return emulation::grid->generation != mine; });
}
inline uint32_t remote_address(uint32_t address, uint32_t rank) {
  return (address & ((1u << kRankShift) - 1)) | rank << kRankShift;
}

// ---- Barriers in shared memory -------------------------------------------------------------------------------------

template <typename Change>
inline void change_barrier(uint32_t address, const Change& change) {
  emulation::Block& owner = owner_of(address);
  const std::lock_guard<std::mutex> lock(owner.mutex);
  const auto found = owner.barriers.find(address);
  if (found == owner.barriers.end()) fail("no barrier was initialised there");
  change(found->second);
  if (found->second.pending < 0) fail("more arrivals than the barrier expects");
  found->second.settle();
}
inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  memory_at(barrier, 8);
  const std::lock_guard<std::mutex> lock(block->mutex);
  block->barriers[barrier] = {int(arrivals), int(arrivals)};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  change_barrier(barrier, [&](emulation::MBarrier& b) { b.bytes += bytes, --b.pending; });
}
inline void barrier_arrive(uint32_t barrier) {
  change_barrier(barrier, [](emulation::MBarrier& b) { --b.pending; });
}
inline void complete_bytes(uint32_t barrier, int64_t bytes) {
  change_barrier(barrier, [&](emulation::MBarrier& b) { b.bytes -= bytes; });
}
// Stricter than the hardware, which looks at the phase's parity alone.
inline void barrier_wait(uint32_t barrier, int phase) {
  emulation::wait_until([barrier, phase] {
    emulation::Block& owner = owner_of(barrier);
    const std::lock_guard<std::mutex> lock(owner.mutex);
    const auto found = owner.barriers.find(barrier);
    if (found == owner.barriers.end()) fail("no barrier was initialised there");
    if (found->second.completed > phase + 1) fail("the awaited phase was over long ago");
    return found->second.completed == phase + 1;
  });
}
inline void barrier_wait_for_cluster(uint32_t barrier, int phase) { barrier_wait(barrier, phase); }

inline void store_remote_counted(uint32_t address, float4 value, uint32_t barrier) {
  memcpy(memory_at(address, 16), &value, 16);
  complete_bytes(barrier, 16);
}
inline void copy_to_remote(uint32_t address, uint32_t source, uint32_t bytes, uint32_t barrier) {
  block->copies.push_back([=] {
    memcpy(memory_at(address, bytes), memory_at(source, bytes), bytes);
    complete_bytes(barrier, bytes);
  });
}
inline void fence_for_copies() {}

inline emulation::Barrier& named(int index, int threads) {
  emulation::Barrier& barrier = block->named[index];
  if (barrier.expected != 0 && barrier.expected != threads) fail("a named barrier with two numbers of threads");
  barrier.expected = threads;
  return barrier;
}
inline void named_barrier(int index, int threads) { emulation::meet(named(index, threads)); }
inline void named_barrier_arrive(int index, int threads) { named(index, threads).arrive(); }

// ---- Loads and copies ----------------------------------------------------------------------------------------------

// A thread's own copies come when it waits for them, and no sooner.
template <int kOffset>
inline void copy_16_bytes(uint32_t destination, const void* before, bool exists) {
  const void* const source = static_cast<const uint8_t*>(before) + kOffset;
  if (exists && reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("a copy is not aligned");
  if (exists && !emulation::grid->reads(static_cast<const uint8_t*>(source), 16)) fail("a copy from beyond x and weight");
  block->current->copies.emplace_back([=] {
    if (exists) {
      memcpy(memory_at(destination, 16), source, 16);
    } else {
      memset(memory_at(destination, 16), 0, 16);
    }
  });
}
inline void commit_copies() {
  auto& thread = *block->current;
  thread.committed.push_back(std::move(thread.copies));
  thread.copies.clear();
}
template <int kPending>
inline void wait_for_copies() {
  auto& committed = block->current->committed;
  for (; committed.size() > kPending; committed.pop_front()) {
    for (const auto& copy : committed.front()) copy();
  }
}

inline void store_shared(uint32_t address, float value, bool exists) {
  if (exists) memcpy(memory_at(address, 4), &value, 4);
}

inline void prefetch_tensor_map(const CUtensorMap&) {}
inline void prefetch_box(const CUtensorMap&, int, int) {}
inline void copy_box(uint32_t destination, const CUtensorMap& map, int element, int row, uint32_t barrier) {
  if (destination % 1024 != 0) fail("a swizzled box starts at a multiple of 1024 bytes");
  block->copies.push_back([=] {
    const int row_bytes = map.box_columns * 2;
    for (int r = 0; r < map.box_rows; ++r) {
      uint16_t values[64] = {};
      const int64_t columns = row + r < map.rows ? std::clamp<int64_t>(map.columns - element, 0, map.box_columns) : 0;
      if (columns > 0) memcpy(values, map.matrix + (row + r) * map.columns + element, size_t(columns) * 2);
      for (int chunk = 0; chunk < row_bytes / 16; ++chunk) {
        // Bits of the address's 128-byte line within 8 lines of it turn the chunk, as many as a row has bits of chunks.
        const uint32_t plain = uint32_t(r * row_bytes + chunk * 16);
        const uint32_t turned = plain ^ (plain >> 7) % (row_bytes / 16) * 16;
        memcpy(memory_at(destination + turned, 16), values + chunk * 8, 16);
      }
    }
    complete_bytes(barrier, map.box_rows * row_bytes);
  });
}

// ---- Tensor cores: exact sums of 16 products, rounded once ---------------------------------------------------------

inline void load_matrices(uint32_t (&d)[4], uint32_t row_address) {
  emulation::exchange(&row_address, 4, [&](const auto& rows) {
    for (int matrix = 0; matrix < 4; ++matrix)
      memcpy(&d[matrix],
             memory_at(uint32_t(rows[matrix * 8 + emulation::lane() / 4][0]) + emulation::lane() % 4 * 4, 4), 4);
    return 0;
  });
}

inline void load_transposed_matrices(uint32_t (&d)[4], uint32_t row_address) {
  emulation::exchange(&row_address, 4, [&](const auto& rows) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int half = 0; half < 2; ++half) {
        const auto row = uint32_t(rows[matrix * 8 + emulation::lane() % 4 * 2 + half][0]);
        memcpy(reinterpret_cast<uint8_t*>(&d[matrix]) + half * 2, memory_at(row + emulation::lane() / 4 * 2, 2), 2);
      }
    }
    return 0;
  });
}

inline float load_shared_float(uint32_t address) {
  float v;
  memcpy(&v, memory_at(address, 4), 4);
  return v;
}
inline float2 load_shared_float2(uint32_t address) {
  float2 v;
  memcpy(&v, memory_at(address, 8), 8);
  return v;
}
inline uint32_t pack_bfloat16(float2 v) {
  return __float2bfloat16_rn(v.x).bits | uint32_t(__float2bfloat16_rn(v.y).bits) << 16;
}

template <typename Element>
inline void mma_m16n8k16(float4& d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float4& c,
                         Element element) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  emulation::exchange(mine, sizeof(mine), [&](const auto& lanes) {
    const auto value = [&](int lane, int word, int half) {
      uint16_t bits;
      memcpy(&bits, reinterpret_cast<const uint8_t*>(lanes[lane]) + word * 4 + half * 2, 2);
      return double(widened(bits, element));
    };
    const float start[4] = {c.x, c.y, c.z, c.w};
    float* const sums[4] = {&d.x, &d.y, &d.z, &d.w};
    for (int i = 0; i < 4; ++i) {
      const int row = emulation::lane() / 4 + i / 2 * 8, column = emulation::lane() % 4 * 2 + i % 2;
      double sum = start[i];
      for (int k = 0; k < 16; ++k)
        sum += value(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) *
               value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      *sums[i] = float(sum);
    }
    return 0;
  });
}

}  // namespace jax_router
