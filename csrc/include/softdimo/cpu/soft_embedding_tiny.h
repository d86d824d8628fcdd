// soft_embedding on CPUs for tiny vocabularies: a codebook that stays in the first-level cache beside its rows.
#pragma once

#include "softdimo/cpu/soft_embedding.h"

namespace softdimo::cpu {

// Below kTinyLeast entries most of a vector is empty, and so few sums may all be small sums of large terms, which the
// general kernels take in double.
constexpr int64_t kTinyLeast = 16, kTinyVocabulary = 256, kTinyWidth = 16;
constexpr int64_t kTinyRows = 16;  // rows of one task of the forward

// Whether the tiny kernels take a call that computes in float32; they know neither noise nor truncation nor hard
// values, and no gradient of the temperature.
SOFTDIMO_ALWAYS_INLINE bool is_tiny(const SoftEmbedding& s) {
  return s.vocabulary >= kTinyLeast && s.vocabulary <= kTinyVocabulary && s.width <= kTinyWidth;
}

struct SoftEmbeddingTinyTable {
  int64_t (*packed_bytes)(const SoftEmbedding&);
  void (*pack)(const SoftEmbedding&, void* packed, int64_t begin, int64_t end);  // over G * V
  void (*forward)(const Forward&, int64_t begin, int64_t end);  // over tasks of kTinyRows rows
  // Over splits; dcodebook is double [splits, G, V, D]. What else Backward holds for its products is not used.
  void (*backward)(const Backward&, int64_t begin, int64_t end);
};

SOFTDIMO_DECLARE_TABLE(SoftEmbeddingTinyTable, soft_embedding_tiny_table)

}  // namespace softdimo::cpu
