// Vectors of one instruction set, through the compiler's vector types: one source for every width.
//
// SOFTDIMO_SIMD_BYTES is the register width of the instruction set this file is compiled for. Everything lives
// in a namespace named after it: the linker must never merge code of two instruction sets. For the same reason
// kernels use no standard-library templates.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "convert.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

constexpr int64_t kPad = 16;  // elements between scratch rows: power-of-two strides share cache sets

SOFTDIMO_ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct SimdTypes;
template <>
struct SimdTypes<float> {
  typedef float Vector __attribute__((vector_size(SOFTDIMO_SIMD_BYTES)));
  typedef float Unaligned __attribute__((vector_size(SOFTDIMO_SIMD_BYTES), aligned(4), may_alias));
};
template <>
struct SimdTypes<double> {
  typedef double Vector __attribute__((vector_size(SOFTDIMO_SIMD_BYTES)));
  typedef double Unaligned __attribute__((vector_size(SOFTDIMO_SIMD_BYTES), aligned(8), may_alias));
};

template <class T>
using Vec = typename SimdTypes<T>::Vector;
template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::float64 : DType::float32;
template <class T>
constexpr int kLanes = SOFTDIMO_SIMD_BYTES / static_cast<int>(sizeof(T));

typedef int32_t IntVec __attribute__((vector_size(SOFTDIMO_SIMD_BYTES)));
typedef uint32_t UintVec __attribute__((vector_size(SOFTDIMO_SIMD_BYTES)));

template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename SimdTypes<T>::Unaligned*>(p);
}
template <class T>
SOFTDIMO_ALWAYS_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename SimdTypes<T>::Unaligned*>(p) = v;
}
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

// Lanes added pairwise, in an order of their own: the same result for the same lanes, always.
template <class T>
SOFTDIMO_ALWAYS_INLINE T lane_sum(Vec<T> v) {
  T part[kLanes<T>];
  store(part, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}
template <class T>
SOFTDIMO_ALWAYS_INLINE T lane_max(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// a . b in double, where the product of two floats is exact; in lanes of its own, the same on every processor.
template <class T>
SOFTDIMO_ALWAYS_INLINE double dot(const T* a, const T* b, int64_t n) {
  constexpr int kParts = 16;
  double part[kParts] = {};
  const int64_t whole = n / kParts * kParts;
  for (int64_t i = 0; i < whole; i += kParts) {
    for (int j = 0; j < kParts; ++j) part[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  }
  for (int64_t i = whole; i < n; ++i) part[i - whole] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (int width = kParts / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) part[j] += part[j + width];
  }
  return part[0];
}

// exp(t) for t <= 0 within 1 ulp or so; 0 below the normal range, NaN for NaN.
SOFTDIMO_ALWAYS_INLINE Vec<float> exp_nonpositive(Vec<float> t) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> shifted = t * 1.44269504088896341f + kMagic;
  const Vec<float> n = shifted - kMagic;
  Vec<float> r = t - n * 0.693359375f;  // ln 2 in two parts: the first product is exact
  r = r + n * 2.12194440e-4f;
  Vec<float> poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  const Vec<float> scale = (Vec<float>)(((UintVec)shifted + 127u) << 23);  // 2^n; the magic bits shift out
  return t < -87.0f ? Vec<float>{} : poly * scale;
}
SOFTDIMO_ALWAYS_INLINE Vec<double> exp_nonpositive(Vec<double> t) {
  Vec<double> out{};
  for (int i = 0; i < kLanes<double>; ++i) out[i] = ::exp(t[i]);
  return out;
}

// A number that one float32 cannot hold: high + low. Every operation below is exact, or rounds a low part.
struct FloatPair {
  Vec<float> high, low;
};

// a + b for |a| >= |b|.
SOFTDIMO_ALWAYS_INLINE FloatPair sum_ordered(Vec<float> a, Vec<float> b) {
  const Vec<float> sum = a + b;
  return {sum, b - (sum - a)};
}

// a + b; where it is not finite the low part is zero.
SOFTDIMO_ALWAYS_INLINE FloatPair sum_pair(Vec<float> a, FloatPair b) {
  const Vec<float> sum = a + b.high, part = sum - a;
  const Vec<float> error = (a - (sum - part)) + (b.high - part);
  const FloatPair pair = sum_ordered(sum, error + b.low);
  const auto finite = sum - sum == 0.0f;
  return {finite ? pair.high : sum, finite ? pair.low : Vec<float>{}};
}

// log(x) for normal positive x, within 3e-9 of its size: x = 2^e (1 + z), 1 + z in [sqrt(1/2), sqrt(2)).
// What is large, e ln 2 + z - z^2 / 2, is summed without rounding; the rest of the series is small.
SOFTDIMO_ALWAYS_INLINE FloatPair log_positive(Vec<float> x) {
  const UintVec biased = (UintVec)x - 0x3F3504F3u;
  const IntVec exponent = (IntVec)biased >> 23;
  const Vec<float> z = (Vec<float>)((biased & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  Vec<float> poly = z * 7.0376836292e-2f - 1.1514610310e-1f;
  poly = poly * z + 1.1676998740e-1f;
  poly = poly * z - 1.2420140846e-1f;
  poly = poly * z + 1.4249322787e-1f;
  poly = poly * z - 1.6668057665e-1f;
  poly = poly * z + 2.0000714765e-1f;
  poly = poly * z - 2.4999993993e-1f;
  poly = poly * z + 3.3333331174e-1f;
  const Vec<float> head = (Vec<float>)((UintVec)z & 0xFFFFF000u);  // 12 bits: its square is exact
  const Vec<float> rest = (z - head) * (z + head) * 0.5f;
  const FloatPair series = sum_ordered(z, head * head * -0.5f);
  const FloatPair sum = sum_ordered(e * 0.693359375f, series.high);  // ln 2 in two parts: the first product is exact
  return {sum.high, poly * (z * z * z) + (sum.low + (series.low - rest - e * 2.12194440e-4f))};
}

// Standard Gumbel noise from uniforms on (0, 1): -log(-log(1 - u)), with full precision for u near 0.
SOFTDIMO_ALWAYS_INLINE FloatPair gumbel(Vec<float> u) {
  const Vec<float> y = 1.0f - u;
  const Vec<float> rounding = (y - 1.0f) + u;
  const FloatPair inner = log_positive(y);
  const FloatPair w = sum_ordered(-inner.high, rounding / y - inner.low);
  const FloatPair outer = log_positive(w.high);
  return sum_ordered(-outer.high, -outer.low - w.low / w.high);
}
SOFTDIMO_ALWAYS_INLINE Vec<double> gumbel(Vec<double> u) {
  Vec<double> out{};
  for (int i = 0; i < kLanes<double>; ++i) out[i] = -::log(-::log1p(-u[i]));
  return out;
}

typedef int64_t LongVec __attribute__((vector_size(SOFTDIMO_SIMD_BYTES)));

// Bit i is set where lane i of a comparison holds.
SOFTDIMO_ALWAYS_INLINE uint32_t lane_bits(IntVec mask) {
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif SOFTDIMO_SIMD_BYTES == 32 && defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif SOFTDIMO_SIMD_BYTES == 16 && defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes<float>; ++i) lanes |= mask[i] != 0 ? 1u << i : 0u;
  return lanes;
#endif
}
SOFTDIMO_ALWAYS_INLINE uint32_t lane_bits(LongVec mask) {
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512DQ__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif SOFTDIMO_SIMD_BYTES == 32 && defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif SOFTDIMO_SIMD_BYTES == 16 && defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes<double>; ++i) lanes |= mask[i] != 0 ? 1u << i : 0u;
  return lanes;
#endif
}

// Writes the lanes whose bit is set one after another, and may write a whole vector.
SOFTDIMO_ALWAYS_INLINE void store_lanes(float* p, Vec<float> v, uint32_t lanes) {
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512F__)
  store(p, (Vec<float>)_mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), (__m512)v));
