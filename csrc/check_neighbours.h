// A launch between programmatic neighbours under memory traffic: see check_neighbours.cu.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>
#include <vector>

namespace jax_router_check {

// What the producer writes, in chunks of 16 bytes, and what the consumer compares, in words of 4.
struct Produced {
  void* to;
  const void* from;
  size_t bytes;
};
struct Consumed {
  const char* name;
  void* from;
  const void* expected;
  size_t bytes;
};
constexpr int kMaxProduced = 3, kMaxConsumed = 2;
struct Variant {
  std::vector<Produced> produced;
  std::vector<Consumed> consumed;
};

struct Wrong;

class Neighbours {
 public:
  Neighbours();
  ~Neighbours();
  Neighbours(const Neighbours&) = delete;

  // Enqueues producer, `launch` and consumer so many times, one variant after the other, and returns what the consumers
  // found wrong, or an empty text. Nothing is cleared between launches but what the consumer compared. `row_words` of
  // it are one token.
  std::string run(int launches, const std::vector<Variant>& variants, size_t row_words,
                  const std::function<void(cudaStream_t)>& launch);

 private:
  cudaStream_t stream_, traffic_;
  uint8_t* noise_;
  Wrong* wrong_;
};

// Fills with bfloat16 of either sign, magnitudes 2^-5 to 2^-3.
void fill_bfloat16(void* to, size_t count, uint32_t seed);

}  // namespace jax_router_check
