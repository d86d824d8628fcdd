// The part of <cuda_fp16.h> that the kernels use.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  // A product with 2^112 moves the exponent, exactly and for subnormals too; infinity and NaN have all of its bits set.
  const unsigned bits = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  return __uint_as_float(sign | (magnitude >= 0x1fu << 23 ? magnitude | 0x7f800000u : bits));
}

inline __half __float2half_rn(float value) {
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x1p-14f) {  // a multiple of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<unsigned>(std::nearbyint(magnitude * 0x1p24f)))};
  }
  const unsigned bits = __float_as_uint(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}

inline __half __float2half(float value) { return __float2half_rn(value); }
