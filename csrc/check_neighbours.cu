// Launch overlap with real neighbours: a producer that writes the inputs immediately before, a consumer that reads the
// outputs immediately after, both launched programmatically and the producer slow at its worst point, while another
// stream copies memory. Part of the standalone check (check.cu).
#include "check_neighbours.h"

#include "check_support.h"
#include "launch.cuh"
#include "sm90_primitives.cuh"

namespace jax_router_check {

struct Wrong {
  unsigned long long count, word;  // how many words; of one of them, where and what
  int launch, part;
  uint32_t expected, got;
};

namespace {

constexpr int kBlocks = 64, kThreads = 256;
constexpr int kDelay = 2000;  // nanoseconds
constexpr size_t kTrafficBytes = size_t(256) << 20;
constexpr int kLaunchesPerCopy = 50;

struct Writes {
  struct {
    uint4* to;
    const uint4* from;
    size_t chunks;
  } parts[kMaxProduced];
};
struct Reads {
  struct {
    uint32_t* from;
    const uint32_t* expected;
    size_t words;
  } parts[kMaxConsumed];
};

// Lets the next grid start as soon as all blocks got here or ended.
__device__ __forceinline__ void trigger() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Lets its successor start at once, then dawdles, then copies: whoever reads early reads the variant before.
__global__ void produce(const Writes writes) {
  jax_router::grid_dependency_wait();
  trigger();
  if (blockIdx.x % 8 == 0) __nanosleep(kDelay);
  const size_t first = blockIdx.x * size_t(kThreads) + threadIdx.x, step = size_t(kBlocks) * kThreads;
  for (const auto& part : writes.parts) {
    for (size_t i = first; i < part.chunks; i += step) part.to[i] = part.from[i];
  }
}

// Compares the outputs with the expected ones, then poisons them.
__global__ void consume(const Reads reads, int launch, Wrong* wrong) {
  jax_router::grid_dependency_wait();
  const size_t first = blockIdx.x * size_t(kThreads) + threadIdx.x, step = size_t(kBlocks) * kThreads;
  for (int part = 0; part < kMaxConsumed; ++part) {
    const auto& read = reads.parts[part];
    for (size_t i = first; i < read.words; i += step) {
      const uint32_t got = read.from[i], expected = read.expected[i];
      read.from[i] = 0xFFFFFFFFu;  // a NaN, and no expert
      if (got == expected || atomicAdd(&wrong->count, 1ull) != 0) continue;
      wrong->word = i, wrong->launch = launch, wrong->part = part;
      wrong->expected = expected, wrong->got = got;
    }
  }
  trigger();
}

__global__ void fill(uint16_t* to, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(kThreads) + threadIdx.x; i < count; i += size_t(gridDim.x) * kThreads) {
    uint32_t v = (uint32_t(i) ^ seed) * 2654435761u;
    v = (v ^ v >> 15) * 2246822519u;
    v ^= v >> 13;
    to[i] = uint16_t((v & 0x80FFu) | 0x3D00u);
  }
}

template <typename... Parameters, typename... Arguments>
void launch_programmatically(void (*kernel)(Parameters...), cudaStream_t stream, Arguments... arguments) {
  const jax_router::Launch launch(kBlocks, kThreads, 0, 1, stream);
  CUDA_OK(cudaLaunchKernelEx(&launch.shape, kernel, Parameters(arguments)...));
}

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

Neighbours::Neighbours() {
  CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  CUDA_OK(cudaStreamCreateWithFlags(&traffic_, cudaStreamNonBlocking));
  CUDA_OK(cudaMalloc(&noise_, 2 * kTrafficBytes));
  CUDA_OK(cudaMalloc(&wrong_, sizeof(Wrong)));
}

Neighbours::~Neighbours() {
  cudaFree(noise_);
  cudaFree(wrong_);
  cudaStreamDestroy(stream_);
  cudaStreamDestroy(traffic_);
}

std::string Neighbours::run(int launches, const std::vector<Variant>& variants, size_t row_words,
                            const std::function<void(cudaStream_t)>& launch) {
  CUDA_OK(cudaMemset(wrong_, 0, sizeof(Wrong)));
  CUDA_OK(cudaDeviceSynchronize());
  for (int i = 0; i < launches; ++i) {
    if (i % kLaunchesPerCopy == 0)
      CUDA_OK(cudaMemcpyAsync(noise_, noise_ + kTrafficBytes, kTrafficBytes, cudaMemcpyDeviceToDevice, traffic_));
    const Variant& variant = variants[size_t(i) % variants.size()];
    Writes writes = {};
    for (size_t part = 0; part < variant.produced.size(); ++part) {
      const Produced& p = variant.produced[part];
      writes.parts[part] = {static_cast<uint4*>(p.to), static_cast<const uint4*>(p.from), p.bytes / sizeof(uint4)};
    }
    Reads reads = {};
    for (size_t part = 0; part < variant.consumed.size(); ++part) {
      const Consumed& c = variant.consumed[part];
      reads.parts[part] = {static_cast<uint32_t*>(c.from), static_cast<const uint32_t*>(c.expected), c.bytes / 4};
    }
    launch_programmatically(&produce, stream_, writes);
    launch(stream_);
    launch_programmatically(&consume, stream_, reads, i, wrong_);
  }
  CUDA_OK(cudaDeviceSynchronize());
  Wrong wrong;
  CUDA_OK(cudaMemcpy(&wrong, wrong_, sizeof(wrong), cudaMemcpyDeviceToHost));
  if (wrong.count == 0) return "";
  char text[256];
  snprintf(text, sizeof(text),
           "%llu wrong words in %d launches; in launch %d %s of token %llu, element %llu: expected 0x%08x (%d, %.9g), "
           "got 0x%08x (%d, %.9g)",
           wrong.count, launches, wrong.launch, variants[0].consumed[size_t(wrong.part)].name, wrong.word / row_words,
           wrong.word % row_words, wrong.expected, int(wrong.expected), as_float(wrong.expected), wrong.got,
           int(wrong.got), as_float(wrong.got));
  return text;
}

void fill_bfloat16(void* to, size_t count, uint32_t seed) {
  fill<<<256, kThreads>>>(static_cast<uint16_t*>(to), count, seed);
  CUDA_OK(cudaGetLastError());
  CUDA_OK(cudaDeviceSynchronize());
}

}  // namespace jax_router_check
