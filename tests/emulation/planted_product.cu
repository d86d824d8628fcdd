#include <cuda_runtime.h>

#include <map>
#include <stdexcept>

#include "planted.h"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/ptx.cuh"

namespace {

using namespace softdimo::cuda;

// c += a b of 16-bit elements for two tiles: a [32, 64], b [8, 64] by columns or [64, 8] by rows, c [32, 8] in float.
//
//   shared memory   rows of a, then of b: eight chunks of 16 bytes each; chunk j of row r is at place j ^ r % 8
//   block           two warps, of 16 rows of c each; every thread copies four chunks of a and one of b
constexpr int kThreads = 64;
constexpr int kRows = 32;
constexpr int kChunks = 8;
constexpr int kColumns = 8;
constexpr int kBytes = (kRows + kColumns) * kChunks * 16;

enum class Bug {
  none,
  no_swizzle,  // right, and slow
  no_wait,
  no_commit,
  newest_not_waited,
  no_barrier,
  no_barrier_before_reuse,
  other_swizzle,
  fragment_order,
  row_overrun,
  row_misaligned,
  copy_overrun,
  copy_misaligned,
  source_misaligned,
};

template <Bug kBug>
__device__ __forceinline__ unsigned char* chunk(unsigned char* tile, int row, int j) {
  return tile + (row * kChunks + (kBug == Bug::no_swizzle ? j : j ^ row % 8)) * 16;
}

template <Bug kBug>
__device__ __forceinline__ void copy(const unsigned char* a, const unsigned char* b, unsigned char* shared) {
  const int row = threadIdx.x / kChunks, j = threadIdx.x % kChunks;
  unsigned char* const past = shared + kBytes + (kBug == Bug::copy_overrun ? 0 : -16);
  for (int r = row; r < kRows; r += kThreads / kChunks) {
    unsigned char* to = chunk<kBug>(shared, r, j);
    if (kBug == Bug::copy_misaligned) to += 8;
    const unsigned char* from = a + (r * kChunks + j) * 16;
    if (kBug == Bug::source_misaligned) from += 2;
    ptx::copy_async_16(kBug == Bug::copy_overrun && r == kRows - 1 ? past : to, from, 16);
  }
  if (kBug == Bug::newest_not_waited) ptx::commit_copies();
  ptx::copy_async_16(chunk<kBug>(shared, kRows + row, j), b + (row * kChunks + j) * 16, 16);
  if (kBug != Bug::no_commit) ptx::commit_copies();
}

template <Bug kBug>
__device__ __forceinline__ void wait() {
  if (kBug == Bug::newest_not_waited) {
    ptx::wait_copies<1>();
  } else if (kBug != Bug::no_wait) {
    ptx::wait_copies<0>();
  }
  if (kBug != Bug::no_barrier) __syncthreads();
}

// The products of one tile that is in shared memory.
template <bool kBfloat16, bool kByRows, Bug kBug>
__device__ __forceinline__ void multiply(float (&sum)[4], unsigned char* shared) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
  for (int k = 0; k < kChunks; k += 2) {
    uint32_t x[4], y[2];
    const int row = first_row + lane % 16, j = k + lane / 16;
    unsigned char* from = chunk<kBug>(shared, row, j);
    if (kBug == Bug::other_swizzle) from = shared + (row * kChunks + (j ^ row / 2 % 4)) * 16;
    if (kBug == Bug::row_overrun) from += kColumns * kChunks * 16 + 16;
    if (kBug == Bug::row_misaligned) from += 8;
    ptx::load_matrix_x4(x, from);
    if (kByRows) {  // row 8 k + lane of b is chunk lane % 8 of "row" k + lane / 8
      ptx::load_matrix_x2_transposed(y, chunk<kBug>(shared, kRows + k + lane / 8 % 2, lane % 8));
    } else {
      ptx::load_matrix_x2(y, chunk<kBug>(shared, kRows + lane % 8, k + lane / 8 % 2));
    }
    if (kBug == Bug::fragment_order) {
      const uint32_t other = x[1];
      x[1] = x[2];
      x[2] = other;
    }
    if (kBfloat16) {
      ptx::mma_bf16(sum, x, y);
    } else {
      ptx::mma_f16(sum, x, y);
    }
  }
}

// Both tiles go through one buffer: its second filling must wait for the readers of the first.
template <bool kBfloat16, bool kByRows, Bug kBug>
__global__ void product(const unsigned char* a, const unsigned char* b, float* c) {
  SOFTDIMO_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  float* const out = c + (threadIdx.x / 32 * 16 + lane / 4) * kColumns + lane % 4 * 2;
  float sum[4] = {out[0], out[1], out[8 * kColumns], out[8 * kColumns + 1]};
  for (int tile = 0; tile < 2; ++tile) {
    copy<kBug>(a + tile * kRows * kChunks * 16, b + tile * kColumns * kChunks * 16, shared);
    wait<kBug>();
    multiply<kBfloat16, kByRows, kBug>(sum, shared);
    if (kBug != Bug::no_barrier_before_reuse) __syncthreads();
  }
  out[0] = sum[0];
  out[1] = sum[1];
  out[8 * kColumns] = sum[2];
  out[8 * kColumns + 1] = sum[3];
}

using Kernel = void (*)(const unsigned char*, const unsigned char*, float*);

}  // namespace

void run_planted_product(const std::string& name, const void* a, const void* b, float* c) {
  static const std::map<std::string, Kernel> kernels = {
      {"bfloat16", product<true, false, Bug::none>},
      {"bfloat16 by rows", product<true, true, Bug::none>},
      {"float16", product<false, false, Bug::none>},
      {"float16 by rows", product<false, true, Bug::none>},
      {"no_swizzle", product<true, false, Bug::no_swizzle>},
      {"no_wait", product<true, false, Bug::no_wait>},
      {"no_commit", product<true, false, Bug::no_commit>},
      {"newest_not_waited", product<true, false, Bug::newest_not_waited>},
      {"no_barrier", product<true, false, Bug::no_barrier>},
      {"no_barrier_before_reuse", product<true, false, Bug::no_barrier_before_reuse>},
      {"other_swizzle", product<true, false, Bug::other_swizzle>},
      {"fragment_order", product<true, false, Bug::fragment_order>},
      {"row_overrun", product<true, false, Bug::row_overrun>},
      {"row_misaligned", product<true, false, Bug::row_misaligned>},
      {"copy_overrun", product<true, false, Bug::copy_overrun>},
      {"copy_misaligned", product<true, false, Bug::copy_misaligned>},
      {"source_misaligned", product<true, false, Bug::source_misaligned>},
  };
  const Kernel kernel = kernels.at(name);
  SOFTDIMO_LAUNCH(kernel, 1, kThreads, kBytes, nullptr, static_cast<const unsigned char*>(a),
                  static_cast<const unsigned char*>(b), c);
  if (cudaGetLastError() != cudaSuccess) throw std::runtime_error("the launch was refused");
}
