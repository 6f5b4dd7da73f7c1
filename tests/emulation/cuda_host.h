// The runtime as the launchers call it, on the CPU: the end of cuda_runtime.h, which includes it.
#pragma once

#include <stdint.h>
#include <stdlib.h>

using cudaError_t = int;
using cudaStream_t = void*;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
using CUresult = int;
constexpr int cudaSuccess = 0, CUDA_SUCCESS = 0, cudaEnableDefault = 0;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
constexpr int CU_TENSOR_MAP_INTERLEAVE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_64B = 2, CU_TENSOR_MAP_SWIZZLE_128B = 3,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 2,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0;
struct CUtensorMap {
  const uint16_t* matrix;
  int64_t rows, columns;
  int box_rows, box_columns;
};
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, uint32_t, void* matrix,
                                       const cuuint64_t* sizes, const cuuint64_t* stride, const cuuint32_t* box,
                                       const cuuint32_t*, int, int swizzle, int, int) {
  if (box[0] != (swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 64 : 32) || stride[0] != sizes[0] * 2 || stride[0] % 16 != 0)
    return 1;
  *map = {static_cast<const uint16_t*>(matrix), int64_t(sizes[1]), int64_t(sizes[0]), int(box[1]), int(box[0])};
  return CUDA_SUCCESS;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "none"; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
// How many clusters of 16 this GPU runs at once: like an H200, or as the variable says, like a part of one; -1 if it
// refuses to say.
inline int clusters_of_16() {
  const char* const variable = getenv("EMULATED_CLUSTERS");
  return variable == nullptr ? 7 : atoi(variable);
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = clusters_of_16();
  return *clusters < 0 ? 912 : cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments);
