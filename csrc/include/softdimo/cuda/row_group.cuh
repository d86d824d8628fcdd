// The threads that work on one row, and what they do together: kThreads of a block of kBlock, a power of two. Either
// several rows share a warp, or a row has the block to itself; then all of the block has to come to every call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "softdimo/cuda/launch.h"

namespace softdimo::cuda {

// What both lanes of a pair get is the same where `merge` does not care which is first.
template <typename Value>
__device__ __forceinline__ Value shuffle_xor(unsigned lanes, const Value& value, int distance, int width) {
  static_assert(sizeof(Value) % 4 == 0, "a value is made of 32-bit words");
  uint32_t words[sizeof(Value) / 4];
  memcpy(words, &value, sizeof(Value));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(lanes, word, distance, width);
  Value result;
  memcpy(&result, words, sizeof(Value));
  return result;
}

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

template <int kThreads, int kBlock>
class RowGroup {
 public:
  static_assert((kThreads & (kThreads - 1)) == 0 && (kThreads <= 32 || kThreads == kBlock),
                "a row has a part of a warp, or the block");
  static constexpr int kWidth = kThreads < 32 ? kThreads : 32;

  __device__ __forceinline__ RowGroup()
      : thread_(static_cast<int>(threadIdx.x) % kThreads),
        lanes_(kThreads < 32 ? ((1u << kWidth % 32) - 1) << threadIdx.x % 32 / kWidth * kWidth : ~0u) {}

  // Number of the calling thread in its row, and of the row in the block.
  __device__ __forceinline__ int thread() const { return thread_; }
  __device__ __forceinline__ int row() const { return static_cast<int>(threadIdx.x) / kThreads; }

  // What the row's threads wrote to shared memory before it, all of them read after it.
  __device__ __forceinline__ void barrier() const {
    if constexpr (kThreads > 32) {
      __syncthreads();
    } else {
      __syncwarp(lanes_);
    }
  }

  // merge over `width` neighbouring threads, at most a warp of them.
  template <typename Value, typename Merge>
  __device__ __forceinline__ Value among(int width, Value value, const Merge& merge) const {
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) {
      value = merge(value, shuffle_xor(lanes_, value, distance, width));
    }
    return value;
  }

  // merge over all of the row's threads, for all of them: a tree that depends on kThreads alone. merge(a, b) is
  // merge(b, a).
  template <typename Value, typename Merge>
  __device__ __forceinline__ Value all(Value value, const Merge& merge) const {
    value = among(kWidth, value, merge);
    if constexpr (kThreads > 32) {
      SOFTDIMO_SHARED(Value, warps, kThreads / 32);
      if (thread_ % 32 == 0) warps[thread_ / 32] = value;
      __syncthreads();
      value = warps[0];
#pragma unroll
      for (int i = 1; i < kThreads / 32; ++i) value = merge(value, warps[i]);
      __syncthreads();  // before the next call overwrites it
    }
    return value;
  }

 private:
  int thread_;
  unsigned lanes_;  // of the warp, that have the same row
};

}  // namespace softdimo::cuda
