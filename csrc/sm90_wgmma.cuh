// wgmma.m64nNk16 with both operands in shared memory (swizzled), float32 accumulator in registers:
// element 4j..4j+3 of `d` is this lane's quad (sm90_tile.cuh) of expert tile j and token tile warp % 4.
#pragma once

#include "sm90_primitives.cuh"

namespace jax_router {

__device__ __forceinline__ void wgmma_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns when all but the last kPending commits have finished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The same for the results in `d`: nothing that reads them moves above it.
template <int kPending, int kSums>
__device__ __forceinline__ void wgmma_wait(float (&d)[kSums]) {
  wgmma_wait<kPending>();
#pragma unroll
  for (int j = 0; j < kSums; ++j) asm volatile("" : "+f"(d[j])::"memory");
}

// Moves registers between warpgroups; all warps of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Describes rows of 128 bytes, eight rows to a swizzle atom of 1024 bytes, by the low word of tile_descriptor(): the
// 1024-byte aligned shared address over 16. Adding bytes / 16 moves it; a k16 step is 32 bytes.
__device__ __forceinline__ uint32_t tile_descriptor_word(uint32_t address) {
  constexpr uint32_t kUnused = 1u << 16;
  return kUnused | ((address & 0x3FFFF) >> 4);
}
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t word) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kAtomStride = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kAtomStride | word;
}

// The weights' part of a stage: a unit of kExperts rows of 128 bytes, or stored [hidden, experts] in boxes of up to 64
// experts, a row of the box per element of K, swizzled within the row, eight rows to an atom. Its descriptor likewise;
// a k16 step moves the word by kStepWord.
template <int kExperts, bool kHiddenExperts>
struct WeightTile {
  static constexpr int kStepWord = 2;
  static __device__ __forceinline__ uint32_t descriptor_word(uint32_t address) { return tile_descriptor_word(address); }
  static __device__ __forceinline__ uint64_t descriptor(uint32_t word) { return tile_descriptor(word); }
};
template <int kExperts>
struct WeightTile<kExperts, true> {
  static constexpr int kBoxRowBytes = kExperts < 64 ? kExperts * 2 : 128, kStepWord = kBoxRowBytes;  // 16 rows, over 16
  static_assert(kBoxRowBytes == 64 || kBoxRowBytes == 128, "a swizzle of its width");
  static __device__ __forceinline__ uint32_t descriptor_word(uint32_t address) {
    constexpr uint32_t kBoxStride = 64 * kBoxRowBytes >> 4;
    return kBoxStride << 16 | (address & 0x3FFFF) >> 4;
  }
  static __device__ __forceinline__ uint64_t descriptor(uint32_t word) {
    constexpr uint64_t kSwizzle = uint64_t(kBoxRowBytes == 128 ? 1 : 2) << 62;
    constexpr uint64_t kAtomStride = uint64_t(8 * kBoxRowBytes >> 4) << 32;
    return kSwizzle | kAtomStride | word;
  }
};

// d (+)= a[64, 16] @ b[N, 16].T, with kHiddenExperts b[16, N]; `accumulate` 0 starts from zero.
template <typename Element, int kExperts>
struct Wgmma;

#define JR_D4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define JR_D16(d, i) JR_D4(d, i), JR_D4(d, (i) + 4), JR_D4(d, (i) + 8), JR_D4(d, (i) + 12)
#define JR_WGMMA(ELEMENT, TYPE, N, REGISTERS, A, B, ACCUMULATE, TRANSPOSED, ...)                                      \
  template <>                                                                                                         \
  struct Wgmma<ELEMENT, N> {                                                                                          \
    template <bool kHiddenExperts>                                                                                    \
    static __device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, uint32_t accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N        \
                   "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B ", p, 1, 1, 0, " TRANSPOSED ";\n}\n"        \
                   : __VA_ARGS__                                                                                      \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(kHiddenExperts)));                                      \
    }                                                                                                                 \
  };
#define JR_R16A "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define JR_R16B "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define JR_R16C "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define JR_R16D "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define JR_R8C "%32,%33,%34,%35,%36,%37,%38,%39"
#define JR_WGMMA_ALL(ELEMENT, TYPE)                                                                                    \
  JR_WGMMA(ELEMENT, TYPE, 32, JR_R16A, "%16", "%17", "%18", "%19", JR_D16(d, 0))                                       \
  JR_WGMMA(ELEMENT, TYPE, 64, JR_R16A "," JR_R16B, "%32", "%33", "%34", "%35", JR_D16(d, 0), JR_D16(d, 16))            \
  JR_WGMMA(ELEMENT, TYPE, 80, JR_R16A "," JR_R16B "," JR_R8C, "%40", "%41", "%42", "%43", JR_D16(d, 0), JR_D16(d, 16), \
           JR_D4(d, 32), JR_D4(d, 36))                                                                                 \
  JR_WGMMA(ELEMENT, TYPE, 128, JR_R16A "," JR_R16B "," JR_R16C "," JR_R16D, "%64", "%65", "%66", "%67", JR_D16(d, 0),  \
           JR_D16(d, 16), JR_D16(d, 32), JR_D16(d, 48))
JR_WGMMA_ALL(bfloat16, "bf16")
JR_WGMMA_ALL(float16, "f16")
#undef JR_WGMMA_ALL
#undef JR_R8C
#undef JR_R16A
#undef JR_R16B
#undef JR_R16C
#undef JR_R16D
#undef JR_WGMMA
#undef JR_D16
#undef JR_D4

}  // namespace jax_router
