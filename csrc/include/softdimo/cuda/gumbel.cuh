// Standard Gumbel noise, and sums of two floats that hold it beside large logits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/ptx.cuh"

namespace softdimo::cuda {

// A number that one float32 cannot hold: high + low. Every operation below is exact, or rounds a low part.
struct FloatPair {
  float high, low;
};

// a + b for |a| >= |b|.
__device__ __forceinline__ FloatPair sum_ordered(float a, float b) {
  const float sum = a + b;
  return {sum, b - (sum - a)};
}

// a + b; where it is not finite the low part is zero.
__device__ __forceinline__ FloatPair sum_pair(float a, FloatPair b) {
  const float sum = a + b.high, part = sum - a;
  const float error = (a - (sum - part)) + (b.high - part);
  const FloatPair pair = sum_ordered(sum, error + b.low);
  return fabsf(sum) < INFINITY ? pair : FloatPair{sum, 0.0f};
}

__device__ __forceinline__ bool is_greater(FloatPair a, FloatPair b) {
  return a.high > b.high || (a.high == b.high && a.low > b.low);
}

// log(x) for normal positive x, within 3e-9 of its size: x = 2^e (1 + z), 1 + z in [sqrt(1/2), sqrt(2)).
// What is large, e ln 2 + z - z^2 / 2, is summed without rounding; the rest of the series is small.
__device__ __forceinline__ FloatPair log_positive(float x) {
  const uint32_t biased = __float_as_uint(x) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(biased) >> 23);
  const float z = __uint_as_float((biased & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float poly = fmaf(z, 7.0376836292e-2f, -1.1514610310e-1f);
  poly = fmaf(poly, z, 1.1676998740e-1f);
  poly = fmaf(poly, z, -1.2420140846e-1f);
  poly = fmaf(poly, z, 1.4249322787e-1f);
  poly = fmaf(poly, z, -1.6668057665e-1f);
  poly = fmaf(poly, z, 2.0000714765e-1f);
  poly = fmaf(poly, z, -2.4999993993e-1f);
  poly = fmaf(poly, z, 3.3333331174e-1f);
  const float square = z * z, rest = fmaf(z, z, -square);  // z^2 as a sum of two
  const FloatPair series = sum_ordered(z, -0.5f * square);
  const FloatPair sum = sum_ordered(e * 0.693359375f, series.high);  // ln 2 in two parts: the first product is exact
  const float low = sum.low + fmaf(e, -2.12194440e-4f, fmaf(-0.5f, rest, series.low));
  return {sum.high, fmaf(poly, square * z, low)};
}

// -log(-log(1 - u)) of a uniform on (0, 1), with full precision for u near 0.
__device__ __forceinline__ FloatPair gumbel(float u) {
  const float y = 1.0f - u;
  const float rounding = (y - 1.0f) + u;
  const FloatPair inner = log_positive(y);
  const FloatPair w = sum_ordered(-inner.high, fmaf(rounding, ptx::reciprocal_approx(y), -inner.low));
  const FloatPair outer = log_positive(w.high);
  return sum_ordered(-outer.high, fmaf(-w.low, ptx::reciprocal_approx(w.high), -outer.low));
}

}  // namespace softdimo::cuda
