// Merges several numbers per thread into one each per row, which every thread of the row then has.
#pragma once

#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/row_reduce.cuh"

namespace softdimo::cuda {

// The lanes that work on this thread's row, for rows of at most a warp: rows may take different branches.
template <int kThreads>
__device__ __forceinline__ unsigned row_lanes() {
  if constexpr (kThreads >= kWarp) return 0xffffffffu;
  return ((1u << kThreads % kWarp) - 1u) << (threadIdx.x % kWarp & ~(kThreads - 1));
}

// The number whose total a lane ends up with: halving the numbers reverses the lane's bits.
template <int kCount>
__device__ __forceinline__ int total_of_lane(int lane) {
  int index = 0;
#pragma unroll
  for (int bit = 1; bit < kCount; bit *= 2) index += lane & bit ? kCount / (2 * bit) : 0;
  return index;
}

// `merge(a, b)` is commutative. kThreads neighbouring threads have a row; more than a warp are a whole block. Each
// step of the first ones exchanges half of the numbers, so that kCount numbers cost 2 kCount shuffles instead of
// kCount log2(kThreads). To be called once in a kernel for each kCount.
template <int kThreads, int kCount, typename Merge>
__device__ __forceinline__ void row_totals(float (&values)[kCount], const Merge& merge) {
  constexpr int kWidth = kThreads < kWarp ? kThreads : kWarp;
  static_assert(kCount <= kWidth && (kCount & (kCount - 1)) == 0, "a power of two, at most one number per lane");
  const unsigned lanes = row_lanes<kThreads>();
  const int lane = threadIdx.x % kWidth;
#pragma unroll
  for (int distance = 1; distance < kCount; distance *= 2) {
    const int half = kCount / (2 * distance);
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
      values[i] = merge(kept, __shfl_xor_sync(lanes, given, distance));
    }
  }
  float total = values[0];
#pragma unroll
  for (int distance = kCount; distance < kWidth; distance *= 2) {
    total = merge(total, __shfl_xor_sync(lanes, total, distance));
  }
  if constexpr (kThreads > kWarp) {
    SOFTDIMO_SHARED(float, warps, kThreads / kWarp * kCount);
    const int index = lane % kCount;
    if (lane < kCount) warps[threadIdx.x / kWarp * kCount + index] = total;
    __syncthreads();
    total = warps[index];
#pragma unroll
    for (int warp = 1; warp < kThreads / kWarp; ++warp) total = merge(total, warps[warp * kCount + index]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = __shfl_sync(lanes, total, total_of_lane<kCount>(i), kWidth);
}

}  // namespace softdimo::cuda
