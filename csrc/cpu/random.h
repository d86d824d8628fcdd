// Philox4x32-10 by vectors: the bits of softdimo/philox.h, many counters at a time.
//
// A 64-bit lane holds one 32-bit word of one block's state in its low half; the high half is never read, so a round
// needs no masks: two widening products, two shifts, two sums modulo 2 for SOFTDIMO_SIMD_BYTES / 8 blocks.
#pragma once

#include "simd.h"
#include "softdimo/philox.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

typedef uint64_t WideVec __attribute__((vector_size(SOFTDIMO_SIMD_BYTES)));

constexpr int kBlockLanes = SOFTDIMO_SIMD_BYTES / 8;
constexpr int64_t kUniformStep = 4 * kBlockLanes;  // uniforms are written in multiples of it

// multiply_low: the 64-bit products of the low halves. even_lanes, odd_lanes: a[0] b[0] a[2] b[2] ..., a[1] b[1] ...
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512F__)
SOFTDIMO_ALWAYS_INLINE WideVec multiply_low(WideVec a, WideVec b) {
  return (WideVec)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
}
SOFTDIMO_ALWAYS_INLINE WideVec even_lanes(WideVec a, WideVec b) {
  return (WideVec)_mm512_maskz_unpacklo_epi64(0xFF, (__m512i)a, (__m512i)b);
}
SOFTDIMO_ALWAYS_INLINE WideVec odd_lanes(WideVec a, WideVec b) {
  return (WideVec)_mm512_maskz_unpackhi_epi64(0xFF, (__m512i)a, (__m512i)b);
}
#elif SOFTDIMO_SIMD_BYTES == 32 && defined(__AVX2__)
SOFTDIMO_ALWAYS_INLINE WideVec multiply_low(WideVec a, WideVec b) {
  return (WideVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
SOFTDIMO_ALWAYS_INLINE WideVec even_lanes(WideVec a, WideVec b) {
  return (WideVec)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
}
SOFTDIMO_ALWAYS_INLINE WideVec odd_lanes(WideVec a, WideVec b) {
  return (WideVec)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
}
#elif SOFTDIMO_SIMD_BYTES == 16 && defined(__SSE2__)
SOFTDIMO_ALWAYS_INLINE WideVec multiply_low(WideVec a, WideVec b) {
  return (WideVec)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
SOFTDIMO_ALWAYS_INLINE WideVec even_lanes(WideVec a, WideVec b) {
  return (WideVec)_mm_unpacklo_epi64((__m128i)a, (__m128i)b);
}
SOFTDIMO_ALWAYS_INLINE WideVec odd_lanes(WideVec a, WideVec b) {
  return (WideVec)_mm_unpackhi_epi64((__m128i)a, (__m128i)b);
}
#else
SOFTDIMO_ALWAYS_INLINE WideVec multiply_low(WideVec a, WideVec b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
SOFTDIMO_ALWAYS_INLINE WideVec even_lanes(WideVec a, WideVec b) {
  WideVec out{};
  for (int i = 0; i < kBlockLanes; ++i) out[i] = i % 2 == 0 ? a[i] : b[i - 1];
  return out;
}
SOFTDIMO_ALWAYS_INLINE WideVec odd_lanes(WideVec a, WideVec b) {
  WideVec out{};
  for (int i = 0; i < kBlockLanes; ++i) out[i] = i % 2 == 0 ? a[i + 1] : b[i];
  return out;
}
#endif

// The keys of the ten rounds, in memory: broadcasts from registers would compete with the products for a port.
struct RoundKeys {
  uint64_t word[2][10];
};

SOFTDIMO_ALWAYS_INLINE RoundKeys round_keys(uint64_t key) {
  RoundKeys keys;
  for (uint32_t round = 0; round < 10; ++round) {
    keys.word[0][round] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
    keys.word[1][round] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

// The words of kUniformStep consecutive entries, in order: entry v has word v % 4 of block v / 4.
struct WordVecs {
  UintVec first, second;
};

SOFTDIMO_ALWAYS_INLINE WordVecs philox_words(const RoundKeys& keys, uint64_t row, uint32_t block, uint32_t offset) {
  // Blocks 0, n/2, 1, n/2 + 1, ...: then the two halves of every 128 bits interleave into consecutive blocks.
  WideVec lane{};
  for (int i = 0; i < kBlockLanes; ++i) lane[i] = static_cast<uint64_t>(i / 2 + i % 2 * (kBlockLanes / 2));
  WideVec c0 = WideVec{} + (row & 0xFFFFFFFFu), c1 = WideVec{} + (row >> 32);
  WideVec c2 = lane + block, c3 = WideVec{} + offset;
  const WideVec m0 = WideVec{} + 0xD2511F53u, m1 = WideVec{} + 0xCD9E8D57u;
  for (int round = 0; round < 10; ++round) {
    const WideVec product0 = multiply_low(c0, m0), product1 = multiply_low(c2, m1);
    c0 = (product1 >> 32) ^ c1 ^ (WideVec{} + keys.word[0][round]);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ (WideVec{} + keys.word[1][round]);
    c3 = product0;
  }
  const WideVec low = (c0 & 0xFFFFFFFFu) | (c1 << 32), high = (c2 & 0xFFFFFFFFu) | (c3 << 32);
  return {(UintVec)even_lanes(low, high), (UintVec)odd_lanes(low, high)};
}

// open_uniform in two steps, of every lane: the word as a float, then the scale.
SOFTDIMO_ALWAYS_INLINE Vec<float> float_word(UintVec words) {
  return __builtin_convertvector(words, Vec<float>) + 0.5f;
}
SOFTDIMO_ALWAYS_INLINE Vec<float> scaled_uniform(Vec<float> word) {
  const Vec<float> u = word * 2.3283064365386963e-10f;  // 2^-32
  return u < 0.99999994f ? u : splat(0.99999994f);      // 1 - 2^-24
}

// Uniforms of entries [first, first + count) of a row, on (0, 1). first is a multiple of 4; u has room for count
// rounded up to a multiple of kUniformStep, and all of it is written.
SOFTDIMO_ALWAYS_INLINE void fill_uniform(uint64_t key, uint64_t row, uint32_t offset, int64_t first, int64_t count,
                                         float* u) {
  const RoundKeys keys = round_keys(key);
  for (int64_t v = 0; v < count; v += kUniformStep) {
    const WordVecs words = philox_words(keys, row, static_cast<uint32_t>((first + v) / 4), offset);
    store(u + v, scaled_uniform(float_word(words.first)));
    store(u + v + kLanes<float>, scaled_uniform(float_word(words.second)));
  }
}
SOFTDIMO_ALWAYS_INLINE void fill_uniform(uint64_t key, uint64_t row, uint32_t offset, int64_t first, int64_t count,
                                         double* u) {
  alignas(64) float narrow[kUniformStep];
  for (int64_t v = 0; v < count; v += kUniformStep) {
    fill_uniform(key, row, offset, first + v, kUniformStep, narrow);
    for (int64_t i = 0; i < kUniformStep; ++i) u[v + i] = static_cast<double>(narrow[i]);
  }
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
