// Launchers of soft_embedding's backward for codebooks of at most kMaxSoftEmbeddingWidth columns.
//
//   prepare     gathers what a row needs, g . e included, and packs the upstream gradient for the products
//   dlogits     the gradient of the logits, and what finish needs
//   finish      the dominant entry of nearly one-hot rows; the gradient of each row's temperature
//   dcodebook   the codebook's gradient, in parts of the rows
//   mask_parts  the mask embedding's gradient, in parts of the rows
//   sum_parts   adds parts up, in index order
//   sum_rows    a gradient of each row, to the shape that was broadcast to the rows
#pragma once

#include <cstdint>

#include "softdimo/cuda/soft_embedding.h"

namespace softdimo::cuda {

// Fixed sizes: results depend on them and on shapes alone.
constexpr int kTileRows = 128;         // positions of a block of dlogits; packed arrays are padded to them
constexpr int kChunkEntries = 1024;    // entries of a row that one block of dlogits walks over
constexpr int kGradientEntries = 128;  // entries of the vocabulary that a block of dcodebook owns
constexpr int kMaskPositions = 256;    // positions of one part of the mask embedding's gradient

// What the products need of one row, in one place. Masked rows and padding have inverse = 0, and no NaN.
struct alignas(16) RowRecord {
  float top, top_low;  // the saved maximum as the sum of two
  float scale;         // log2(e) / T
  float inverse;       // 1 / sum
  float delta;         // g . e
  float inverse_t;     // 1 / T
  int64_t id;          // of the noise
};

// What a block of dlogits leaves of a row for finish.
struct RowPartial {
  // Written for rows with an entry of p > 1/2:
  float others;  // sum of dlogits without that entry
  int peak;      // its index, or -1 where another chunk has it
  // Written where the gradient of the temperature is wanted:
  float mass;      // sum of p
  float centre;    // mean of y - max under p
  float slope;     // sum of dlogits (y - max - centre)
  float residual;  // sum of dlogits
};

struct SoftEmbeddingBackwardParams {
  SoftEmbeddingParams call;

  // What the forward saved and the upstream gradient, contiguous.
  const double* row_max;  // [rows]
  const float* row_sum;   // [rows]
  const float* soft;      // [rows, D]
  const void* grad;       // [rows, D] in the codebook's type

  // Workspace. Positions are padded to a multiple of kTileRows.
  RowRecord* records;  // [G, padded positions]
  uint16_t* upstream;  // [G, padded positions, terms, product width]: grad as products take it
  const void* packed;  // the codebook by softdimo_soft_embedding_pack, or null where it is_packed
  RowPartial* partials;  // [G, padded positions / kTileRows, chunks, kTileRows]
  int splits;            // parts of the rows of dcodebook
  float* dcodebook;      // [splits, G, V, D]
  float* mask_parts;     // [parts, G, D]

  // Gradients; null where not wanted.
  void* dlogits;        // [rows, V] contiguous in the logits' type
  float* dtemperature;  // [rows]
};

// The columns that products take: of the packed upstream gradient, and of tiles in shared memory.
inline int64_t product_width(int64_t width) { return width <= 64 ? 64 : kMaxSoftEmbeddingWidth; }
inline int64_t padded_positions(const SoftEmbeddingParams& call) {
  return (call.rows / call.groups + kTileRows - 1) / kTileRows * kTileRows;
}
inline int64_t upstream_bytes(const SoftEmbeddingParams& call) {
  return 2 * call.groups * padded_positions(call) * codebook_terms(call.codebook_type) * product_width(call.width);
}
inline int64_t row_chunks(const SoftEmbeddingParams& call) {
  return (call.vocabulary + kChunkEntries - 1) / kChunkEntries;
}
inline int64_t mask_parts(const SoftEmbeddingParams& call) {
  return (call.rows / call.groups + kMaskPositions - 1) / kMaskPositions;
}

// Parts of the rows of dcodebook: enough blocks to fill a device, and few enough parts that writing them costs little
// beside reading the logits. By shapes alone, so that the order of a sum is the same on every device.
inline int gradient_splits(const SoftEmbeddingParams& call) {
  constexpr int64_t kBlocks = 512, kLeastPositions = 512;
  const int64_t tiles = call.groups * ((call.vocabulary + kGradientEntries - 1) / kGradientEntries);
  const int64_t wanted = (kBlocks + tiles - 1) / tiles, most = call.rows / call.groups / kLeastPositions;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

// What the parts of dcodebook are to be multiplied by. In half precision p is taken times 2^15: it is at most 1, and of
// use far below the smallest half.
constexpr float kHalfScale = 32768.0f;
inline float gradient_factor(const SoftEmbeddingParams& call) {
  return call.codebook_type == DType::float16 ? 1.0f / kHalfScale : 1.0f;
}

// out[i] = factor * sum over parts of parts[part, i], in index order, in the given type.
struct SumPartsParams {
  const float* parts;
  int64_t count;
  int64_t size;
  float factor;
  void* out;
  DType type;
};

// A number split into one index per dimension, the last dimension first, each times a stride.
struct Dimensions {
  static constexpr int kMost = 16;
  int count = 0;
  int64_t total = 1;  // product of the sizes
  int64_t size[kMost], stride[kMost];
};

// out[i] = sum over j of values[kept(i) + reduced(j)], in the given type.
struct SumRowsParams {
  const float* values;
  Dimensions kept, reduced;
  void* out;
  DType type;
};

// Each returns cudaSuccess (0) or the error of a launch; `stream` is a cudaStream_t of the current device. None
// allocates or waits.
extern "C" int softdimo_soft_embedding_prepare(const SoftEmbeddingBackwardParams* params, void* stream);
extern "C" int softdimo_soft_embedding_dlogits(const SoftEmbeddingBackwardParams* params, void* stream);
extern "C" int softdimo_soft_embedding_finish(const SoftEmbeddingBackwardParams* params, void* stream);
extern "C" int softdimo_soft_embedding_dcodebook(const SoftEmbeddingBackwardParams* params, void* stream);
extern "C" int softdimo_soft_embedding_mask_parts(const SoftEmbeddingBackwardParams* params, void* stream);
extern "C" int softdimo_sum_parts(const SumPartsParams* params, void* stream);
extern "C" int softdimo_sum_rows(const SumRowsParams* params, void* stream);

}  // namespace softdimo::cuda
