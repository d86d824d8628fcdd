// Launchers of soft_embedding: raw pointers and sizes in, a CUDA error code out.
//
//   y[n] = logits[n] + gumbel(seed, row_ids[n])     noise only where asked for
//   p[n] = softmax(y[n] / T[n])
//   e[n] = sum_v p[n, v] E[v]                        masked rows: the mask embedding
//
// A row is one (position, group) pair; row n belongs to group n % groups.
#pragma once

#include <cstdint>

#include "softdimo/cuda/limits.h"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

// What forward and backward take alike. Strides count elements and may be zero; types are float32, bfloat16, float16.
struct SoftEmbeddingParams {
  const void* logits;  // row n at logits + n * row_stride, contiguous, at any alignment
  DType logits_type;
  int64_t rows;  // a multiple of groups
  int64_t groups;
  int64_t vocabulary;
  int64_t row_stride;

  const void* codebook;  // [G, V, D], any strides
  DType codebook_type;
  int64_t width;
  int64_t codebook_stride[3];
  bool high_precision;  // p enters products of 16-bit numbers in two terms

  float temperature;
  const float* row_temperature;  // null: `temperature` for every row. A row where it is not positive is NaN.
  int64_t row_temperature_stride;
  const uint8_t* mask;  // not 0: the row is the mask embedding, its logits are not read. Null: no row is.
  int64_t mask_stride;
  const void* mask_embedding;  // [G, D] contiguous
  DType mask_embedding_type;

  const int64_t* seed;     // in device memory: (seed, offset). Null: no noise.
  const int64_t* row_ids;  // null: 0 .. rows - 1
  int64_t row_ids_stride;
};

struct SoftEmbeddingForwardParams {
  SoftEmbeddingParams call;
  bool hard;         // the value is E[argmax y], the lowest index on ties
  void* output;      // [rows, D] contiguous in the codebook's type
  double* row_max;   // [rows]: max y, whose noise float32 cannot hold beside large logits; masked rows: 0
  float* row_sum;    // [rows]: sum exp((y - row_max) / T); masked rows: 1
  float* soft;       // [rows, D]: the soft value where the output is not it (hard, or a 16-bit codebook), else null;
                     // masked rows: 0
  void* packed;      // of soft_embedding_packed_bytes, or null where that is 0
  void* workspace;   // of softdimo_soft_embedding_workspace_bytes, or null where that is 0
};

// ---------------------------------------------------------------------------------------------------
// the codebook as products take it

// Columns are padded with zeros to one of these widths.
constexpr int64_t kMaxSoftEmbeddingWidth = 128;
inline int64_t padded_width(int64_t width) { return width <= 64 ? 64 : 128; }

// A 16-bit codebook enters products as it is. A float32 number is the sum of three bfloat16 terms, each of them what the
// terms before it leave, rounded to nearest.
inline int64_t codebook_terms(DType type) { return type == DType::float32 ? 3 : 1; }

// Whether rows of the codebook can be copied 16 bytes at a time as they are.
inline bool is_packed(const SoftEmbeddingParams& p) {
  return p.codebook_type != DType::float32 && p.width == padded_width(p.width) && p.codebook_stride[2] == 1 &&
         p.codebook_stride[1] % 8 == 0 && p.codebook_stride[1] <= INT32_MAX && p.codebook_stride[0] % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.codebook) % 16 == 0;
}

// [terms, G, V, padded width] of 16-bit numbers; 0 where is_packed.
inline int64_t soft_embedding_packed_bytes(const SoftEmbeddingParams& p) {
  return is_packed(p) ? 0 : 2 * codebook_terms(p.codebook_type) * p.groups * p.vocabulary * padded_width(p.width);
}

// ---------------------------------------------------------------------------------------------------
// launchers: queue kernels on `stream` (a cudaStream_t) of the current device and return cudaSuccess (0) or the error
// of a launch. They neither allocate nor wait.

// Writes `packed`, of soft_embedding_packed_bytes > 0.
extern "C" int softdimo_soft_embedding_pack(const SoftEmbeddingParams* params, void* packed, void* stream);

// D <= 128, any V. Packs the codebook first where is_packed says that it is not.
extern "C" int softdimo_soft_embedding_forward(const SoftEmbeddingForwardParams* params, void* stream);

// Bytes of the forward's workspace.
extern "C" int64_t softdimo_soft_embedding_workspace_bytes(const SoftEmbeddingParams* params);

}  // namespace softdimo::cuda
