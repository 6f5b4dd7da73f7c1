// Load beside the kernels that are verified: copies inside the GPU's memory, copies to and from pinned memory of the
// host, and kernels of changing size that occupy multiprocessors and shared memory. A thread keeps a few of each in
// flight, on streams of their own.
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>

#include "../status.h"
#include "verification.h"

namespace jax_router_verification {
namespace {

using jax_router::Report;

constexpr size_t kDeviceBytes = size_t(128) << 20, kHostBytes = size_t(16) << 20;
constexpr int kCopyBlocks = 40, kCopyThreads = 256, kCopyUnroll = 8;
constexpr int kInFlight = 3;  // of every kind
// Busy multiprocessors leave most of the others free: what is verified is to run beside them, not after them.
constexpr int kBusyThreads = 256, kBusyShared = 200 << 10, kMostBlocks = 32;
constexpr unsigned kShortest = 1000, kLongest = 8000;  // nanoseconds

// Copies kDeviceBytes. Not cudaMemcpyAsync, whose blocks take every multiprocessor until it is done.
__global__ void __launch_bounds__(kCopyThreads) copy_memory(uint4* to, const uint4* from) {
  constexpr size_t kStep = size_t(kCopyBlocks) * kCopyThreads;
  for (size_t i = blockIdx.x * size_t(kCopyThreads) + threadIdx.x; i < kDeviceBytes / 16; i += kStep * kCopyUnroll) {
    uint4 values[kCopyUnroll];
#pragma unroll
    for (int j = 0; j < kCopyUnroll; ++j) {
      if (i + j * kStep < kDeviceBytes / 16) values[j] = __ldcs(from + i + j * kStep);
    }
#pragma unroll
    for (int j = 0; j < kCopyUnroll; ++j) {
      if (i + j * kStep < kDeviceBytes / 16) __stcs(to + i + j * kStep, values[j]);
    }
  }
}

// Occupies a multiprocessor for so many nanoseconds.
__global__ void occupy(unsigned nanoseconds) {
  extern __shared__ uint32_t shared[];
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    shared[threadIdx.x] = shared[threadIdx.x] * 1664525u + 1013904223u;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}

// A stream with a few operations in flight.
struct Lane {
  cudaStream_t stream = nullptr;
  cudaEvent_t events[kInFlight] = {};
  int next = 0;

  cudaError_t create() {
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (cudaEvent_t& event : events) {
      if (error == cudaSuccess) error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    }
    return error;
  }
  ~Lane() {
    for (const cudaEvent_t event : events) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  // Whether another operation may be enqueued.
  bool has_room() const { return cudaEventQuery(events[next]) != cudaErrorNotReady; }
  cudaError_t enqueued() {
    const cudaError_t error = cudaEventRecord(events[next], stream);
    next = (next + 1) % kInFlight;
    return error;
  }
};

class Load {
 public:
  ~Load() {
    stop();
    cudaSetDevice(device_);
    cudaFree(device_memory_);
    cudaFreeHost(host_memory_);
  }

  int start(int device, const Report& report) {
    device_ = device;
    JR_CHECK(report, cudaSetDevice(device));
    JR_CHECK(report, cudaMalloc(&device_memory_, 2 * kDeviceBytes + kHostBytes));
    JR_CHECK(report, cudaMallocHost(&host_memory_, kHostBytes));
    for (Lane* lane : {&copies_, &transfers_, &busy_}) JR_CHECK(report, lane->create());
    JR_CHECK(report, cudaFuncSetAttribute(&occupy, cudaFuncAttributeMaxDynamicSharedMemorySize, kBusyShared));
    thread_ = std::thread([this] { run(); });
    return JR_OK;
  }

  int finish(jr_load_done* done, const Report& report) {
    stop();
    *done = done_;
    return report.check(error_, "the load");
  }

 private:
  void stop() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
  }

  void run() {
    error_ = cudaSetDevice(device_);
    std::mt19937 random(1);
    while (!stopping_ && error_ == cudaSuccess) {
      bool enqueued = false;
      const auto keep_busy = [&](Lane& lane, const auto& enqueue) {
        if (error_ != cudaSuccess || !lane.has_room()) return;
        error_ = enqueue(lane.stream);
        if (error_ == cudaSuccess) error_ = lane.enqueued();
        enqueued = true;
      };
      keep_busy(copies_, [&](cudaStream_t stream) {
        done_.device_bytes += int64_t(kDeviceBytes);
        copy_memory<<<kCopyBlocks, kCopyThreads, 0, stream>>>(
            reinterpret_cast<uint4*>(device_memory_), reinterpret_cast<const uint4*>(device_memory_ + kDeviceBytes));
        return cudaGetLastError();
      });
      keep_busy(transfers_, [&](cudaStream_t stream) {
        done_.host_bytes += int64_t(kHostBytes);
        uint8_t* const device = device_memory_ + 2 * kDeviceBytes;
        return random() % 2 == 0 ? cudaMemcpyAsync(device, host_memory_, kHostBytes, cudaMemcpyHostToDevice, stream)
                                 : cudaMemcpyAsync(host_memory_, device, kHostBytes, cudaMemcpyDeviceToHost, stream);
      });
      keep_busy(busy_, [&](cudaStream_t stream) {
        ++done_.busy_launches;
        const unsigned blocks = 1 + random() % kMostBlocks, shared = 1024 + random() % (kBusyShared - 1024);
        occupy<<<blocks, kBusyThreads, shared, stream>>>(kShortest + random() % (kLongest - kShortest));
        return cudaGetLastError();
      });
      if (!enqueued) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    for (const Lane* lane : {&copies_, &transfers_, &busy_}) {
      const cudaError_t error = cudaStreamSynchronize(lane->stream);
      if (error_ == cudaSuccess) error_ = error;
    }
  }

  int device_ = 0;
  uint8_t* device_memory_ = nullptr;
  uint8_t* host_memory_ = nullptr;
  Lane copies_, transfers_, busy_;
  jr_load_done done_ = {};
  cudaError_t error_ = cudaSuccess;
  std::atomic<bool> stopping_ = false;
  std::thread thread_;
};

std::unique_ptr<Load> running;

}  // namespace
}  // namespace jax_router_verification

using namespace jax_router_verification;

int jr_load_start(int device, char* message, size_t message_bytes) {
  const jax_router::Report report{message, message_bytes};
  if (running != nullptr) return report.fail(JR_UNSUPPORTED, "a load is running; expected none, stop it first");
  auto load = std::make_unique<Load>();
  const int status = load->start(device, report);
  if (status == JR_OK) running = std::move(load);
  return status;
}

int jr_load_stop(jr_load_done* done, char* message, size_t message_bytes) {
  const jax_router::Report report{message, message_bytes};
  if (running == nullptr) return report.fail(JR_UNSUPPORTED, "no load is running; start one first");
  const int status = running->finish(done, report);
  running.reset();
  return status;
}
