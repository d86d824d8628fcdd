// soft_embedding, backward: what its products need of every row, and sums over rows that have no products.
//
//   formula   delta[n] = g[n] . e[n]; g in the terms that products take; mask embedding: sum of g over the masked rows;
//             sums of parts and of rows
//   bytes     prepare: (b + 4) D + 25 per row read, 2 terms W + 32 written, with W the padded width: for D = 64 in
//             bfloat16 a sixtieth of the logits at V = 8192
//   FLOPs     2 D per row
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 rows of D = 64 are 4.7 MB, so 2.6 / 1.6 / 1.1
//             us, about what a launch costs
//   tiles     prepare: a warp per row. Sums: a block of 256 threads per output, or a thread per output
//
// Sums are in double: they are short of work, and what they add may cancel.

#include <cuda_runtime.h>

#include "softdimo/cuda/elements.cuh"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/row_reduce.cuh"
#include "softdimo/cuda/soft_embedding_backward.h"
#include "softdimo/cuda/soft_embedding_entries.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 256;

__device__ __forceinline__ RowRecord record_of(const SoftEmbeddingBackwardParams& p, int64_t row, float delta) {
  const SoftEmbeddingParams& call = p.call;
  const float t = row_temperature(call, row);
  const double top = __ldg(p.row_max + row);
  const float high = static_cast<float>(top);
  const float low = fabsf(high) < INFINITY ? static_cast<float>(top - static_cast<double>(high)) : 0.0f;
  const int64_t id = call.row_ids != nullptr ? __ldg(call.row_ids + row * call.row_ids_stride) : row;
  const float scale = kLog2E / t;
  // A NaN, +inf or nothing but -inf in the row; a temperature that is not positive, or whose inverse overflows.
  const bool broken = !(fabsf(high) < INFINITY && t > 0.0f && scale < INFINITY);
  return {high, low, scale, broken ? NAN : 1.0f / __ldg(p.row_sum + row), delta, 1.0f / t, id};
}

// One element of the upstream gradient, to its terms.
__device__ __forceinline__ void write_terms(uint16_t* out, int64_t width, DType type, float value) {
  if (type == DType::float16) {
    *out = __half_as_ushort(__float2half_rn(value));
    return;
  }
  const int terms = type == DType::float32 ? 3 : 1;
  for (int i = 0; i < terms; ++i) {
    const __nv_bfloat16 term = __float2bfloat16_rn(value);
    out[i * width] = __bfloat16_as_ushort(term);
    value -= __bfloat162float(term);
  }
}

__global__ void __launch_bounds__(kBlock) soft_embedding_prepare_kernel(const SoftEmbeddingBackwardParams p,
                                                                        int64_t padded, int width, int terms) {
  const SoftEmbeddingParams& call = p.call;
  const unsigned blocks = static_cast<unsigned>(padded / (kBlock / kWarp));  // of a group
  const int lane = threadIdx.x % kWarp;
  const int64_t position = static_cast<int64_t>(blockIdx.x % blocks) * (kBlock / kWarp) + threadIdx.x / kWarp;
  const int64_t group = blockIdx.x / blocks, row = position * call.groups + group;
  const int64_t index = group * padded + position;
  const bool counted = row < call.rows && !is_masked(call, row);
  uint16_t* out = p.upstream + index * terms * width;
  double delta = 0.0;
  for (int d = lane; d < width; d += kWarp) {
    float g = 0.0f;
    if (counted && d < call.width) {
      g = load_element(p.grad, call.codebook_type, row * call.width + d);
      delta = fma(static_cast<double>(g), static_cast<double>(__ldg(p.soft + row * call.width + d)), delta);
    }
    write_terms(out + d, width, call.codebook_type, g);
  }
  delta = reduce_row<kWarp, kBlock>(delta, [](double first, double second) { return first + second; });
  if (lane == 0) {
    p.records[index] = counted ? record_of(p, row, static_cast<float>(delta)) : RowRecord{};
  }
}

