// C interface of what verification needs on the GPU beside the kernels: neighbours that launch programmatically, load,
// and memory that ends where nothing is mapped. It knows none of the kernels and is no part of their library.
//
// As of ../router_gemm.h: a status and a message; `stream` is a cudaStream_t.
#pragma once

#include <stdint.h>

#include "../router_gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- Neighbours (neighbours.cu) ------------------------------------------------------------------------------------

enum { JR_MAX_PARTS = 8 };
typedef struct jr_part {
  void* to;          // device memory, 4-byte aligned
  const void* from;  // the same
  int64_t bytes;     // a multiple of 4
} jr_part;

// On the device, zero at first. The members behind the counts are of one of the wrong words.
typedef struct jr_wrong {
  uint32_t words, early_words;  // seen by threads that waited, and by those that did not
  int32_t launch, part;
  uint32_t word, expected, got, early;
} jr_wrong;

// Copies `from` to `to`: lets its successor start at once, waits for its predecessor, dawdles, and only then writes.
JR_EXPORT int jr_neighbour_produce(const jr_part* parts, int count, void* stream, char* message, size_t message_bytes);

// Compares `to` with `from`, the expected words, in `wrong`, then fills `to` with JR_POISON: two launches. One warp of
// each block compares without waiting for the predecessor: what it reads was stored before that let it start.
enum { JR_POISON = 0xFF };  // every byte: a NaN, and no expert
JR_EXPORT int jr_neighbour_consume(const jr_part* parts, int count, int launch, jr_wrong* wrong, void* stream,
                                   char* message, size_t message_bytes);

// How many words of a part differ, and the first of them.
typedef struct jr_differing {
  uint32_t words, first, expected, got;
} jr_differing;

// Says in `differing[i]` how `to` of part i, which is only read, differs from `from`. Any number of parts.
JR_EXPORT int jr_find_differing(const jr_part* parts, int count, jr_differing* differing, void* stream, char* message,
                                size_t message_bytes);

// How often it was called since the library was loaded: to launch, and into a CUDA graph.
typedef struct jr_calls {
  int64_t launched, captured;
} jr_calls;
JR_EXPORT void jr_find_differing_calls(jr_calls* calls);

// ---- Load (load.cu) ------------------------------------------------------------------------------------------------

typedef struct jr_load_done {
  int64_t device_bytes, host_bytes;  // copied inside the GPU's memory, and to and from pinned memory of the host
  int64_t busy_launches;             // of kernels that occupy multiprocessors and their shared memory
} jr_load_done;

// Starts a thread that keeps three streams of `device` busy. One at a time.
JR_EXPORT int jr_load_start(int device, char* message, size_t message_bytes);
// Ends it, and says what was done.
JR_EXPORT int jr_load_stop(jr_load_done* done, char* message, size_t message_bytes);

// ---- Fenced memory (fence.cu) --------------------------------------------------------------------------------------

// `bytes` of device memory that end where nothing is mapped: to touch one byte more is an illegal access. Before them
// lie `*before` mapped bytes. Everything is filled with `poison`.
JR_EXPORT int jr_fence_create(int64_t bytes, int poison, void** address, int64_t* before, char* message,
                              size_t message_bytes);
JR_EXPORT int jr_fence_free(void* address, char* message, size_t message_bytes);
// Blocking copies to and from device memory, after everything that was launched before.
JR_EXPORT int jr_fence_write(void* address, const void* from, int64_t bytes, char* message, size_t message_bytes);
JR_EXPORT int jr_fence_read(void* to, const void* address, int64_t bytes, char* message, size_t message_bytes);

#ifdef __cplusplus
}
#endif
