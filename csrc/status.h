// How the C interface reports: one status, one message that names the call and the values.
#pragma once

#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdio.h>

#include "router_gemm.h"

namespace jax_router {

struct Report {
  char* message;
  size_t bytes;

  __attribute__((format(printf, 3, 4))) int fail(int status, const char* format, ...) const {
    va_list values;
    va_start(values, format);
    if (message != nullptr && bytes > 0) vsnprintf(message, bytes, format, values);
    va_end(values);
    return status;
  }

  // JR_OK, or JR_CUDA_ERROR with the call's name and CUDA's own words; it is then no longer CUDA's last error.
  int check(cudaError_t error, const char* call) const {
    if (error == cudaSuccess) return JR_OK;
    cudaGetLastError();
    return fail(JR_CUDA_ERROR, "%s failed: %s (%s)", call, cudaGetErrorName(error), cudaGetErrorString(error));
  }
};

}  // namespace jax_router

// Returns from the enclosing function unless the CUDA call succeeds.
#define JR_CHECK(report, call)                                                                     \
  do {                                                                                             \
    if (const int jr_status = (report).check((call), #call); jr_status != JR_OK) return jr_status; \
  } while (0)
