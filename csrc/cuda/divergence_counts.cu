// The counted rows of each group of rows, for a divergence whose sums are divided by them.
//
//   formula   counts[g] = how many of mask[g R] ... mask[(g + 1) R - 1] are true, R rows per group
//   bytes     1 per row (a mask with a stride: up to 32 per row)
//   floor     the launch, about 2 us: 32768 rows are 33 kB
//   tiles     a block of 256 threads has a group, a thread 16 rows at a time; integers, so any order gives the same

#include <cuda_runtime.h>

#include "softdimo/cuda/divergence.h"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/row_reduce.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 256;

// Bytes of a word that are not zero, as the kernels that read the mask have it: each carries into its highest bit.
__device__ __forceinline__ int true_bytes(uint32_t word) {
  return __popc((((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u);
}

__device__ __forceinline__ int true_bytes(const uint4& bytes) {
  return true_bytes(bytes.x) + true_bytes(bytes.y) + true_bytes(bytes.z) + true_bytes(bytes.w);
}

template <bool kAligned>
__device__ __forceinline__ int count_row(const RowReader<uint8_t>& row, const uint8_t* mask, int rows) {
  constexpr int kChunk = RowReader<uint8_t>::kChunk;
  int count = 0;
  for (int j = threadIdx.x; j < row.chunks(); j += kBlock) {
    if (row.template inside<kAligned>(j)) {
      count += true_bytes(row.template load<kAligned>(j));
      continue;
    }
    for (int n = j * kChunk; n < (j + 1) * kChunk && n < rows; ++n) count += __ldg(mask + n) != 0;
  }
  return count;
}

__global__ void __launch_bounds__(kBlock) row_count_kernel(const RowCountParams p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.rows_per_group;
  const uint8_t* mask = p.mask.data + first * p.mask.stride;
  const int rows = static_cast<int>(p.rows_per_group);
  int count = 0;
  if (p.mask.stride == 1) {
    const RowReader<uint8_t> row(mask, rows);
    count = row.aligned() ? count_row<true>(row, mask, rows) : count_row<false>(row, mask, rows);
  } else {
    for (int n = threadIdx.x; n < rows; n += kBlock) count += __ldg(mask + n * p.mask.stride) != 0;
  }
  count = reduce_row<kBlock, kBlock>(count, [](int a, int b) { return a + b; });
  if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}

}  // namespace

extern "C" int softdimo_count_rows(const RowCountParams* params, void* stream) {
  if (params->rows_per_group > INT32_MAX - 16) return cudaErrorInvalidValue;
  if (params->groups > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (params->groups <= 0) return cudaSuccess;
  SOFTDIMO_LAUNCH(row_count_kernel, static_cast<unsigned>(params->groups), kBlock, 0,
                  static_cast<cudaStream_t>(stream), *params);
  return cudaGetLastError();
}

}  // namespace softdimo::cuda
