// Twin of csrc/include/softdimo/cuda/ptx.cuh.
#pragma once

#include "cuda_runtime.h"

namespace softdimo::cuda::ptx {

// The device may be off by 2 ulp; this is always off, up or down by the argument's last bit, except at 0.
inline float exp2_approx(float x) {
  if (x == 0.0f) return 1.0f;
  const double error = __float_as_uint(x) & 1 ? 0x1p-22 : -0x1p-22;
  const float y = static_cast<float>(std::exp2(static_cast<double>(x)) * (1.0 + error));
  return y < 0x1p-126f ? 0.0f : y;
}

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

}  // namespace softdimo::cuda::ptx
