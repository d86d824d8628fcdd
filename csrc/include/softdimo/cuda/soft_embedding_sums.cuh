// What soft_embedding's forward knows of a row after a chunk of the vocabulary, how two chunks are joined, and how the
// last sums become the row's results. One block that walks over the chunks and a block for each do the same arithmetic
// in the same order, so that they give the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/elements.cuh"
#include "softdimo/cuda/gumbel.cuh"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/soft_embedding.h"

namespace softdimo::cuda {

// Relative to top = max y: weights are w = exp((y - top) / T).
struct RowSums {
  FloatPair top;  // never NaN
  float sum;      // of w
  float rounded;  // of w as the products took it, times what products multiply w by: the divisor of sum w E
  int peak;       // lowest index of top
};

// 1 / T times log2(e), for exp2. NaN where T is not positive; and not 0 where T is infinite, so that minus infinity
// times it is no NaN.
__device__ __forceinline__ float exponent_scale(const SoftEmbeddingParams& p, int64_t row) {
  const float t = p.row_temperature != nullptr ? __ldg(p.row_temperature + row * p.row_temperature_stride)
                                               : p.temperature;
  return t > 0.0f ? fmaxf(1.44269504088896340736f / t, 1e-45f) : NAN;
}

// The weight of `value` relative to `top`; exactly 1 for the same number, infinite ones included.
__device__ __forceinline__ float decay(FloatPair value, FloatPair top, float scale) {
  if (value.high == top.high && value.low == top.low) return 1.0f;
  return ptx::exp2_approx(((value.high - top.high) + (value.low - top.low)) * scale);
}

// Factors of the sums so far and of the next chunk's.
struct Factors {
  float before, next;
};

__device__ __forceinline__ Factors join(RowSums& row, const RowSums& next, float scale) {
  const bool raises = is_greater(next.top, row.top);
  const FloatPair top = raises ? next.top : row.top;
  const Factors factor{decay(row.top, top, scale), decay(next.top, top, scale)};
  row.top = top;
  row.sum = fmaf(row.sum, factor.before, next.sum * factor.next);
  row.rounded = fmaf(row.rounded, factor.before, next.rounded * factor.next);
  if (raises) row.peak = next.peak;
  return factor;
}

__device__ __forceinline__ float join(float before, float next, const Factors& factor) {
  return fmaf(before, factor.before, next * factor.next);
}

// ---------------------------------------------------------------------------------------------------
// results

__device__ __forceinline__ bool is_masked(const SoftEmbeddingParams& p, int64_t row) {
  return p.mask != nullptr && __ldg(p.mask + row * p.mask_stride) != 0;
}

// Column d of a row from its sum of weights times codebook entries; with the first column, the row's statistics.
__device__ __forceinline__ void write_result(const SoftEmbeddingForwardParams& p, int64_t row, int d, float products,
                                             const RowSums& sums) {
  const SoftEmbeddingParams& call = p.call;
  const bool masked = is_masked(call, row);
  const int64_t group = row % call.groups, at = row * call.width + d;
  if (d == 0) {
    p.row_max[row] = masked ? 0.0 : static_cast<double>(sums.top.high) + static_cast<double>(sums.top.low);
    p.row_sum[row] = masked ? 1.0f : sums.sum;
  }
  const float soft = masked ? 0.0f : products / sums.rounded;
  if (p.soft != nullptr) p.soft[at] = soft;
  float value = soft;
  if (masked) {
    value = load_element(call.mask_embedding, call.mask_embedding_type, group * call.width + d);
  } else if (p.hard && sums.sum > 0.0f) {  // else the row holds no distribution, and its soft value is NaN
    const int64_t entry = group * call.codebook_stride[0] + sums.peak * call.codebook_stride[1];
    value = load_element(call.codebook, call.codebook_type, entry + d * call.codebook_stride[2]);
  }
  store_element(p.output, call.codebook_type, at, value);
}

// ---------------------------------------------------------------------------------------------------
// sums of chunks in memory, where every chunk has a block of its own: [chunks, rows] and [chunks, rows, D]

struct ChunkSums {
  RowSums* rows;
  float* products;
};

}  // namespace softdimo::cuda
