// soft_embedding on CPUs: what the binding tells the kernels, and the tables of kernels of one instruction set.
//
//   y[n]  = logits[n] + gumbel(seed, row_ids[n])         noise only where asked for
//   p[n]  = softmax(y[n] / T[n])
//   e[n]  = sum_v p[n, v] E[v]                           masked rows: the mask embedding
//
// "T" below is the compute type: float, or double when any input is double. A row is one (position, group) pair;
// row n belongs to group n % groups.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu {

struct SoftEmbedding {
  const void* logits;
  DType logits_type;
  Rows logits_rows;
  int64_t rows;
  int64_t groups;
  int64_t vocabulary;
  int64_t width;

  const void* codebook;  // [G, V, D] in its own type and strides
  DType codebook_type;
  int64_t codebook_stride[3];
  const void* packed_codebook;  // written by the kernels' pack

  double temperature;
  const void* row_temperature;  // T [rows], NaN where not positive; null for the scalar
  const bool* mask;             // [rows]; null when nothing is masked
  const void* mask_embedding;   // T [G, D]

  bool noise;
  uint64_t seed;
  uint32_t offset;
  const int64_t* row_ids;  // [rows]; null for 0 .. rows - 1

  // Truncation, before the noise: entries of x = logits / T with x > threshold are kept, and those with x = threshold
  // up to index `last`. Null when nothing is truncated.
  const void* row_threshold;  // T [rows]
  const int64_t* row_last;    // [rows]
};

struct Truncate {
  SoftEmbedding call;
  int64_t top_k;  // 0: all
  double top_p;   // 1: all
  void* row_threshold;
  int64_t* row_last;
};

struct Forward {
  SoftEmbedding call;
  bool hard;
  int64_t block_rows;  // rows of one task, at most kBlockRows
  void* output;        // [rows, D] in the codebook's type
  double* row_max;     // [rows]: max y, whose noise float32 cannot hold beside large logits
  void* row_sum;       // T [rows]: sum exp((y - max) / T)
  void* soft;          // T [rows, D]; null when the output is it
};

// What one task of the backward leaves behind for a row, about its slice of the vocabulary.
template <class T>
struct RowPartial {
  // For rows with an entry of p > 1/2:
  T others;      // sum of dlogits, without that entry
  int64_t peak;  // its index, or -1 where it is not in the slice
  // For the gradient of the temperature, and written only where it is wanted:
  T mass;      // sum of p
  T centre;    // mean of y - max under p
  T slope;     // sum of dlogits * (y - max - centre)
  T residual;  // sum of dlogits
};

struct Backward {
  SoftEmbedding call;
  const void* grad;  // [rows, D] contiguous in the codebook's type
  const double* row_max;
  const void* row_sum;
  const void* soft;      // T [rows, D]
  void* upstream;        // of upstream_bytes: grad as the products take it
  void* delta;           // T [rows]: g . e
  int64_t block_rows;    // rows of one block, at most kBlockRows
  int64_t tile;          // vocabulary entries of one task: a multiple of 4, at most kVocabularyChunk
  int64_t splits;        // parts of the rows, each with codebook gradients of its own
  void* partials;        // RowPartial<T> [tiles, rows]
  void* dlogits;         // [rows, V] contiguous in the logits' type; null when not wanted
  void* dcodebook;       // T (double: sums_in_double) [splits, G, V, D]; null when not wanted
  void* dtemperature;    // T [rows]; null when not wanted
};

// Fixed sizes: results depend on them and on shapes, never on the number of threads.
constexpr int64_t kVocabularyChunk = 256;  // entries of a row that are merged at a time
constexpr int64_t kLongChunk = 512;        // the same in the forward of bfloat16 products
constexpr int64_t kBlockRows = 128;        // most rows of one block
constexpr int64_t kWideRows = 112;         // the same, where products are not in bfloat16
constexpr int64_t kMaskChunk = 256;        // positions of one partial mask-embedding gradient
constexpr int64_t kNarrowWidth = 8;        // widest codebook whose products are summed in double

// Whether p E and p^T G are summed in double. All of so few columns may happen to be small sums of large terms, whose
// rounding is then the error of the result; and double costs little here, where a float32 vector is half empty.
SOFTDIMO_ALWAYS_INLINE bool sums_in_double(const SoftEmbedding& s) { return s.width <= kNarrowWidth; }

// The backward's blocks of rows: block i of a split of a group has positions first + [0, block_rows) of that split.
SOFTDIMO_ALWAYS_INLINE int64_t split_rows(const Backward& b) {
  return (b.call.rows / b.call.groups + b.splits - 1) / b.splits;
}
SOFTDIMO_ALWAYS_INLINE int64_t split_blocks(const Backward& b) {
  return (split_rows(b) + b.block_rows - 1) / b.block_rows;
}

// Kernels take a range of tasks; tasks are independent and may run in any order and on any thread.
struct ForwardKernels {
  int64_t (*packed_bytes)(const SoftEmbedding&);
  void (*pack)(const SoftEmbedding&, void* packed, int64_t begin, int64_t end);  // over G * V
  void (*forward)(const Forward&, int64_t begin, int64_t end);                   // over groups x blocks of rows
};
struct BackwardKernels {
  int64_t (*packed_bytes)(const SoftEmbedding&);
  void (*pack)(const SoftEmbedding&, void* packed, int64_t begin, int64_t end);  // over G * V
  int64_t (*upstream_bytes)(const Backward&);
  void (*pack_upstream)(const Backward&, int64_t begin, int64_t end);  // over groups x splits x blocks; delta too
  void (*backward)(const Backward&, int64_t begin, int64_t end);       // over groups x splits x tiles
};
// What has no products.
struct RowKernels {
  void (*truncate)(const Truncate&, int64_t begin, int64_t end);     // over rows
  void (*finish_rows)(const Backward&, int64_t begin, int64_t end);  // over rows
  // Sum over `parts` of T [parts, n] in index order, in double, into [n] of the given type.
  void (*reduce)(const void* parts, int64_t parts_count, int64_t n, void* out, DType, int64_t begin, int64_t end);
  // Sum of g over the masked rows of one chunk, into [chunks, G, D]; over chunks of kMaskChunk positions.
  void (*mask_gradient)(const SoftEmbedding&, const void* grad, double* chunks, int64_t begin, int64_t end);
};

// One for each way to multiply.
template <class Kernels>
struct ByProduct {
  Kernels float64;
  Kernels float32;
  Kernels float32_sums_in_double;
  Kernels bfloat16;            // p in one bfloat16 term; empty where the instruction set has no such product
  Kernels bfloat16_two_terms;  // likewise
};

struct SoftEmbeddingForwardTable : ByProduct<ForwardKernels> {};
struct SoftEmbeddingBackwardTable : ByProduct<BackwardKernels> {};
struct SoftEmbeddingRowTable {
  RowKernels float64;
  RowKernels float32;
};

SOFTDIMO_DECLARE_TABLE(SoftEmbeddingForwardTable, soft_embedding_forward_table)
SOFTDIMO_DECLARE_TABLE(SoftEmbeddingBackwardTable, soft_embedding_backward_table)
SOFTDIMO_DECLARE_TABLE(SoftEmbeddingRowTable, soft_embedding_row_table)

}  // namespace softdimo::cpu
