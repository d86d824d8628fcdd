// linear_soft_embedding on CPUs: what the binding tells the kernels, and the table of kernels of one instruction set.
//
//   z[n, g] = W[g] hidden[n] + bias[n, g]                logits: never held for more than a block of rows
//   p[n, g] = softmax(z[n, g] / T[n, g])
//   e[n, g] = sum_v p[n, g, v] E[g, v]                   masked rows: the mask embedding
//
// A position n has one hidden vector; a row is one (position, group) pair, row n * groups + g. "T" below is the compute
// type, float or double; "S" is double where the codebook is narrow (sums_in_double), else T.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu {

// Rows of a tensor with any strides; element i of row n is at rows.offset(n) + i * step.
struct RowMatrix {
  const void* data;
  DType type;
  Rows rows;
  int64_t step;
};

// A tensor [G, V, columns] in its own type and strides.
struct TokenTable {
  const void* data;
  DType type;
  int64_t stride[3];
  int64_t columns;
};

struct LinearSoftEmbedding {
  RowMatrix hidden;  // over positions
  int64_t positions;
  int64_t groups;
  int64_t vocabulary;
  TokenTable weight;    // columns: H
  TokenTable codebook;  // columns: D
  RowMatrix bias;       // over rows; no data where there is none
  double temperature;
  const void* row_temperature;  // T [rows], NaN where not positive; null for the scalar
  const bool* mask;             // [rows]; null when nothing is masked
  const void* mask_embedding;   // T [G, D]
  int64_t slice;                // entries of the vocabulary that are handled at a time
  bool half;                    // products of bfloat16: hidden, weight, codebook and their gradients' factors

  SOFTDIMO_ALWAYS_INLINE int64_t slices() const { return (vocabulary + slice - 1) / slice; }
};

struct LinearForward {
  LinearSoftEmbedding call;
  int64_t block_rows;  // rows of one task
  void* output;        // [rows, D] in the codebook's type
  void* logits;        // T [G, V, positions], as they are computed; null when not kept
  void* row_max;       // T [rows]
  void* row_sum;       // T [rows]: sum exp((z - max) / T)
  void* soft;          // T [rows, D]; null when the output is it, or nothing is kept
};

// What one slice of the vocabulary leaves behind for each row of a block; fields are arrays over the block's rows.
enum class SliceField : int {
  others,  // sum of dlogits, without a dominant entry
  // For the gradient of the temperature, and written only where it is wanted:
  mass,      // sum of p
  centre,    // mean of z - max under p
  slope,     // sum of dlogits * (z - max - centre)
  residual,  // sum of dlogits
};

// A block of positions that are not masked in every group, on its way through the backward. Scratch is shared by all
// threads; `stride` is padded rows: the distance between its vocabulary entries.
struct LinearBackward {
  LinearSoftEmbedding call;
  RowMatrix grad;  // over rows
  const void* row_max;
  const void* row_sum;
  const void* soft;    // T [rows, D]
  const void* logits;  // T [G, V, positions]; null: recompute

  const int64_t* position;  // [count]
  int64_t count;
  int64_t chain;  // rows that are summed in one go: the same sums for any block size
  int64_t product_rows;  // the same for products of bfloat16: all of a block where no cut changes a bit
  bool first;     // nothing was added to the sums yet

  // The factors of the block. With half they are packed as pack_bf16.h says, the [.. rows] ones product_rows at a time.
  void* hidden_columns;  // T [panels of rows, H, panel width]
  void* hidden_rows;     // T [panels of H, count, panel width]
  void* grad_columns;    // T [G, panels of rows, D, panel width]
  void* grad_rows;       // S [G, panels of D, count, panel width]
  void* row_state;       // T [4, G, stride]: max, 1 / sum (0: masked), delta = g . e, temperature
  void* partials;        // T [slices, slice_fields, G, stride]
  int64_t slice_fields;  // 1, or 5 with the temperature's gradient
  int64_t* peaks;        // [slices, G, stride]: the entry with p > 1/2, or -1
  void* dlogits;         // T [G, dlogits_rows, stride]; with half each slice becomes bfloat16 [rows, slice] at the end
  int64_t dlogits_rows;  // slices() * slice
  int64_t stride;

