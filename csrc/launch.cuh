// What the launchers share: a launch with its attributes, and what is set up once per device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

#include "router_gemm.h"
#include "sm90_tile.cuh"
#include "status.h"

namespace jax_router {

// A launch with the attributes it points to. Programmatic: the grid may start while its predecessor on the stream
// drains, which is safe because the kernels only prefetch into L2 before their dependency wait.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t shape = {};

  Launch(dim3 blocks, int threads, int shared_bytes, int cluster, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
    shape.gridDim = blocks;
    shape.blockDim = dim3(unsigned(threads));
    shape.dynamicSmemBytes = size_t(shared_bytes);
    shape.stream = stream;
    shape.attrs = attributes;
    shape.numAttrs = cluster > 1 ? 2 : 1;  // even a cluster of one costs a cluster launch
  }
  Launch(const Launch&) = delete;
};

// Enqueues it; the message of a failure names the kernel and the sizes.
inline int enqueue(const Launch& launch, const void* kernel, void* parameter, const char* name,
                   const jr_router_gemm_args& a, const Report& report) {
  const cudaError_t error = cudaLaunchKernelExC(&launch.shape, kernel, &parameter);
  if (error == cudaSuccess) return JR_OK;
  cudaGetLastError();  // reported here, not by whoever asks next
  return report.fail(JR_CUDA_ERROR, "launch of %s for tokens=%lld hidden=%lld experts=%lld failed: %s (%s)", name,
                     static_cast<long long>(a.tokens), static_cast<long long>(a.hidden),
                     static_cast<long long>(a.experts), cudaGetErrorName(error), cudaGetErrorString(error));
}

// JR_OK, or why the kernels do not take this router GEMM; its pointers too unless there are no tokens.
int check_gemm(const jr_router_gemm_args& a, const Report& report);

// A router GEMM as a kernel with tiles of so many experts sees it.
Problem device_problem(const jr_router_gemm_args& a, int block_experts);

// Picks a configuration for a checked router GEMM and launches it. With `routed`, for a launch behind it that routes
// and finds the logits there: as `parts` where a configuration with splits was picked, else (`parts` is null) in `out`.
int enqueue_gemm(const jr_router_gemm_args& a, Problem* routed, cudaStream_t stream, const Report& report);

// Runs something once per device and process; again after a failure.
class OncePerDevice {
 public:
  template <typename Prepare>
  int run(const Report& report, const Prepare& prepare) {
    int device = 0;
    JR_CHECK(report, cudaGetDevice(&device));
    if (device >= kMaxDevices)
      return report.fail(JR_UNSUPPORTED, "device is %d; expected less than %d", device, kMaxDevices);
    State& state = states_[device];
    if (state.ready) return JR_OK;
    const std::lock_guard<std::mutex> lock(state.mutex);
    if (state.ready) return JR_OK;  // another thread was faster
    const int status = prepare(device);
    if (status == JR_OK) state.ready = true;
    return status;
  }

  static constexpr int kMaxDevices = 64;

 private:
  struct State {
    std::mutex mutex;
    std::atomic<bool> ready = false;
  };
  State states_[kMaxDevices];
};

}  // namespace jax_router
