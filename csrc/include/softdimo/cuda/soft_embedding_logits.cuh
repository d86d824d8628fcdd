// The logits of one row as soft_embedding's forward reads them: 16 bytes ("a word") at a time, asked for well before
// they are used.
//
// Word j is columns [jW, (j+1)W) wherever the row starts in memory (W = 16 / bytes of a logit). Where the row starts on
// a 16-byte boundary and the word is inside, it comes into registers by one load, a tile ahead. Any other word is asked
// to come into L2 a tile ahead, and is put together when it is used: from two aligned loads, of which another lane's
// is the second, and a shift; at the row's ends from single elements. No load leaves the row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/soft_embedding.h"

namespace softdimo::cuda {

// -inf in every place of 32 bits.
__device__ __forceinline__ uint32_t minus_infinity_bits(DType type) {
  return type == DType::float32 ? 0xff800000u : type == DType::float16 ? 0xfc00fc00u : 0xff80ff80u;
}

template <int kBytes>
class RowWords {
 public:
  using Bits = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
  static constexpr int kWord = 16 / kBytes;

  // A row that is null has no columns, and gives -inf. `p` is a kernel's argument.
  __device__ __forceinline__ RowWords(const SoftEmbeddingParams& p, const void* row) : p_(p) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    offset_ = static_cast<int>(address % 16 / kBytes);
    words_ = reinterpret_cast<const uint4*>(address - address % 16);
  }

  __device__ __forceinline__ bool exists() const { return words_ != nullptr; }

  // Words before this one are loaded by load(), the others by fetch().
  __device__ __forceinline__ int plain_end() const {
    return !exists() ? INT32_MAX : offset_ == 0 ? columns() / kWord : 0;
  }

  // Leaves the word as it is where the row does not exist.
  __device__ __forceinline__ void load(int j, uint4& word) const {
    if (exists()) word = __ldg(words_ + j);
  }

  __device__ __forceinline__ void prefetch(int j) const {
    if (exists() && j * kWord < columns()) ptx::prefetch_l2(row() + j * kWord);
  }

  __device__ __forceinline__ uint4 fetch(int j) const {
    const int end = (columns() + offset_) / kWord - (offset_ != 0);
    if (!exists() || j < (offset_ != 0) || j >= end) return elements(j);
    if (offset_ == 0) return __ldg(words_ + j);
    return shift_bytes(__ldg(words_ + j), __ldg(words_ + j + 1), offset_ * kBytes);
  }

 private:
  __device__ __forceinline__ int columns() const { return static_cast<int>(p_.vocabulary); }
  __device__ __forceinline__ const Bits* row() const { return reinterpret_cast<const Bits*>(words_) + offset_; }

  __device__ __forceinline__ uint4 elements(int j) const {
    const uint32_t fill = minus_infinity_bits(p_.logits_type);
    uint4 word = make_uint4(fill, fill, fill, fill);
    if (!exists() || j * kWord >= columns()) return word;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {  // not unrolled: rarely run, and registers are short
      uint32_t bits = fill;
      const int column = j * kWord + i * kWord / 4;
      if (column < columns()) bits = kBytes == 4 ? __ldg(row() + column) : (bits & 0xffff0000u) | __ldg(row() + column);
      if (kBytes == 2 && column + 1 < columns()) bits = (bits & 0xffffu) | uint32_t{__ldg(row() + column + 1)} << 16;
      word = make_uint4(word.y, word.z, word.w, bits);
    }
    return word;
  }

  const SoftEmbeddingParams& p_;
  const uint4* words_;  // the 16-byte boundary at or before the row; null where there is none
  int offset_;          // elements between that and the row
};

// ---------------------------------------------------------------------------------------------------
// numbers of a word; 16-bit ones are of the type `type`

__device__ __forceinline__ uint32_t part(const uint4& word, int i) {
  return i == 0 ? word.x : i == 1 ? word.y : i == 2 ? word.z : word.w;
}

template <int kBytes>
__device__ __forceinline__ float number(const uint4& word, DType type, int i) {
  if constexpr (kBytes == 4) {
    return __uint_as_float(part(word, i));
  } else {
    const uint32_t pair = part(word, i / 2);
    const float2 values = type == DType::float16 ? unpack_pair<__half>(pair) : unpack_pair<__nv_bfloat16>(pair);
    return i % 2 == 0 ? values.x : values.y;
  }
}

// The largest number of kCount words, none of them NaN unless all are.
template <int kBytes, int kCount>
__device__ __forceinline__ float greatest_number(const uint4* words, DType type) {
  if constexpr (kBytes == 4) {
    float top = number<4>(words[0], type, 0);
#pragma unroll
    for (int i = 1; i < 4 * kCount; ++i) top = fmaxf(top, number<4>(words[i / 4], type, i % 4));
    return top;
  } else {
    uint32_t top = words[0].x;
#pragma unroll
    for (int i = 1; i < 4 * kCount; ++i) {
      const uint32_t next = part(words[i / 4], i % 4);
      top = type == DType::float16 ? ptx::max_f16x2(top, next) : ptx::max_bf16x2(top, next);
    }
    const float2 values = type == DType::float16 ? unpack_pair<__half>(top) : unpack_pair<__nv_bfloat16>(top);
    return fmaxf(values.x, values.y);
  }
}

}  // namespace softdimo::cuda
