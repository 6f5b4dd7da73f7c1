// Device memory that ends where nothing is mapped, by the driver's virtual memory: a read or a write past the end is an
// illegal access, at the kernel's own speed and without a tool.
#include <cuda.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "../status.h"
#include "verification.h"

namespace jax_router_verification {
namespace {

using jax_router::Report;

template <typename Function>
Function driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

// The driver's functions; the library is not linked with the driver.
struct Driver {
  decltype(&cuMemGetAllocationGranularity) granularity = driver<decltype(granularity)>("cuMemGetAllocationGranularity");
  decltype(&cuMemAddressReserve) reserve = driver<decltype(reserve)>("cuMemAddressReserve");
  decltype(&cuMemAddressFree) unreserve = driver<decltype(unreserve)>("cuMemAddressFree");
  decltype(&cuMemCreate) create = driver<decltype(create)>("cuMemCreate");
  decltype(&cuMemRelease) release = driver<decltype(release)>("cuMemRelease");
  decltype(&cuMemMap) map = driver<decltype(map)>("cuMemMap");
  decltype(&cuMemUnmap) unmap = driver<decltype(unmap)>("cuMemUnmap");
  decltype(&cuMemSetAccess) set_access = driver<decltype(set_access)>("cuMemSetAccess");

  bool complete() const {
    return granularity && reserve && unreserve && create && release && map && unmap && set_access;
  }
};

struct Fence {
  CUdeviceptr base;
  size_t reserved, mapped;
  CUmemGenericAllocationHandle handle;
};

std::mutex mutex;
std::map<uintptr_t, Fence> fences;  // by the address that was given out

const Driver& the_driver() {
  static const Driver found;
  return found;
}

int check(CUresult result, const char* call, const Report& report) {
  return result == CUDA_SUCCESS ? int(JR_OK) : report.fail(JR_CUDA_ERROR, "%s failed: CUresult %d", call, int(result));
}

}  // namespace
}  // namespace jax_router_verification

using namespace jax_router_verification;

#define JR_DRIVER(call)                                                                  \
  do {                                                                                   \
    if (const int status = check((call), #call, report); status != JR_OK) return status; \
  } while (0)

int jr_fence_create(int64_t bytes, int poison, void** address, int64_t* before, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  if (bytes < 1) return report.fail(JR_UNSUPPORTED, "bytes is %lld; expected 1 or more", static_cast<long long>(bytes));
  int device = 0;
  JR_CHECK(report, cudaGetDevice(&device));
  JR_CHECK(report, cudaFree(nullptr));  // the context
  const Driver& d = the_driver();
  if (!d.complete())
    return report.fail(JR_UNSUPPORTED, "the driver has no virtual memory; expected CUDA 12.0 or newer");
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  size_t granularity = 0;
  JR_DRIVER(d.granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  // At least one granule before the bytes, for canaries, and one behind, unmapped.
  Fence fence = {};
  fence.mapped = (size_t(bytes) + granularity - 1) / granularity * granularity + granularity;
  fence.reserved = fence.mapped + granularity;
  JR_DRIVER(d.reserve(&fence.base, fence.reserved, 0, 0, 0));
  JR_DRIVER(d.create(&fence.handle, fence.mapped, &properties, 0));
  JR_DRIVER(d.map(fence.base, fence.mapped, 0, fence.handle, 0));
  CUmemAccessDesc access = {};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  JR_DRIVER(d.set_access(fence.base, fence.mapped, &access, 1));
  JR_CHECK(report, cudaMemset(reinterpret_cast<void*>(fence.base), poison, fence.mapped));
  JR_CHECK(report, cudaDeviceSynchronize());
  const uintptr_t given = uintptr_t(fence.base) + fence.mapped - size_t(bytes);
  *address = reinterpret_cast<void*>(given);
  *before = int64_t(given - uintptr_t(fence.base));
  const std::lock_guard<std::mutex> lock(mutex);
  fences[given] = fence;
  return JR_OK;
}

int jr_fence_free(void* address, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = fences.find(reinterpret_cast<uintptr_t>(address));
  if (found == fences.end())
    return report.fail(JR_UNSUPPORTED, "address is %p; expected one that was created", address);
  const Fence fence = found->second;
  fences.erase(found);
  JR_CHECK(report, cudaDeviceSynchronize());
  const Driver& d = the_driver();
  JR_DRIVER(d.unmap(fence.base, fence.mapped));
  JR_DRIVER(d.release(fence.handle));
  JR_DRIVER(d.unreserve(fence.base, fence.reserved));
  return JR_OK;
}

int jr_fence_write(void* address, const void* from, int64_t bytes, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  JR_CHECK(report, cudaDeviceSynchronize());
  return report.check(cudaMemcpy(address, from, size_t(bytes), cudaMemcpyHostToDevice), "copy to the device");
}

int jr_fence_read(void* to, const void* address, int64_t bytes, char* message, size_t message_bytes) {
  const Report report{message, message_bytes};
  JR_CHECK(report, cudaDeviceSynchronize());
  return report.check(cudaMemcpy(to, address, size_t(bytes), cudaMemcpyDeviceToHost), "copy from the device");
}
