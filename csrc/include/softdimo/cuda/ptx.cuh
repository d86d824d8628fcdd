// The only header with PTX. Each wrapper has a twin of the same name in tests/emulation/softdimo/cuda/ptx.cuh.
#pragma once

namespace softdimo::cuda::ptx {

// 2^x within 2 ulp in one instruction. Results below 2^-126 are zero; 2^0 is exactly 1.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two numbers, NaN if either is NaN (fmaxf drops a NaN).
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace softdimo::cuda::ptx
