// Writes a row of a matrix in words of 16 bytes, which are aligned wherever the row starts:
//
//   memory     |----word 0----|----word 1----| ...            W = 16 / sizeof(T) elements a word
//   row             |column 0 ...                             offset() elements into word 0
//
// A word inside the row is one 128-bit store; the ones at its ends, which other rows share, are written element by
// element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/elements.cuh"
#include "softdimo/cuda/ptx.cuh"

namespace softdimo::cuda {

// Two numbers as T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  return ptx::pack_bf16(low, high);
}

template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  return ptx::pack_f16(low, high);
}

template <typename T>
class RowWriter {
 public:
  static constexpr int kWord = 16 / sizeof(T);

  __device__ __forceinline__ RowWriter(T* row, int columns)
      : row_(row), columns_(columns), offset_(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))) {}

  __device__ __forceinline__ int offset() const { return offset_; }

  __device__ __forceinline__ int words() const { return (offset_ + columns_ + kWord - 1) / kWord; }

  // The word that a column lies in.
  __device__ __forceinline__ int word_of(int column) const { return (offset_ + column) / kWord; }

  // A word's entries; those outside of the row are passed over.
  __device__ __forceinline__ void store(int word, const float (&values)[kWord]) const {
    const int column = word * kWord - offset_;
    if (column >= 0 && column + kWord <= columns_) {
      store_whole(word, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      if (column + i >= 0 && column + i < columns_) store_as(row_ + column + i, values[i]);
    }
  }

  // The same for a word that is known to lie inside the row.
  __device__ __forceinline__ void store_whole(int word, const float (&values)[kWord]) const {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        packed[i] = __float_as_uint(values[i]);
      } else {
        packed[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    // Not an assignment: the compiler would take it apart.
    __stwb(reinterpret_cast<uint4*>(row_ + word * kWord - offset_),
           make_uint4(packed[0], packed[1], packed[2], packed[3]));
  }

  __device__ __forceinline__ void store_entry(int column, float value) const { store_as(row_ + column, value); }

 private:
  T* row_;
  int columns_;
  int offset_;  // elements between the 16-byte boundary at or before the row, and the row
};

}  // namespace softdimo::cuda
