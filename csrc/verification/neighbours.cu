// Launch overlap with real neighbours: a producer that writes the inputs immediately before, a consumer that reads the
// outputs immediately after. All are launched programmatically, let their successors start before they wait
// themselves, and dawdle at their worst point:
//
//   produce   dawdles before it writes: who reads early reads what the launch before was given.
//   compare   has warps that do not wait, for a launch that lets its successor start before it has stored; the others
//             dawdle before they read: who stores early stores into what is still being compared.
//   poison    dawdles before it writes: who stores early is overwritten, who does not store leaves poison.
#include <algorithm>
#include <atomic>

#include "../launch.cuh"
#include "../sm90_primitives.cuh"
#include "../status.h"
#include "verification.h"

namespace jax_router_verification {
namespace {

using jax_router::grid_dependency_wait;
using jax_router::grid_launch_next;
using jax_router::Report;

constexpr int kBlocks = 64, kThreads = 256, kEarlyThreads = 32;
constexpr unsigned kDelay = 1000;  // nanoseconds, up to three times

struct Part {
  uint32_t* to;
  const uint32_t* from;
  uint64_t words;
};
struct Parts {
  Part parts[JR_MAX_PARTS];
  int count;
};
constexpr int kManyParts = 128;
struct ManyParts {
  Part parts[kManyParts];
};

__device__ __forceinline__ void dawdle() { __nanosleep(blockIdx.x % 4 * kDelay); }

// Calls each(part, word) for every word; `threads` threads of every block, of which this is `thread`.
template <typename Each>
__device__ __forceinline__ void for_each_word(const Parts& p, unsigned thread, unsigned threads, const Each& each) {
  for (int part = 0; part < p.count; ++part) {
    const uint64_t step = uint64_t(gridDim.x) * threads;
    for (uint64_t word = uint64_t(blockIdx.x) * threads + thread; word < p.parts[part].words; word += step)
      each(part, word);
  }
}

__global__ void __launch_bounds__(kThreads) produce(const Parts p) {
  grid_launch_next();
  grid_dependency_wait();
  dawdle();
  for_each_word(p, threadIdx.x, kThreads,
                [&](int part, uint64_t word) { p.parts[part].to[word] = p.parts[part].from[word]; });
}

__global__ void __launch_bounds__(kThreads) compare(const Parts p, int launch, jr_wrong* wrong) {
  const bool early = threadIdx.x < kEarlyThreads;
  grid_launch_next();
  if (!early) {
    grid_dependency_wait();
    dawdle();
  }
  for_each_word(p, early ? threadIdx.x : threadIdx.x - kEarlyThreads, early ? kEarlyThreads : kThreads - kEarlyThreads,
                [&](int part, uint64_t word) {
                  const uint32_t got = __ldcg(&p.parts[part].to[word]), expected = p.parts[part].from[word];
                  if (got == expected) return;
                  const uint32_t before = atomicAdd(early ? &wrong->early_words : &wrong->words, 1u);
                  if (before != 0 || (early && atomicAdd(&wrong->words, 0u) != 0)) return;
                  wrong->launch = launch, wrong->part = part, wrong->word = uint32_t(word);
                  wrong->expected = expected, wrong->got = got, wrong->early = early;
                });
}

__global__ void __launch_bounds__(kThreads) poison(const Parts p) {
  grid_launch_next();
  grid_dependency_wait();
  dawdle();
  for_each_word(p, threadIdx.x, kThreads,
                [&](int part, uint64_t word) { p.parts[part].to[word] = JR_POISON * 0x01010101u; });
}

// One block per part.
__global__ void __launch_bounds__(kThreads) find_differing(const ManyParts p, jr_differing* differing) {
  const Part& part = p.parts[blockIdx.x];
  uint32_t mine = 0, first = ~0u;
  for (uint64_t word = threadIdx.x; word < part.words; word += kThreads) {
    if (part.to[word] == part.from[word]) continue;
    if (mine++ == 0) first = uint32_t(word);
  }
  __shared__ uint32_t all, lowest;
  if (threadIdx.x == 0) all = 0, lowest = ~0u;
  __syncthreads();
  if (mine != 0) {
    atomicAdd(&all, mine);
    atomicMin(&lowest, first);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  differing[blockIdx.x] = all == 0 ? jr_differing{} : jr_differing{all, lowest, part.from[lowest], part.to[lowest]};
}

int collect(const jr_part* parts, int count, Part* to, const Report& report) {
  for (int i = 0; i < count; ++i) {
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(parts[i].to) | reinterpret_cast<uintptr_t>(parts[i].from);
    if (parts[i].bytes < 0 || parts[i].bytes % 4 != 0 || addresses % 4 != 0)
      return report.fail(JR_UNSUPPORTED, "part %d has %lld bytes at %p and %p; expected words of 4 bytes", i,
                         static_cast<long long>(parts[i].bytes), parts[i].to, parts[i].from);
    to[i] = {static_cast<uint32_t*>(parts[i].to), static_cast<const uint32_t*>(parts[i].from),
             uint64_t(parts[i].bytes) / 4};
  }
  return JR_OK;
}

int collect(const jr_part* parts, int count, Parts& p, const Report& report) {
  if (count < 1 || count > JR_MAX_PARTS)
    return report.fail(JR_UNSUPPORTED, "count is %d; expected 1 to %d parts", count, int(JR_MAX_PARTS));
  p.count = count;
  return collect(parts, count, p.parts, report);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_programmatically(void (*kernel)(Parameters...), void* stream, Arguments... arguments) {
  const jax_router::Launch launch(kBlocks, kThreads, 0, 1, static_cast<cudaStream_t>(stream));
  return cudaLaunchKernelEx(&launch.shape, kernel, Parameters(arguments)...);
}

std::atomic<int64_t> launched, captured;  // calls of jr_find_differing

}  // namespace
}  // namespace jax_router_verification

using namespace jax_router_verification;

void jr_find_differing_calls(jr_calls* calls) { *calls = {launched, captured}; }

int jr_neighbour_produce(const jr_part* parts, int count, void* stream, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  Parts p = {};
  if (const int status = collect(parts, count, p, report); status != JR_OK) return status;
  return report.check(launch_programmatically(&produce, stream, p), "launch of the producer");
}

int jr_neighbour_consume(const jr_part* parts, int count, int launch, jr_wrong* wrong, void* stream, char* message,
                         size_t message_bytes) {
  const Report report{message, message_bytes};
  Parts p = {};
  if (const int status = collect(parts, count, p, report); status != JR_OK) return status;
  JR_CHECK(report, launch_programmatically(&compare, stream, p, launch, wrong));
  return report.check(launch_programmatically(&poison, stream, p), "launch of the consumer's poison");
}

int jr_find_differing(const jr_part* parts, int count, jr_differing* differing, void* stream, char* message,
                      size_t message_bytes) {
  const Report report{message, message_bytes};
  cudaStreamCaptureStatus capture;
  JR_CHECK(report, cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture));
  ++(capture == cudaStreamCaptureStatusActive ? captured : launched);
  for (int first = 0; first < count; first += kManyParts) {
    const int now = std::min(count - first, kManyParts);
    ManyParts p = {};
    if (const int status = collect(parts + first, now, p.parts, report); status != JR_OK) return status;
    find_differing<<<now, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, differing + first);
    JR_CHECK(report, cudaGetLastError());
  }
  return JR_OK;
}