  // Results; null when not wanted.
  void* dhidden;       // [positions, H] contiguous in hidden's type
  void* dweight;       // T [G, V, weight_row]; with half [G, panels, V, kRowUnit]: each panel is one stream
  int64_t weight_row;  // H rounded up to kRowUnit
  void* dcodebook;     // S [G, V, codebook_row]; with half as dweight
  int64_t codebook_row;
  void* dbias;  // double, or the bias's type where each entry has one row and one token
  DType bias_type;
  Rows bias_rows;  // of dbias
  int64_t bias_step;
  bool bias_direct;
  void* dtemperature;  // T [rows]

  SOFTDIMO_ALWAYS_INLINE bool wants_dlogits() const {
    return dhidden != nullptr || dweight != nullptr || dbias != nullptr || dtemperature != nullptr;
  }
};

// The sums of a table's gradient, of T, or of double: [G, panels, rows, width].
struct TableSums {
  const void* data;
  bool wide;
  int64_t panels, rows, width;
};

// Kernels take a range of tasks; tasks are independent and may run in any order and on any thread.
struct LinearSoftEmbeddingKernels {
  void (*forward)(const LinearForward&, int64_t begin, int64_t end);  // over groups x blocks of rows
  // One block of the backward, in this order:
  void (*load_rows)(const LinearBackward&, int64_t begin, int64_t end);        // over units of kRowUnit rows
  void (*slices)(const LinearBackward&, int64_t begin, int64_t end);           // over groups x slices
  void (*finish_rows)(const LinearBackward&, int64_t begin, int64_t end);      // over groups x count
  void (*weight_gradient)(const LinearBackward&, int64_t begin, int64_t end);  // over groups x slices; always
  void (*hidden_gradient)(const LinearBackward&, int64_t begin, int64_t end);  // over units of kRowUnit columns of H
  void (*bias_gradient)(const LinearBackward&, int64_t begin, int64_t end);    // over entries of the vocabulary
  // Entries [begin, end) of G * rows into [G, rows, columns] of the given type.
  void (*narrow_sums)(const TableSums&, int64_t columns, void* out, DType, int64_t begin, int64_t end);
  // Sum of g over masked rows into double [G, D]; over units of kRowUnit columns of G * D.
  void (*mask_gradient)(const LinearSoftEmbedding&, const RowMatrix& grad, double* sum, int64_t begin, int64_t end);
};

// Fixed sizes: results depend on them and on shapes, never on the number of threads.
constexpr int64_t kSlice = 256;         // most entries of the vocabulary handled at a time; with half, that many
constexpr int64_t kSmallSlice = 128;    // with half and a vocabulary below kManyEntries
constexpr int64_t kManyEntries = 1024;
constexpr int64_t kChainSlice = 112;    // without: one chain of gemm.h
constexpr int64_t kRowUnit = 32;        // a multiple of every panel width
constexpr int64_t kColumnBlock = 512;   // columns of hidden's gradient that are summed at a time
constexpr int64_t kNarrowTable = 8;     // widest codebook whose products are summed in double

// All of so few columns may happen to be small sums of large terms, whose rounding is then the error of the result.
SOFTDIMO_ALWAYS_INLINE bool sums_in_double(const LinearSoftEmbedding& s) { return s.codebook.columns <= kNarrowTable; }

struct LinearSoftEmbeddingTable {
  bool bfloat16_products;
  bool free_cuts;  // the sum over the rows of a product of bfloat16 may be cut at any multiple of kRowUnit
  LinearSoftEmbeddingKernels float32;
  LinearSoftEmbeddingKernels float64;
};

SOFTDIMO_DECLARE_TABLE(LinearSoftEmbeddingTable, linear_soft_embedding_table)

}  // namespace softdimo::cpu
