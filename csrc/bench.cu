// Times launches the way a decode step pays for them: many in one CUDA graph, replayed. Beside the router GEMM and
// routing it times the two bounds nothing can beat: an empty launch, and reading every byte of the weight once. And
// what a call costs the host.
#include <chrono>

#include "route.h"
#include "sm90_primitives.cuh"
#include "status.h"

namespace jax_router {
namespace {

constexpr int kReadThreads = 256;

__global__ void empty_launch() {}

// Reads `chunks` x 16 bytes once, spread over all blocks. The store keeps the loads alive and does not happen on real
// data.
__global__ void __launch_bounds__(kReadThreads) read_weight(const uint4* weight, int64_t chunks, uint32_t* never) {
  uint32_t mixed = 0;
  for (int64_t i = int64_t(blockIdx.x) * kReadThreads + threadIdx.x; i < chunks;
       i += int64_t(gridDim.x) * kReadThreads) {
    const uint4 v = load_streamed(weight + i);
    mixed |= v.x & v.y & v.z & v.w;
  }
  if (mixed == 0xFFFFFFFFu) *never = mixed;  // needs every bit set in some chunk: all-NaN weights
}

int enqueue(int operation, const jr_router_gemm_args& args, cudaStream_t stream, const Report& report) {
  if (operation == JR_OP_ROUTER_GEMM) return jr_router_gemm(&args, stream, report.message, report.bytes);
  if (operation == JR_OP_EMPTY) {
    empty_launch<<<1, 32, 0, stream>>>();
    return report.check(cudaGetLastError(), "launch of empty_launch");
  }
  if (operation == JR_OP_READ_WEIGHT) {
    const int64_t chunks = args.experts * args.hidden * (args.weight_dtype == JR_FLOAT32 ? 4 : 2) / 16;
    // One load per thread where that fits, at most eight blocks on each of 132 multiprocessors.
    const int64_t blocks = (chunks + kReadThreads - 1) / kReadThreads;
    read_weight<<<unsigned(blocks < 1056 ? blocks : 1056), kReadThreads, 0, stream>>>(
        static_cast<const uint4*>(args.weight), chunks, static_cast<uint32_t*>(args.out));
    return report.check(cudaGetLastError(), "launch of read_weight");
  }
  return report.fail(JR_UNSUPPORTED, "operation is %d; expected 0, 1 or 2", operation);
}

// Everything one timing owns, released on every path.
struct Owned {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t start = nullptr, stop = nullptr;

  ~Owned() {
    if (start != nullptr) cudaEventDestroy(start);
    if (stop != nullptr) cudaEventDestroy(stop);
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

// See jr_time_graph(). `enqueue_variant` puts one launch, or what belongs to one call, on a stream.
template <typename EnqueueVariant>
int time_replay(const EnqueueVariant& enqueue_variant, int num_variants, int launches, int repeats,
                float* microseconds_per_launch, const Report& report) {
  if (num_variants < 1 || launches < 1 || repeats < 1)
    return report.fail(JR_UNSUPPORTED, "num_variants is %d, launches %d, repeats %d; expected at least 1", num_variants,
                       launches, repeats);
  Owned owned;
  JR_CHECK(report, cudaStreamCreateWithFlags(&owned.stream, cudaStreamNonBlocking));
  JR_CHECK(report, cudaEventCreate(&owned.start));
  JR_CHECK(report, cudaEventCreate(&owned.stop));

  int status = enqueue_variant(0, owned.stream);  // what is set up once per device is set up outside of the capture
  if (status != JR_OK) return status;
  JR_CHECK(report, cudaStreamBeginCapture(owned.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches && status == JR_OK; ++i) status = enqueue_variant(i % num_variants, owned.stream);
  const cudaError_t captured = cudaStreamEndCapture(owned.stream, &owned.graph);
  if (status != JR_OK) return status;
  JR_CHECK(report, captured);
  JR_CHECK(report, cudaGraphInstantiate(&owned.executable, owned.graph, 0));

  for (int warm_up = 0; warm_up < 3; ++warm_up) JR_CHECK(report, cudaGraphLaunch(owned.executable, owned.stream));
  for (int i = 0; i < repeats; ++i) {
    JR_CHECK(report, cudaEventRecord(owned.start, owned.stream));
    JR_CHECK(report, cudaGraphLaunch(owned.executable, owned.stream));
    JR_CHECK(report, cudaEventRecord(owned.stop, owned.stream));
    JR_CHECK(report, cudaEventSynchronize(owned.stop));
    float milliseconds = 0.f;
    JR_CHECK(report, cudaEventElapsedTime(&milliseconds, owned.start, owned.stop));
    microseconds_per_launch[i] = milliseconds * 1000.f / float(launches);
  }
  return JR_OK;
}

// See jr_time_host(). `enqueue_call` puts one call on a stream.
template <typename EnqueueCall>
int time_host(const EnqueueCall& enqueue_call, int calls, int repeats, float* nanoseconds_per_call,
              const Report& report) {
  constexpr int kMostCalls = 256;  // of two launches at most: fewer than a stream holds before a launch waits
  if (calls < 1 || calls > kMostCalls || repeats < 1)
    return report.fail(JR_UNSUPPORTED, "calls is %d, repeats %d; expected 1 to %d calls and at least 1 repeat", calls,
                       repeats, kMostCalls);
  Owned owned;
  JR_CHECK(report, cudaStreamCreateWithFlags(&owned.stream, cudaStreamNonBlocking));
  for (int i = -1; i < repeats; ++i) {  // the first one warms up
    const auto begin = std::chrono::steady_clock::now();
    for (int call = 0; call < calls; ++call)
      if (const int status = enqueue_call(owned.stream); status != JR_OK) return status;
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - begin;
    JR_CHECK(report, cudaStreamSynchronize(owned.stream));
    if (i >= 0) nanoseconds_per_call[i] = float(spent.count() / calls);
  }
  return JR_OK;
}

}  // namespace
}  // namespace jax_router

using namespace jax_router;

int jr_time_graph(int operation, const jr_router_gemm_args* variants, int num_variants, int launches, int repeats,
                  float* microseconds_per_launch, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  const auto enqueue_variant = [&](int i, cudaStream_t stream) {
    return enqueue(operation, variants[i], stream, report);
  };
  return time_replay(enqueue_variant, num_variants, launches, repeats, microseconds_per_launch, report);
}

int jr_time_route_graph(const jr_route_args* variants, int num_variants, int launches, int repeats,
                        float* microseconds_per_launch, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  const auto enqueue_variant = [&](int i, cudaStream_t stream) {
    return jr_route(&variants[i], stream, message, message_bytes);
  };
  return time_replay(enqueue_variant, num_variants, launches, repeats, microseconds_per_launch, report);
}

int jr_time_host(int operation, const jr_router_gemm_args* args, int calls, int repeats, float* nanoseconds_per_call,
                 char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  const auto enqueue_call = [&](cudaStream_t stream) { return enqueue(operation, *args, stream, report); };
  return time_host(enqueue_call, calls, repeats, nanoseconds_per_call, report);
}

int jr_time_route_host(const jr_route_args* args, int calls, int repeats, float* nanoseconds_per_call, char* message,
                       size_t message_bytes) {
  const Report report{message, message_bytes};
  const auto enqueue_call = [&](cudaStream_t stream) { return jr_route(args, stream, message, message_bytes); };
  return time_host(enqueue_call, calls, repeats, nanoseconds_per_call, report);
}
