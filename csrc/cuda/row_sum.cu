// row_sum: the sum or mean over rows of one float per row; and a number divided by the number of counted rows.
//
//   formula   result = sum_n values[n]          mean: divided by max(1, how many mask[n] are true)
//   bytes     4 per row and one mask byte
//   FLOPs     1 per row, in double
//   floor     the launch, about 2 us: 32768 rows are 0.13 MB, which the kernel before has left in the L2 cache. Past
//             that there is a second launch, and 2^20 rows are 5 MB: 3 / 2 / 1 us (A100 / H100 / H200)
//   tiles     a block of 1024 threads adds up 32768 rows; a last block adds up the blocks
//
//             thread t of block b: rows 32768 b + t, + 1024, + 2048, ...       then merge: shuffles, shared memory
//
// Who adds what to what follows from the number of rows alone.

#include "softdimo/cuda/row_sum.h"

#include <cuda_runtime.h>

#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/row_reduce.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 1024;
constexpr int64_t kMostBlocks = 0x7fffffff;

struct Merge {
  __device__ __forceinline__ RowSumPartial operator()(const RowSumPartial& first, const RowSumPartial& second) const {
    return {first.total + second.total, first.count + second.count};
  }
};

__device__ __forceinline__ void finish(const RowSumParams& p, const RowSumPartial& all) {
  const double total = p.value == nullptr ? all.total : static_cast<double>(*p.value);
  const int64_t count = p.mask != nullptr ? all.count : p.rows;
  *p.result = static_cast<float>(p.mean && count > 1 ? total / static_cast<double>(count) : total);
}

__global__ void __launch_bounds__(kBlock) row_sum_kernel(const RowSumParams p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowSumSegment;
  const int64_t last = first + kRowSumSegment < p.rows ? first + kRowSumSegment : p.rows;
  RowSumPartial partial{0.0, 0};
#pragma unroll 8
  for (int64_t n = first + threadIdx.x; n < last; n += kBlock) {
    if (p.value == nullptr) partial.total += static_cast<double>(__ldg(p.values + n));
    if (p.mask != nullptr) partial.count += __ldg(p.mask + n * p.mask_stride) != 0;
  }
  partial = reduce_row<kBlock, kBlock>(partial, Merge{});
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1) {
    p.partials[blockIdx.x] = partial;
  } else {
    finish(p, partial);
  }
}

__global__ void __launch_bounds__(kBlock) row_sum_merge_kernel(const RowSumParams p, int blocks) {
  RowSumPartial partial{0.0, 0};
  for (int i = threadIdx.x; i < blocks; i += kBlock) partial = Merge{}(partial, p.partials[i]);
  partial = reduce_row<kBlock, kBlock>(partial, Merge{});
  if (threadIdx.x == 0) finish(p, partial);
}

}  // namespace

extern "C" int softdimo_row_sum(const RowSumParams* params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (params->rows < 0) return cudaErrorInvalidValue;
  const int64_t partials = row_sum_partials(params->rows);
  if (partials > kMostBlocks) return cudaErrorInvalidConfiguration;
  const int blocks = partials > 0 ? static_cast<int>(partials) : 1;
  SOFTDIMO_LAUNCH(row_sum_kernel, blocks, kBlock, 0, queue, *params);
  if (blocks > 1) {
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    SOFTDIMO_LAUNCH(row_sum_merge_kernel, 1, kBlock, 0, queue, *params, blocks);
  }
  return cudaGetLastError();
}

}  // namespace softdimo::cuda