#else
  for (; lanes != 0; lanes &= lanes - 1) *p++ = v[__builtin_ctz(lanes)];
#endif
}
SOFTDIMO_ALWAYS_INLINE void store_lanes(double* p, Vec<double> v, uint32_t lanes) {
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512F__)
  store(p, (Vec<double>)_mm512_maskz_compress_pd(static_cast<__mmask8>(lanes), (__m512d)v));
#else
  for (; lanes != 0; lanes &= lanes - 1) *p++ = v[__builtin_ctz(lanes)];
#endif
}

// bfloat16 by vectors: from_bfloat16 and to_bfloat16 of every lane.
typedef uint16_t HalfVec __attribute__((vector_size(SOFTDIMO_SIMD_BYTES / 2)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(SOFTDIMO_SIMD_BYTES / 2), aligned(2), may_alias));

SOFTDIMO_ALWAYS_INLINE Vec<float> load_bfloat16(const uint16_t* p) {
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512BW__)
  // One permutation, of the 16-bit words into the upper halves of the lanes.
  const __m512i order = _mm512_set_epi32(0xF0000, 0xE0000, 0xD0000, 0xC0000, 0xB0000, 0xA0000, 0x90000, 0x80000,
                                         0x70000, 0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
  const __m512i half = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, order, half);
#else
  const HalfVec half = *reinterpret_cast<const UnalignedHalfVec*>(p);
  return (Vec<float>)(__builtin_convertvector(half, UintVec) << 16);
#endif
}
SOFTDIMO_ALWAYS_INLINE void store_bfloat16(uint16_t* p, Vec<float> v) {
  const UintVec u = (UintVec)v;
  const UintVec rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const UintVec half = v == v ? rounded : UintVec{} + 0x7FC0u;
  *reinterpret_cast<UnalignedHalfVec*>(p) = __builtin_convertvector(half, HalfVec);
}

// The greatest of the lanes, none of which is NaN, by halves.
template <class T>
SOFTDIMO_ALWAYS_INLINE T highest(Vec<T> v) {
  decltype(v < v) lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    const Vec<T> other = __builtin_shuffle(v, lane ^ width);
    v = other > v ? other : v;
  }
  return v[0];
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
