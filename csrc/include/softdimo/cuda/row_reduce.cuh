// Merges one partial result per thread into one per row, in a tree that depends on the number of threads alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "softdimo/cuda/launch.h"

namespace softdimo::cuda {

constexpr int kWarp = 32;

// `value` of the lane `distance` above, within groups of `width` lanes. Partial: any struct of 32-bit words.
template <typename Partial>
__device__ __forceinline__ Partial shuffle_down(const Partial& value, int distance, int width) {
  static_assert(sizeof(Partial) % 4 == 0, "a partial result is made of 32-bit words");
  uint32_t words[sizeof(Partial) / 4];
  memcpy(words, &value, sizeof(Partial));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(0xffffffffu, word, distance, width);
  Partial result;
  memcpy(&result, words, sizeof(Partial));
  return result;
}

// `merge(first, second)` joins two neighbours, the lower threads' part first. A row has kThreads threads in a row of
// a block of kBlock, all of which must call this, once in a kernel; the row's first thread gets the result, the
// others get something.
template <int kThreads, int kBlock, typename Partial, typename Merge>
__device__ __forceinline__ Partial reduce_row(Partial partial, const Merge& merge) {
  static_assert(kBlock % kThreads == 0 && (kThreads & (kThreads - 1)) == 0, "rows are powers of two that fill a block");
  constexpr int kWidth = kThreads < kWarp ? kThreads : kWarp;
#pragma unroll
  for (int distance = kWidth / 2; distance > 0; distance /= 2) {
    partial = merge(partial, shuffle_down(partial, distance, kWidth));
  }
  if constexpr (kThreads > kWarp) {
    SOFTDIMO_SHARED(Partial, warps, kBlock / kWarp);
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0) warps[warp] = partial;
    __syncthreads();
    if (threadIdx.x % kThreads == 0) {
#pragma unroll
      for (int i = 1; i < kThreads / kWarp; ++i) partial = merge(partial, warps[warp + i]);
    }
  }
  return partial;
}

}  // namespace softdimo::cuda
