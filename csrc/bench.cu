// Times launches the way a decode step pays for them: many in one CUDA graph, replayed. Beside the router GEMM and
// routing it times the two bounds nothing can beat: an empty launch, and reading every byte of the weight once.
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
    const int64_t chunks = args.experts * args.hidden * (args.dtype == JR_FLOAT32 ? 4 : 2) / 16;
    // One load per thread where that fits, at most eight blocks on each of 132 multiprocessors.
    const int64_t blocks = (chunks + kReadThreads - 1) / kReadThreads;
    read_weight<<<unsigned(blocks < 1056 ? blocks : 1056), kReadThreads, 0, stream>>>(
        static_cast<const uint4*>(args.weight), chunks, static_cast<uint32_t*>(args.out));
    return report.check(cudaGetLastError(), "launch of read_weight");
  }
  return report.fail(JR_UNSUPPORTED, "operation is %d; expected 0, 1 or 2", operation);
}

// Everything one timing owns, released on every path.
struct Replay {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t start = nullptr, stop = nullptr;

  ~Replay() {
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
  Replay replay;
  JR_CHECK(report, cudaStreamCreateWithFlags(&replay.stream, cudaStreamNonBlocking));
  JR_CHECK(report, cudaEventCreate(&replay.start));
  JR_CHECK(report, cudaEventCreate(&replay.stop));

  int status = enqueue_variant(0, replay.stream);  // what is set up once per device is set up outside of the capture
  if (status != JR_OK) return status;
  JR_CHECK(report, cudaStreamBeginCapture(replay.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches && status == JR_OK; ++i) status = enqueue_variant(i % num_variants, replay.stream);
  const cudaError_t captured = cudaStreamEndCapture(replay.stream, &replay.graph);
  if (status != JR_OK) return status;
  JR_CHECK(report, captured);
  JR_CHECK(report, cudaGraphInstantiate(&replay.executable, replay.graph, 0));

  for (int warm_up = 0; warm_up < 3; ++warm_up) JR_CHECK(report, cudaGraphLaunch(replay.executable, replay.stream));
  for (int i = 0; i < repeats; ++i) {
    JR_CHECK(report, cudaEventRecord(replay.start, replay.stream));
    JR_CHECK(report, cudaGraphLaunch(replay.executable, replay.stream));
    JR_CHECK(report, cudaEventRecord(replay.stop, replay.stream));
    JR_CHECK(report, cudaEventSynchronize(replay.stop));
    float milliseconds = 0.f;
    JR_CHECK(report, cudaEventElapsedTime(&milliseconds, replay.start, replay.stop));
    microseconds_per_launch[i] = milliseconds * 1000.f / float(launches);
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
