// Rows of any element type, as float or double and back. Results do not depend on the instruction set, but for the
// payload of a float16 NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "softdimo/dtype.h"

#ifdef __x86_64__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the header's own undefined vectors (GCC 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace softdimo::cpu::SOFTDIMO_ISA {

template <class To, class From>
SOFTDIMO_ALWAYS_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---------------------------------------------------------------------------------------------------
// 16-bit floats, one at a time

SOFTDIMO_ALWAYS_INLINE float from_bfloat16(uint16_t h) { return bits<float>(uint32_t{h} << 16); }
SOFTDIMO_ALWAYS_INLINE uint16_t to_bfloat16(float f) {
  const uint32_t u = bits<uint32_t>(f);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(f == f ? rounded : 0x7FC0u);
}
SOFTDIMO_ALWAYS_INLINE float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, magnitude = h & 0x7FFFu;
  const uint32_t subnormal = bits<uint32_t>(static_cast<float>(magnitude) * 5.9604644775390625e-8f);  // 2^-24
  uint32_t wide = (magnitude << 13) + 0x38000000u;
  wide = magnitude < 0x0400u ? subnormal : wide;
  wide = magnitude >= 0x7C00u ? (magnitude << 13) | 0x7F800000u : wide;  // infinity and NaN
  return bits<float>(sign | wide);
}
SOFTDIMO_ALWAYS_INLINE uint16_t to_float16(float f) {
  const uint32_t u = bits<uint32_t>(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  // Normal results: rebias and round to even. Subnormal: adding 0.5 rounds at the right bit.
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(sign | half);
}

// ---------------------------------------------------------------------------------------------------
// rows of float16, where there are instructions for them; the compiler vectorises bfloat16 as well as they would

#if defined(__AVX512F__)
// 16 lanes at a time; of the last, only some are read and written.
SOFTDIMO_ALWAYS_INLINE __mmask16 lanes_from(int64_t i, int64_t n) {
  return static_cast<__mmask16>(n - i >= 16 ? 0xFFFFu : (1u << (n - i)) - 1u);
}

SOFTDIMO_ALWAYS_INLINE void widen_float16(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = lanes_from(i, n);
    _mm512_mask_storeu_ps(out + i, some, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, in + i)));
  }
}

SOFTDIMO_ALWAYS_INLINE void narrow_float16(const float* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = lanes_from(i, n);
    const __m512 v = _mm512_maskz_loadu_ps(some, in + i);
    _mm256_mask_storeu_epi16(out + i, some, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

#elif defined(__F16C__)
SOFTDIMO_ALWAYS_INLINE void widen_float16(const uint16_t* in, int64_t n, float* out) {
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (int64_t i = whole; i < n; ++i) out[i] = from_float16(in[i]);
}
SOFTDIMO_ALWAYS_INLINE void narrow_float16(const float* in, int64_t n, uint16_t* out) {
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  for (int64_t i = whole; i < n; ++i) out[i] = to_float16(in[i]);
}
#else
SOFTDIMO_ALWAYS_INLINE void widen_float16(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float16(in[i]);
}
SOFTDIMO_ALWAYS_INLINE void narrow_float16(const float* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float16(in[i]);
}
#endif

SOFTDIMO_ALWAYS_INLINE void widen_float16(const uint16_t* in, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(from_float16(in[i]));
}
SOFTDIMO_ALWAYS_INLINE void narrow_float16(const double* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float16(static_cast<float>(in[i]));
}

// ---------------------------------------------------------------------------------------------------
// rows of any element type

// n elements at `source`, which starts `first` elements into a tensor of `dtype`, as T.
template <class T>
SOFTDIMO_ALWAYS_INLINE void widen(const void* source, DType dtype, int64_t first, int64_t n, T* out) {
  switch (dtype) {
    case DType::float64: {
      const double* p = static_cast<const double*>(source) + first;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i]);
      break;
    }
    case DType::float32: {
      const float* p = static_cast<const float*>(source) + first;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i]);
      break;
    }
    case DType::bfloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(source) + first;
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_bfloat16(p[i]));
      break;
    }
    case DType::float16:
      widen_float16(static_cast<const uint16_t*>(source) + first, n, out);
      break;
  }
}

template <class T>
SOFTDIMO_ALWAYS_INLINE void narrow(const T* in, int64_t n, void* target, DType dtype, int64_t first) {
  switch (dtype) {
    case DType::float64: {
      double* p = static_cast<double*>(target) + first;
      for (int64_t i = 0; i < n; ++i) p[i] = static_cast<double>(in[i]);
      break;
    }
    case DType::float32: {
      float* p = static_cast<float*>(target) + first;
      for (int64_t i = 0; i < n; ++i) p[i] = static_cast<float>(in[i]);
      break;
    }
    case DType::bfloat16: {
      uint16_t* p = static_cast<uint16_t*>(target) + first;
      for (int64_t i = 0; i < n; ++i) p[i] = to_bfloat16(static_cast<float>(in[i]));
      break;
    }
    case DType::float16:
      narrow_float16(in, n, static_cast<uint16_t*>(target) + first);
      break;
  }
}

// ---------------------------------------------------------------------------------------------------
// streaming: large outputs, written without being read into the caches first

constexpr int64_t kLineBytes = 64;

// Whole lines; the target is aligned to one.
SOFTDIMO_ALWAYS_INLINE void stream_lines(const char* source, int64_t bytes, char* target) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif defined(__x86_64__)
    for (int64_t j = i; j < i + kLineBytes; j += 16) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + j), part);
    }
#else
    std::memcpy(target + i, source + i, kLineBytes);
#endif
  }
}

// narrow() for outputs that do not fit into the caches and are not read again soon: whole lines bypass them.
// finish_streaming() before another thread may read.
template <class T>
SOFTDIMO_ALWAYS_INLINE void narrow_streaming(const T* in, int64_t n, void* target, DType dtype, int64_t first) {
  constexpr int64_t kBlock = 256;
  const int64_t size = size_of(dtype);
  char* const out = static_cast<char*>(target) + first * size;
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kLineBytes);
  const int64_t until_line = past == 0 ? 0 : (kLineBytes - past) / size, head = until_line < n ? until_line : n;
  const int64_t end = n - (n - head) % (kLineBytes / size);
  narrow(in, head, target, dtype, first);
  if (dtype == (sizeof(T) == sizeof(float) ? DType::float32 : DType::float64)) {
    stream_lines(reinterpret_cast<const char*>(in + head), (end - head) * size, out + head * size);
  } else {
    alignas(kLineBytes) char block[kBlock * sizeof(double)];
    for (int64_t i = head; i < end; i += kBlock) {
      const int64_t count = end - i < kBlock ? end - i : kBlock;
      narrow(in + i, count, block, dtype, 0);
      stream_lines(block, count * size, out + i * size);
    }
  }
  narrow(in + end, n - end, target, dtype, first + end);
}

SOFTDIMO_ALWAYS_INLINE void finish_streaming() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