// A block sums one part of the masked rows for one group: 8 warps take the positions in turn, their lanes the columns.
__global__ void __launch_bounds__(kBlock) soft_embedding_mask_parts_kernel(const SoftEmbeddingBackwardParams p) {
  constexpr int kWarps = kBlock / kWarp;
  SOFTDIMO_SHARED(double, sums, kWarps* kWarp);
  const SoftEmbeddingParams& call = p.call;
  const int64_t part = blockIdx.x / call.groups, group = blockIdx.x % call.groups;
  const int64_t positions = call.rows / call.groups;
  const int64_t end = (part + 1) * kMaskPositions < positions ? (part + 1) * kMaskPositions : positions;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t first = 0; first < call.width; first += kWarp) {
    double sum = 0.0;
    for (int64_t position = part * kMaskPositions + warp; position < end; position += kWarps) {
      const int64_t row = position * call.groups + group;
      if (first + lane < call.width && is_masked(call, row)) {
        sum += static_cast<double>(load_element(p.grad, call.codebook_type, row * call.width + first + lane));
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && first + lane < call.width) {
      for (int i = 1; i < kWarps; ++i) sum += sums[i * kWarp + lane];
      p.mask_parts[(part * call.groups + group) * call.width + first + lane] = static_cast<float>(sum);
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kBlock) sum_parts_kernel(const SumPartsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= p.size) return;
  double sum = 0.0;
  for (int64_t part = 0; part < p.count; ++part) sum += static_cast<double>(__ldg(p.parts + part * p.size + i));
  store_element(p.out, p.type, i, static_cast<float>(sum) * p.factor);
}

__device__ __forceinline__ int64_t offset(const Dimensions& dimensions, int64_t number) {
  int64_t sum = 0;
  for (int i = dimensions.count - 1; i >= 0; --i) {
    sum += number % dimensions.size[i] * dimensions.stride[i];
    number /= dimensions.size[i];
  }
  return sum;
}

__global__ void __launch_bounds__(kBlock) sum_rows_kernel(const SumRowsParams p) {
  const float* values = p.values + offset(p.kept, blockIdx.x);
  double sum = 0.0;
  for (int64_t j = threadIdx.x; j < p.reduced.total; j += kBlock) {
    sum += static_cast<double>(__ldg(values + offset(p.reduced, j)));
  }
  sum = reduce_row<kBlock, kBlock>(sum, [](double first, double second) { return first + second; });
  if (threadIdx.x == 0) store_element(p.out, p.type, blockIdx.x, static_cast<float>(sum));
}

bool blocks_fit(int64_t blocks) { return blocks <= INT32_MAX; }

}  // namespace

extern "C" int softdimo_soft_embedding_prepare(const SoftEmbeddingBackwardParams* params, void* stream) {
  const SoftEmbeddingParams& call = params->call;
  const int64_t padded = padded_positions(call);
  static_assert(kTileRows % (kBlock / kWarp) == 0, "a block has rows of one group");
  const int64_t blocks = call.groups * padded / (kBlock / kWarp);
  if (blocks == 0) return cudaSuccess;
  if (!blocks_fit(blocks)) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH(soft_embedding_prepare_kernel, static_cast<unsigned>(blocks), kBlock, 0,
                  static_cast<cudaStream_t>(stream), *params, padded, static_cast<int>(product_width(call.width)),
                  static_cast<int>(codebook_terms(call.codebook_type)));
  return cudaGetLastError();
}

extern "C" int softdimo_soft_embedding_mask_parts(const SoftEmbeddingBackwardParams* params, void* stream) {
  const int64_t blocks = mask_parts(params->call) * params->call.groups;
  if (blocks == 0) return cudaSuccess;
  if (!blocks_fit(blocks)) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH(soft_embedding_mask_parts_kernel, static_cast<unsigned>(blocks), kBlock, 0,
                  static_cast<cudaStream_t>(stream), *params);
  return cudaGetLastError();
}

extern "C" int softdimo_sum_parts(const SumPartsParams* params, void* stream) {
  const int64_t blocks = (params->size + kBlock - 1) / kBlock;
  if (blocks == 0) return cudaSuccess;
  if (!blocks_fit(blocks)) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH(sum_parts_kernel, static_cast<unsigned>(blocks), kBlock, 0, static_cast<cudaStream_t>(stream),
                  *params);
  return cudaGetLastError();
}

extern "C" int softdimo_sum_rows(const SumRowsParams* params, void* stream) {
  if (params->kept.total == 0) return cudaSuccess;
  if (!blocks_fit(params->kept.total)) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH(sum_rows_kernel, static_cast<unsigned>(params->kept.total), kBlock, 0,
                  static_cast<cudaStream_t>(stream), *params);
  return cudaGetLastError();
}

}  // namespace softdimo::cuda
