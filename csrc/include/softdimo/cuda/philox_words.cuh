// The random words of consecutive entries of a row: softdimo/philox.h, with the keys of its rounds in shared memory.
// The rounds of one block take 20 key additions, as many as they have products; five 128-bit loads replace them, for
// all blocks of a thread's chunk.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace softdimo::cuda {

constexpr int kRoundKeyQuads = 5;  // two rounds each, two words a round

// Fills `keys` by the block's first threads; a barrier has to follow.
__device__ __forceinline__ void store_round_keys(uint64_t seed, uint4* keys) {
  const uint32_t i = threadIdx.x;
  if (i >= kRoundKeyQuads) return;
  const uint32_t first = static_cast<uint32_t>(seed) + 2 * i * 0x9E3779B9u;
  const uint32_t second = static_cast<uint32_t>(seed >> 32) + 2 * i * 0xBB67AE85u;
  keys[i] = make_uint4(first, second, first + 0x9E3779B9u, second + 0xBB67AE85u);
}

// Entries kCount * j, ... of a row: entry v has word v % 4 of block v / 4.
template <int kCount>
__device__ __forceinline__ void philox_words(const uint4* keys, uint64_t row, uint32_t offset, int j,
                                             uint32_t (&word)[kCount]) {
  constexpr int kBlocks = kCount / 4;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    word[4 * b] = static_cast<uint32_t>(row);
    word[4 * b + 1] = static_cast<uint32_t>(row >> 32);
    word[4 * b + 2] = static_cast<uint32_t>(j * kBlocks + b);
    word[4 * b + 3] = offset;
  }
#pragma unroll
  for (int i = 0; i < kRoundKeyQuads; ++i) {
    const uint4 quad = keys[i];
    const uint32_t key[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int round = 0; round < 2; ++round) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t* c = word + 4 * b;
        const uint64_t product0 = uint64_t{0xD2511F53} * c[0];
        const uint64_t product1 = uint64_t{0xCD9E8D57} * c[2];
        c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key[2 * round];
        c[1] = static_cast<uint32_t>(product1);
        c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key[2 * round + 1];
        c[3] = static_cast<uint32_t>(product0);
      }
    }
  }
}

}  // namespace softdimo::cuda
