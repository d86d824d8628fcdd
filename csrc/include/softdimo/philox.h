// Philox4x32-10: counter-based random words, the same on every backend.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

#if defined(__CUDACC__)
#define SOFTDIMO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SOFTDIMO_HOST_DEVICE SOFTDIMO_ALWAYS_INLINE
#endif

namespace softdimo {

struct Words {
  uint32_t word[4];
};

SOFTDIMO_HOST_DEVICE Words philox4x32(uint64_t key, uint64_t row, uint32_t block, uint32_t offset) {
  uint32_t c0 = static_cast<uint32_t>(row), c1 = static_cast<uint32_t>(row >> 32), c2 = block, c3 = offset;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), low0 = static_cast<uint32_t>(product0);
    const uint32_t high1 = static_cast<uint32_t>(product1 >> 32), low1 = static_cast<uint32_t>(product1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A word on the open interval (0, 1): exact near 0, at most 1 - 2^-24.
SOFTDIMO_HOST_DEVICE float open_uniform(uint32_t word) {
  const float u = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
  return u < 0.99999994f ? u : 0.99999994f;                                     // 1 - 2^-24
}

}  // namespace softdimo
