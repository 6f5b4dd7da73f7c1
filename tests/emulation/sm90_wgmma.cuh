// The same functions as csrc/sm90_wgmma.cuh, on the CPU: a thread works out its own accumulators from shared memory.
#pragma once

#include "sm90_primitives.cuh"

namespace jax_router {

// The hardware's are collective: every lane of a warp has passed what stands before them.
inline void wgmma_arrive() { __syncwarp(); }
inline void wgmma_commit() {}
template <int kPending>
inline void wgmma_wait() {
  __syncwarp();
}
template <int kPending, int kSums>
inline void wgmma_wait(float (&)[kSums]) {
  __syncwarp();
}
template <int kRegisters>
inline void increase_registers() {}
template <int kRegisters>
inline void decrease_registers() {}

inline uint32_t tile_descriptor_word(uint32_t address) { return 1u << 16 | (address & 0x3FFFF) >> 4; }
inline uint64_t tile_descriptor(uint32_t word) { return uint64_t(1) << 62 | uint64_t(64) << 32 | word; }

template <int kExperts, bool kHiddenExperts>
struct WeightTile {
  static constexpr int kStepWord = 2;
  static uint32_t descriptor_word(uint32_t address) { return tile_descriptor_word(address); }
  static uint64_t descriptor(uint32_t word) { return tile_descriptor(word); }
};
template <int kExperts>
struct WeightTile<kExperts, true> {
  static constexpr int kBoxRowBytes = kExperts < 64 ? kExperts * 2 : 128, kStepWord = kBoxRowBytes;
  static uint32_t descriptor_word(uint32_t address) {
    return uint32_t(kBoxRowBytes * 4) << 16 | (address & 0x3FFFF) >> 4;
  }
  static uint64_t descriptor(uint32_t word) {
    return uint64_t(kBoxRowBytes == 128 ? 1 : 2) << 62 | uint64_t(kBoxRowBytes / 2) << 32 | word;
  }
};

template <typename Element, int kExperts>
struct Wgmma {
  template <bool kHiddenExperts>
  static void multiply(float (&d)[kExperts / 2], uint64_t a, uint64_t b, uint32_t accumulate) {
    constexpr uint64_t kFixed = uint64_t(1) << 62 | uint64_t(64) << 32 | uint64_t(1) << 16;
    const uint64_t weights = WeightTile<kExperts, kHiddenExperts>::descriptor(
        WeightTile<kExperts, kHiddenExperts>::descriptor_word(0));
    if ((a & ~0x3FFFull) != kFixed || (b & ~0x3FFFull) != weights) fail("not the descriptor of a swizzled tile");
    const auto element = [](uint64_t descriptor, int row, int k) {
      const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4, column = start % 1024 + k * 2;
      if (column >= 128) fail("a wgmma step beyond its unit");
      uint16_t bits;
      memcpy(&bits, block->shared + start / 1024 * 1024 + row * 128 + (column / 16 ^ row % 8) * 16 + column % 16, 2);
      return double(widened(bits, Element()));
    };
    // Element k of an expert, of a step of weights [hidden, experts]: as the hardware reads what `weights` describes.
    const auto weight = [&](int expert, int k) {
      if (!kHiddenExperts) return element(b, expert, k);
      const uint32_t start = uint32_t(b & 0x3FFF) << 4, row_bytes = b >> 62 == 1 ? 128 : 64;
      const uint32_t atom = uint32_t(b >> 32 & 0x3FFF) << 4, box = uint32_t(b >> 16 & 0x3FFF) << 4;
      const uint32_t plain = start + expert / (row_bytes / 2) * box + k / 8 * atom + k % 8 * row_bytes +
                             expert * 2 % row_bytes;
      const uint32_t turned = plain ^ (plain >> 7) % (row_bytes / 16) * 16;
      uint16_t bits;
      memcpy(&bits, block->shared + turned, 2);
      return double(widened(bits, Element()));
    };
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int j = 0; j < kExperts / 2; ++j) {
      const int row = first + j % 4 / 2 * 8, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
      double sum = accumulate != 0 ? d[j] : 0.;
      for (int k = 0; k < 16; ++k) sum += element(a, row, k) * weight(column, k);
      d[j] = float(sum);
    }
  }
};

}  // namespace jax_router
