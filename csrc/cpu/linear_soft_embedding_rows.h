// What forward and backward of linear_soft_embedding share: reading rows and tables into panels, logits, exponentials.
//
// Tiles of logits lie [vocabulary, rows]: the weight is then the left factor of its product and needs no transposition,
// and every step of the softmax is elementwise over vectors of rows.
#pragma once

#include <cmath>

#include "gemm_bf16.h"
#include "scratch.h"
#include "simd.h"
#include "softdimo/cpu/linear_soft_embedding.h"
#include "transpose.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// What factors of products are made of.
template <class T, bool Half>
struct Factor {
  using Type = T;
};
template <class T>
struct Factor<T, true> {
  using Type = Bfloat16;
};
template <class T, bool Half>
using Element = typename Factor<T, Half>::Type;

// Whether the kernels of compute type T multiply in bfloat16 where the call asks for it.
template <class T>
constexpr bool kHasHalf = kHasBfloat16Product && sizeof(T) == 4;

// Whether products of bfloat16 go on exactly where the sum in memory ends, wherever it was cut.
#ifdef __AMX_BF16__
constexpr bool kFreeCuts = true;
#else
constexpr bool kFreeCuts = false;
#endif

// Between the rows of a left factor of bfloat16.
SOFTDIMO_ALWAYS_INLINE int64_t left_row(int64_t depth) { return padded_depth(depth) + kLeftPad; }

// n elements, `step` apart.
template <class T>
void read(const void* data, DType type, int64_t first, int64_t step, int64_t n, T* out) {
  if (step == 1) return widen(data, type, first, n, out);
  for (int64_t i = 0; i < n; ++i) widen(data, type, first + i * step, 1, out + i);
}

template <class T>
void read_row(const RowMatrix& matrix, int64_t row, int64_t first, int64_t n, T* out) {
  read(matrix.data, matrix.type, matrix.rows.offset(row) + first * matrix.step, matrix.step, n, out);
}

// Columns [first, first + n) of entry v of a group.
template <class T>
void read_entry(const TokenTable& table, int64_t group, int64_t v, int64_t first, int64_t n, T* out) {
  const int64_t at = group * table.stride[0] + v * table.stride[1] + first * table.stride[2];
  read(table.data, table.type, at, table.stride[2], n, out);
}

// Entries [first, first + n) with `row` elements between them: power-of-two strides share cache sets.
template <class T>
void copy_entries(const TokenTable& table, int64_t group, int64_t first, int64_t n, T* out, int64_t row) {
  for (int64_t v = 0; v < n; ++v) read_entry(table, group, first + v, 0, table.columns, out + v * row);
}

// One row of a right factor: into panels of `width` columns that are `panel` elements apart, zeros up to whole panels.
template <class S, class T>
void pack_row(const T* row, int64_t columns, int64_t width, int64_t panel, S* out) {
  for (int64_t first = 0; first < columns; first += width, out += panel) {
    const int64_t count = smaller(width, columns - first);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<S>(row[first + i]);
    for (int64_t i = count; i < width; ++i) out[i] = S(0);
  }
}

// One row as column `index` of a right factor [depth, rows] in panels of `width` columns.
template <class T>
void pack_column(const T* row, int64_t depth, int64_t index, int64_t width, T* out) {
  out += index / width * width * depth + index % width;
  for (int64_t k = 0; k < depth; ++k) out[k * width] = row[k];
}

// Columns [count, padded(count)) of such a factor: zeros.
template <class T>
void pad_columns(int64_t depth, int64_t count, int64_t width, T* out) {
  for (int64_t i = count; i < padded<T>(count); ++i) {
    T* column = out + i / width * width * depth + i % width;
    for (int64_t k = 0; k < depth; ++k) column[k * width] = T(0);
  }
}

SOFTDIMO_ALWAYS_INLINE bool is_masked(const LinearSoftEmbedding& s, int64_t row) {
  return s.mask != nullptr && s.mask[row];
}

template <class T>
SOFTDIMO_ALWAYS_INLINE T row_temperature(const LinearSoftEmbedding& s, int64_t row) {
  return s.row_temperature != nullptr ? static_cast<const T*>(s.row_temperature)[row] : static_cast<T>(s.temperature);
}

SOFTDIMO_ALWAYS_INLINE bool unit_temperature(const LinearSoftEmbedding& s) {
  return s.row_temperature == nullptr && s.temperature == 1.0;
}

// exp(distance / t); distance <= 0.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> exp_scaled(Vec<T> distance, Vec<T> t, bool unit) {
  return exp_nonpositive(unit ? distance : distance / t);
}

