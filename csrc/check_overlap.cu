// Launch overlap with real neighbours: a producer that writes x and the weights immediately before, a consumer that
// reads the logits immediately after, both launched programmatically and the producer slow at its worst point, while
// another stream copies memory. Part of the standalone check (check.cu).
#include "check_overlap.h"

#include <stdio.h>
#include <stdlib.h>

#include "router_gemm.h"
#include "sm90_primitives.cuh"

namespace {

using namespace jax_router;

#define CUDA_OK(call)                                                                                  \
  do {                                                                                                 \
    if (const cudaError_t error = (call); error != cudaSuccess) {                                      \
      fprintf(stderr, "%s:%d: %s failed: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      exit(2);                                                                                         \
    }                                                                                                  \
  } while (0)

constexpr int kBlocks = 64, kThreads = 256, kVariants = 4;
constexpr int kDelay = 2000;  // nanoseconds

// Lets the next grid start as soon as all blocks got here or ended. The kernels under test leave that to their end.
__device__ __forceinline__ void trigger() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Lets its successor start at once, then dawdles, then copies: whoever reads early reads the variant before.
__global__ void produce(uint4* to, const uint4* from, size_t chunks, uint4* to_too, const uint4* from_too,
                        size_t chunks_too) {
  grid_dependency_wait();
  trigger();
  if (blockIdx.x % 8 == 0) __nanosleep(kDelay);
  const size_t first = blockIdx.x * size_t(kThreads) + threadIdx.x, step = size_t(kBlocks) * kThreads;
  for (size_t i = first; i < chunks; i += step) to[i] = from[i];
  for (size_t i = first; i < chunks_too; i += step) to_too[i] = from_too[i];
}

// Compares the logits with the expected ones, then poisons them.
__global__ void consume(uint32_t* out, const uint32_t* expected, size_t words, unsigned long long* wrong) {
  grid_dependency_wait();
  const size_t first = blockIdx.x * size_t(kThreads) + threadIdx.x, step = size_t(kBlocks) * kThreads;
  unsigned long long mine = 0;
  for (size_t i = first; i < words; i += step) {
    mine += out[i] != expected[i];
    out[i] = 0xFFFFFFFFu;  // a NaN
  }
  if (mine != 0) atomicAdd(wrong, mine);
  trigger();
}

__global__ void fill(uint16_t* to, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(kThreads) + threadIdx.x; i < count; i += size_t(gridDim.x) * kThreads) {
    uint32_t v = (uint32_t(i) ^ seed) * 2654435761u;
    v = (v ^ v >> 15) * 2246822519u;
    v ^= v >> 13;
    to[i] = uint16_t((v & 0x80FFu) | 0x3D00u);  // bfloat16 of either sign, magnitudes 2^-5 to 2^-3
  }
}

template <typename... Parameters, typename... Arguments>
void launch_programmatically(void (*kernel)(Parameters...), cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = kBlocks;
  config.blockDim = kThreads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CUDA_OK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <typename T>
T* allocate(size_t count) {
  void* data = nullptr;
  CUDA_OK(cudaMalloc(&data, count * sizeof(T)));
  return static_cast<T*>(data);
}

void route(jr_router_gemm_args args, int config, cudaStream_t stream) {
  char message[512] = "";
  args.config = config;
  const int status = config == -2 ? jr_router_gemm_naive(&args, stream, message, sizeof(message))
                                  : jr_router_gemm(&args, stream, message, sizeof(message));
  if (status == JR_OK) return;
  fprintf(stderr, "launch refused: %s\n", message);
  exit(2);
}

}  // namespace

int check_overlap(int launches_per_case) {
  constexpr int kMaxTokens = 512;
  constexpr size_t kTrafficBytes = size_t(256) << 20;
  const int shapes[][2] = {{128, 2880}, {256, 7168}}, tokens_list[] = {1, 16, 64, 100, kMaxTokens};
  cudaStream_t stream, traffic;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA_OK(cudaStreamCreateWithFlags(&traffic, cudaStreamNonBlocking));
  uint8_t* noise = allocate<uint8_t>(2 * kTrafficBytes);
  unsigned long long* wrong = allocate<unsigned long long>(1);
  CUDA_OK(cudaMemset(wrong, 0, sizeof(*wrong)));
  long launches = 0, bad_cases = 0;
  for (const auto& [experts, hidden] : shapes) {
    const size_t x_count = size_t(kMaxTokens) * hidden, weight_count = size_t(experts) * hidden;
    const size_t out_count = size_t(kMaxTokens) * experts;
    uint16_t *x = allocate<uint16_t>(x_count), *weight = allocate<uint16_t>(weight_count);
    uint16_t *xs = allocate<uint16_t>(kVariants * x_count), *weights = allocate<uint16_t>(kVariants * weight_count);
    constexpr size_t kWorkspaceBytes = size_t(64) << 20;
    void* workspace = allocate<uint8_t>(kWorkspaceBytes);
    uint32_t *out = allocate<uint32_t>(out_count), *expected = allocate<uint32_t>(kVariants * out_count);
    fill<<<256, kThreads>>>(xs, kVariants * x_count, 1u);
    fill<<<256, kThreads>>>(weights, kVariants * weight_count, 2u);
    jr_router_gemm_args args = {x,          weight, nullptr, out,         workspace, kWorkspaceBytes,
                                kMaxTokens, hidden, experts, JR_BFLOAT16, JR_NONE,   JR_FLOAT32,
                                -1};
    for (int variant = 0; variant < kVariants; ++variant) {
      jr_router_gemm_args reference = args;
      reference.x = xs + variant * x_count;
      reference.weight = weights + variant * weight_count;
      reference.out = expected + variant * out_count;
      route(reference, -2, nullptr);
    }
    CUDA_OK(cudaDeviceSynchronize());
    for (const int tokens : tokens_list) {
      args.tokens = tokens;
      for (int config = 0; config < jr_router_gemm_num_configs(); ++config) {
        if (!jr_router_gemm_config_fits(config, &args)) continue;
        unsigned long long before, after;
        CUDA_OK(cudaMemcpy(&before, wrong, sizeof(before), cudaMemcpyDeviceToHost));
        for (int i = 0; i < launches_per_case; ++i) {
          if (i % 50 == 0)
            CUDA_OK(cudaMemcpyAsync(noise, noise + kTrafficBytes, kTrafficBytes, cudaMemcpyDeviceToDevice, traffic));
          const int variant = i % kVariants;
          launch_programmatically(&produce, stream, reinterpret_cast<uint4*>(x),
                                  reinterpret_cast<const uint4*>(xs + variant * x_count), size_t(tokens) * hidden / 8,
                                  reinterpret_cast<uint4*>(weight),
                                  reinterpret_cast<const uint4*>(weights + variant * weight_count), weight_count / 8);
          route(args, config, stream);
          launch_programmatically(&consume, stream, out, static_cast<const uint32_t*>(expected + variant * out_count),
                                  size_t(tokens) * experts, wrong);
          ++launches;
        }
        CUDA_OK(cudaDeviceSynchronize());
        CUDA_OK(cudaMemcpy(&after, wrong, sizeof(after), cudaMemcpyDeviceToHost));
        if (after == before) continue;
        ++bad_cases;
        printf("FAILED overlap: %s experts=%d hidden=%d tokens=%d: %llu wrong logits in %d launches\n",
               jr_router_gemm_config_name(config), experts, hidden, tokens, after - before, launches_per_case);
      }
    }
    for (void* each : {static_cast<void*>(x), static_cast<void*>(weight), static_cast<void*>(xs),
                       static_cast<void*>(weights), static_cast<void*>(out), static_cast<void*>(expected), workspace})
      CUDA_OK(cudaFree(each));
  }
  CUDA_OK(cudaFree(noise));
  CUDA_OK(cudaFree(wrong));
  CUDA_OK(cudaStreamDestroy(stream));
  CUDA_OK(cudaStreamDestroy(traffic));
  printf("overlapped %ld launches with their neighbours under copies: %ld failed cases\n", launches, bad_cases);
  return bad_cases == 0 ? 0 : 1;
}
