// What the kernels of soft_embedding's backward share: entries of a row with their noise, and 16-bit products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "softdimo/cuda/gumbel.cuh"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/row_writer.cuh"
#include "softdimo/cuda/soft_embedding_backward.h"
#include "softdimo/philox.h"

namespace softdimo::cuda {

constexpr float kLog2E = 1.44269504088896340736f;

__device__ __forceinline__ float row_temperature(const SoftEmbeddingParams& call, int64_t row) {
  return call.row_temperature != nullptr ? __ldg(call.row_temperature + row * call.row_temperature_stride)
                                         : call.temperature;
}

// ---------------------------------------------------------------------------------------------------
// products

// How a factor enters products: a 16-bit number as it is, a float32 number as the sum of three bfloat16 numbers.
enum class Product { bfloat16, float16, float32 };

template <Product kProduct>
constexpr int kTerms = kProduct == Product::float32 ? 3 : 1;

template <Product kProduct>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kProduct == Product::float16) {
    ptx::mma_f16(d, a, b);
  } else {
    ptx::mma_bf16(d, a, b);
  }
}

// The codebook as products take it: rows of `width` 16-bit numbers, 16-byte aligned.
struct PackedCodebook {
  const uint16_t* data;
  int64_t term_stride, group_stride, stride;
  int width;
};

inline PackedCodebook packed_codebook(const SoftEmbeddingBackwardParams& p) {
  const SoftEmbeddingParams& call = p.call;
  const int64_t width = padded_width(call.width), group = call.vocabulary * width;
  if (p.packed == nullptr) {
    return {static_cast<const uint16_t*>(call.codebook), 0, call.codebook_stride[0], call.codebook_stride[1],
            static_cast<int>(width)};
  }
  return {static_cast<const uint16_t*>(p.packed), call.groups * group, group, width, static_cast<int>(width)};
}

// Lets a kernel have that much dynamic shared memory. Always asked: of the 48 KB that need no permission, what the
// kernel declares itself takes a part.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // else the next launch would find it
  return error;
}

// ---------------------------------------------------------------------------------------------------
// entries

// 16 bytes of a row that start at a column that is a multiple of the chunk; -inf past the row's end. The same values
// wherever the row starts. `aligned`: every row starts on a 16-byte boundary.
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* row, int column, int columns, bool aligned) {
  constexpr int kChunk = RowReader<T>::kChunk;
  if (aligned && column + kChunk <= columns) return __ldg(reinterpret_cast<const uint4*>(row + column));
  const RowReader<T> reader(row, columns);
  const int j = column / kChunk;
  if (reader.template inside<false>(j)) return reader.template load<false>(j);
  float value[kChunk];
  reader.load_elements(j, -INFINITY, value);
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = __float_as_uint(value[i]);
    } else {
      word[i] = pack_pair<T>(value[2 * i], value[2 * i + 1]);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Whether every row of a matrix starts on a 16-byte boundary.
template <typename T>
__device__ __forceinline__ bool rows_aligned(const void* first, int64_t stride) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

__device__ __forceinline__ bool is_masked(const SoftEmbeddingParams& call, int64_t row) {
  return call.mask != nullptr && __ldg(call.mask + row * call.mask_stride) != 0;
}

// 2^u of a distance to the top; the bound stands for minus infinity, whose product with a scale of 0 would be NaN.
__device__ __forceinline__ float weight(float distance, float scale) {
  return ptx::exp2_approx(fmaxf(distance * scale, -256.0f));
}

// The noise of a call; none where kPlain says so.
template <bool kPlain>
class Noise {
 public:
  __device__ __forceinline__ explicit Noise(const int64_t* seed) : key_(0), offset_(0), any_(seed != nullptr) {
    if (!any()) return;
    key_ = static_cast<uint64_t>(__ldg(seed));
    offset_ = static_cast<uint32_t>(__ldg(seed + 1));
  }

  __device__ __forceinline__ bool any() const { return !kPlain && any_; }

  // Turns four neighbouring logits, the first a multiple of 4, into y - top: exact where that is small.
  __device__ __forceinline__ void subtract_top(float (&z)[4], int column, const RowRecord& row) const {
    const Words words = philox4x32(key_, static_cast<uint64_t>(row.id), static_cast<uint32_t>(column / 4), offset_);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const FloatPair y = sum_pair(z[i], gumbel(open_uniform(words.word[i])));
      z[i] = (y.high - row.top) + (y.low - row.top_low);
    }
  }

 private:
  uint64_t key_;
  uint32_t offset_;
  bool any_;
};

}  // namespace softdimo::cuda
