// Launchers of soft_embedding for vocabularies of at most 256 entries and codebooks of at most 16 columns, in any
// number of groups: MaskBit's, 2 groups of 128 entries and 7 columns. All groups go in one launch.
#pragma once

#include <cstdint>

#include "softdimo/cuda/soft_embedding.h"
#include "softdimo/cuda/soft_embedding_backward.h"

namespace softdimo::cuda {

constexpr int64_t kMaxTinyVocabulary = 256;
constexpr int64_t kMaxTinyWidth = 16;

inline bool is_tiny(const SoftEmbeddingParams& call) {
  return call.vocabulary <= kMaxTinyVocabulary && call.width <= kMaxTinyWidth;
}

// Parts of the rows of the codebook's gradient. By shapes alone, so that the order of a sum is the same on every
// device; never so many that their sum costs more than they.
inline int tiny_gradient_splits(const SoftEmbeddingParams& call) {
  constexpr int64_t kLeastPositions = 128, kMost = 256;
  const int64_t splits = (call.rows / call.groups + kLeastPositions - 1) / kLeastPositions;
  return static_cast<int>(splits < 1 ? 1 : splits < kMost ? splits : kMost);
}

// Each returns cudaSuccess (0) or the error of the launch; `stream` is a cudaStream_t of the current device. None
// allocates or waits. Of the parameters, only what is named here and `call` is read.

// output, row_max, row_sum, soft; by `hard`.
extern "C" int softdimo_soft_embedding_tiny_forward(const SoftEmbeddingForwardParams* params, void* stream);

// dlogits and dtemperature, each where it is not null; from row_max, row_sum and grad.
extern "C" int softdimo_soft_embedding_tiny_dlogits(const SoftEmbeddingBackwardParams* params, void* stream);

// dcodebook [splits, G, V, D], to be added up by softdimo_sum_parts; from row_max, row_sum and grad.
extern "C" int softdimo_soft_embedding_tiny_dcodebook(const SoftEmbeddingBackwardParams* params, void* stream);

}  // namespace softdimo::cuda