SOFTDIMO_ALWAYS_INLINE bool same_for_all(const Rows& rows) {
  for (int i = 0; i < rows.dims; ++i) {
    if (rows.stride[i] != 0) return false;
  }
  return true;
}

// z[v, m] += bias of row (position(m), group), entry first + v.
template <class T, class Position>
void add_bias(const LinearSoftEmbedding& s, int64_t group, int64_t first, int64_t n, int64_t count, Position position,
              T* z, int64_t z_row) {
  if (s.bias.data == nullptr || count == 0) return;
  T bias[kSlice];
  if (same_for_all(s.bias.rows)) {
    read_row(s.bias, 0, first, n, bias);
    for (int64_t v = 0; v < n; ++v) {
      for (int64_t m = 0; m < padded<T>(count); ++m) z[v * z_row + m] += bias[v];
    }
    return;
  }
  for (int64_t m = 0; m < count; ++m) {
    read_row(s.bias, position(m) * s.groups + group, first, n, bias);
    for (int64_t v = 0; v < n; ++v) z[v * z_row + m] += bias[v];
  }
}

// Calls body(m, run) for the runs of consecutive positions: rows[m], rows[m] + 1, ..
template <class Body>
SOFTDIMO_ALWAYS_INLINE void for_runs(const int64_t* rows, int64_t count, Body body) {
  for (int64_t m = 0, end; m < count; m = end) {
    for (end = m + 1; end < count && rows[end] == rows[end - 1] + 1;) ++end;
    body(m, end - m);
  }
}

// Elements of S for a copy of `count` elements of T: none where it is the same type.
template <class S, class T>
constexpr int64_t copy_size(int64_t count) {
  return sizeof(S) == sizeof(T) ? 0 : count;
}

template <class S, class T>
const S* in_sums(const T* z, int64_t count, S* copy) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return z;
  } else {
    for (int64_t i = 0; i < count; ++i) copy[i] = static_cast<S>(z[i]);
    return copy;
  }
}

// ---------------------------------------------------------------------------------------------------
// bfloat16 products

// Entries [first, first + n) of a group as a left factor.
inline void pack_entries(const TokenTable& table, int64_t group, int64_t first, int64_t n, Bfloat16* out) {
  const int64_t at = group * table.stride[0] + first * table.stride[1];
  pack_left({table.data, table.type, at, table.stride[1], table.stride[2]}, n, table.columns, out,
            left_row(table.columns));
}

// Columns [column, column + columns) of such entries as a right factor.
inline void pack_entries_right(const TokenTable& table, int64_t group, int64_t first, int64_t n, int64_t column,
                               int64_t columns, Bfloat16* out) {
  const int64_t at = group * table.stride[0] + first * table.stride[1] + column * table.stride[2];
  pack_right({table.data, table.type, at, table.stride[1], table.stride[2]}, n, columns, 0,
             padded_depth(n) / kDepthStep, out);
}

// A row of bfloat16 as it is.
inline void copy_row(const RowMatrix& matrix, int64_t row, int64_t n, Bfloat16* out) {
  const Bfloat16* in = static_cast<const Bfloat16*>(matrix.data) + matrix.rows.offset(row);
  for (int64_t i = 0; i < n; ++i) out[i] = in[i * matrix.step];
}

// ---------------------------------------------------------------------------------------------------
// logits

// Logits [n, padded(count)] of entries [first, first + n). `columns` is the factor hidden^T of the rows, `table`
// scratch for a slice's entries of the weight.
template <bool Half, class T, class Position>
void compute_logits(const LinearSoftEmbedding& s, int64_t group, int64_t first, int64_t n, int64_t count,
                    Position position, const Element<T, Half>* columns, Element<T, Half>* table, T* z,
                    int64_t z_row) {
  const int64_t depth = s.weight.columns, row = depth + kPad, width = panel_width<T>(count);
  if constexpr (Half) {
    pack_entries(s.weight, group, first, n, table);
    gemm_bf16(n, padded_columns(count), depth, table, left_row(depth), columns, right_panel(depth), z, z_row, false);
  } else {
    copy_entries(s.weight, group, first, n, table, row);
    gemm<T>(n, padded<T>(count), depth, {table, row, 1}, columns, depth * width, width, z, z_row, false);
  }
  add_bias(s, group, first, n, count, position, z, z_row);
}

}  // namespace
}  // namespace softdimo::cpu::SOFTDIMO_ISA
