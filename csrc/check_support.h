// What the parts of the standalone check share (check.cu). Host code only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "router_gemm.h"

#define CUDA_OK(call)                                                                                  \
  do {                                                                                                 \
    if (const cudaError_t error = (call); error != cudaSuccess) {                                      \
      fprintf(stderr, "%s:%d: %s failed: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      exit(2);                                                                                         \
    }                                                                                                  \
  } while (0)

namespace jax_router_check {

// How much is checked. kTiny has every kernel on a few launches, for tools that take a thousand times as long.
enum class Extent { kTiny, kSmall, kFull };

// Of the launches that the others are compared with.
constexpr int max_tokens_of(Extent extent) { return extent == Extent::kTiny ? 64 : 1024; }

constexpr uint8_t kPoison = 0xA5;
constexpr size_t kCanaryBytes = 256;
constexpr size_t kWorkspaceBytes = size_t(64) << 20;

struct DeviceBuffer {
  void* data = nullptr;
  explicit DeviceBuffer(size_t bytes) { CUDA_OK(cudaMalloc(&data, std::max<size_t>(bytes, 16))); }
  ~DeviceBuffer() { cudaFree(data); }
  DeviceBuffer(const DeviceBuffer&) = delete;

  uint8_t* at(size_t byte) const { return static_cast<uint8_t*>(data) + byte; }
  void write(const void* from, size_t bytes, size_t at_byte = 0) const {
    if (bytes > 0) CUDA_OK(cudaMemcpy(at(at_byte), from, bytes, cudaMemcpyHostToDevice));
  }
  void read(void* to, size_t bytes, size_t at_byte = 0) const {
    CUDA_OK(cudaMemcpy(to, at(at_byte), bytes, cudaMemcpyDeviceToHost));
  }
  void poison(size_t bytes) const { CUDA_OK(cudaMemset(data, kPoison, bytes)); }
};

inline bool poisoned(const uint8_t* bytes, size_t count) {
  return std::all_of(bytes, bytes + count, [](uint8_t byte) { return byte == kPoison; });
}

// Ends the program unless a call of the C interface succeeded.
inline void launch_ok(int status, const char* message) {
  if (status == JR_OK) return;
  fprintf(stderr, "launch refused: %s\n", message);
  exit(2);
}

inline size_t bytes_of(int dtype) { return dtype == JR_FLOAT32 ? 4 : 2; }

inline double read_as_double(const uint8_t* bytes, int dtype) {
  if (dtype == JR_FLOAT32) {
    float v;
    memcpy(&v, bytes, 4);
    return v;
  }
  if (dtype == JR_BFLOAT16) {
    __nv_bfloat16 v;
    memcpy(&v, bytes, 2);
    return __bfloat162float(v);
  }
  __half v;
  memcpy(&v, bytes, 2);
  return __half2float(v);
}

// A host array of one dtype with its float64 values.
struct HostArray {
  int dtype;
  std::vector<uint8_t> bytes;
  std::vector<double> values;

  HostArray(size_t count, int of_dtype, double scale, double mean, std::mt19937& random)
      : dtype(of_dtype), bytes(count * bytes_of(of_dtype)), values(count) {
    std::normal_distribution<float> normal{static_cast<float>(mean), static_cast<float>(scale)};
    for (size_t i = 0; i < count; ++i) set(i, normal(random));
  }

  void set(size_t i, float v) {
    uint8_t* const to = &bytes[i * bytes_of(dtype)];
    if (dtype == JR_FLOAT32) {
      memcpy(to, &v, 4);
    } else if (dtype == JR_BFLOAT16) {
      const __nv_bfloat16 rounded = __float2bfloat16_rn(v);
      memcpy(to, &rounded, 2);
    } else {
      const __half rounded = __float2half_rn(v);
      memcpy(to, &rounded, 2);
    }
    values[i] = read_as_double(to, dtype);
  }
};

}  // namespace jax_router_check
