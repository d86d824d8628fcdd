// soft_embedding: the codebook as tensor cores take it, written once per call where it is not so already.
//
//   formula   packed[t, g, v, d] = term t of E[g, v, d], and 0 for D <= d < W (the padded width)
//             16-bit codebooks: one term, the number. float32: three bfloat16 terms whose sum is the number,
//             term 0 = round(x), term 1 = round(x - term 0), term 2 = round(x - term 0 - term 1)
//   bytes     G V (b D + 2 W) with one term, G V (4 D + 6 W) with three
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 x 64 in float32 are 5.2 MB, so 2.9 / 1.7 /
//             1.2 us; less where it stays in L2. A launch costs more
//   tiles     a thread writes 16 bytes of each term: 8 columns of one entry

#include <cuda_runtime.h>

#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/soft_embedding.h"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kColumns = 8;  // of a thread

// x rounded to bfloat16, as a float; never to infinity. A NaN may have its bits in the half that is cut off.
__device__ __forceinline__ float bfloat16_part(float x) {
  const float rounded = __uint_as_float(ptx::pack_bf16(x, 0.0f) << 16);
  if (x != x) return NAN;
  return fabsf(rounded) < INFINITY ? rounded : __uint_as_float(__float_as_uint(x) & 0xffff0000u);
}

__device__ __forceinline__ uint4 pack_exact(const float (&x)[kColumns]) {
  return make_uint4(ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3]), ptx::pack_bf16(x[4], x[5]),
                    ptx::pack_bf16(x[6], x[7]));
}

struct Place {
  int64_t group, entry, column;
};

// A 16-bit codebook is moved as bits.
__device__ __forceinline__ uint4 read_bits(const SoftEmbeddingParams& p, const Place& at) {
  const auto* source = static_cast<const uint16_t*>(p.codebook) + at.group * p.codebook_stride[0] +
                       at.entry * p.codebook_stride[1];
  uint32_t word[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    word[i] = at.column + i < p.width ? __ldg(source + (at.column + i) * p.codebook_stride[2]) : 0u;
  }
  return make_uint4(word[0] | word[1] << 16, word[2] | word[3] << 16, word[4] | word[5] << 16,
                    word[6] | word[7] << 16);
}

__global__ void __launch_bounds__(kBlock) soft_embedding_pack_kernel(const SoftEmbeddingParams p, uint4* packed,
                                                                    int width) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const int64_t term = p.groups * p.vocabulary * (width / kColumns);
  if (i >= term) return;
  const int pieces = width / kColumns;
  const int64_t row = i / pieces;
  const Place at{row / p.vocabulary, row % p.vocabulary, i % pieces * kColumns};
  if (p.codebook_type != DType::float32) {
    packed[i] = read_bits(p, at);
    return;
  }
  const auto* source = static_cast<const float*>(p.codebook) + at.group * p.codebook_stride[0] +
                       at.entry * p.codebook_stride[1];
  float x[kColumns], part[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    x[k] = at.column + k < p.width ? __ldg(source + (at.column + k) * p.codebook_stride[2]) : 0.0f;
  }
#pragma unroll
  for (int t = 0; t < 3; ++t) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      part[k] = bfloat16_part(x[k]);
      x[k] = fabsf(x[k]) < INFINITY ? x[k] - part[k] : 0.0f;  // infinity and NaN are their own first term
    }
    packed[t * term + i] = pack_exact(part);
  }
}

}  // namespace

extern "C" int softdimo_soft_embedding_pack(const SoftEmbeddingParams* params, void* packed, void* stream) {
  const int64_t width = padded_width(params->width);
  const int64_t threads = params->groups * params->vocabulary * (width / kColumns);
  const int64_t blocks = (threads + kBlock - 1) / kBlock;
  if (params->width < 1 || params->width > kMaxSoftEmbeddingWidth || params->vocabulary < 1) {
    return cudaErrorInvalidValue;
  }
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH(soft_embedding_pack_kernel, static_cast<unsigned>(blocks), kBlock, 0,
                  static_cast<cudaStream_t>(stream), *params, static_cast<uint4*>(packed), static_cast<int>(width));
  return cudaGetLastError();
}

}  // namespace softdimo::cuda
