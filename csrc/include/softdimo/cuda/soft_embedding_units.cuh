// The entries of 16 rows that a warp takes at a time in soft_embedding's forward: their maxima, their places.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/gumbel.cuh"
#include "softdimo/cuda/soft_embedding_logits.cuh"

namespace softdimo::cuda {

constexpr unsigned kAll = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------
// the four lanes of a row

__device__ __forceinline__ FloatPair greatest_of_quad(FloatPair top) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const FloatPair other{__shfl_xor_sync(kAll, top.high, distance), __shfl_xor_sync(kAll, top.low, distance)};
    if (is_greater(other, top)) top = other;
  }
  return top;
}

__device__ __forceinline__ float greatest_of_quad(float top) {
  top = fmaxf(top, __shfl_xor_sync(kAll, top, 1));
  return fmaxf(top, __shfl_xor_sync(kAll, top, 2));
}

__device__ __forceinline__ float sum_of_quad(float sum) {
  sum += __shfl_xor_sync(kAll, sum, 1);
  return sum + __shfl_xor_sync(kAll, sum, 2);
}

__device__ __forceinline__ int least_of_quad(int index) {
  index = min(index, __shfl_xor_sync(kAll, index, 1));
  return min(index, __shfl_xor_sync(kAll, index, 2));
}

// ---------------------------------------------------------------------------------------------------
// a lane's entries of one unit

// Without noise they stay the words that were read.
template <class Shape>
struct Unit {
  static constexpr int kCount = Shape::kWords * Shape::kWord;
  uint4 (&words)[2][Shape::kWords];
  DType type;

  __device__ __forceinline__ FloatPair at(int r, int i) const {
    return {number<Shape::kBytes>(words[r][i / Shape::kWord], type, i % Shape::kWord), 0.0f};
  }

  // The entries of step 1 take the places of those of step 0.
  __device__ __forceinline__ void move_up() const {
    for (auto& row : words) row[0] = make_uint4(row[0].z, row[0].w, row[0].x, row[0].y);
  }

  __device__ __forceinline__ FloatPair greatest(int r, FloatPair top) const {
    return {greatest_of_quad(fmaxf(top.high, greatest_number<Shape::kBytes, Shape::kWords>(words[r], type))), 0.0f};
  }
};

template <class Shape>
struct NoisyUnit {
  static constexpr int kCount = Shape::kWords * Shape::kWord;
  FloatPair y[2][kCount];

  __device__ __forceinline__ FloatPair at(int r, int i) const { return y[r][i]; }

  __device__ __forceinline__ void move_up() {
#pragma unroll
    for (int i = 0; i + 4 < kCount; ++i) {
      y[0][i] = y[0][i + 4];
      y[1][i] = y[1][i + 4];
    }
  }

  __device__ __forceinline__ FloatPair greatest(int r, FloatPair top) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (is_greater(y[r][i], top)) top = y[r][i];
    }
    return greatest_of_quad(top);
  }
};

// The place in a lane's row of the first entry equal to `top`; INT32_MAX where there is none.
template <class AnyUnit>
__device__ __forceinline__ int first_equal(const AnyUnit& unit, int r, FloatPair top) {
  int found = INT32_MAX;
#pragma unroll
  for (int i = AnyUnit::kCount - 1; i >= 0; --i) {
    const FloatPair y = unit.at(r, i);
    if (y.high == top.high && y.low == top.low) found = i;
  }
  return found;
}

}  // namespace softdimo::cuda
