// The part of <cuda_fp16.h> that the kernels use.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half value) {
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}
