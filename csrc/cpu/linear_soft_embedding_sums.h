// Backward of linear_soft_embedding, second half: gradients of the linear head from a block's finished dlogits.
#pragma once

#include "linear_soft_embedding_backward.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// The factor hidden of one group: without the rows that are masked in it, which may hold anything.
template <class T>
const T* group_hidden(const LinearBackward& b, int64_t group, T* copy) {
  const LinearSoftEmbedding& s = b.call;
  const T* rows = static_cast<const T*>(b.hidden_rows);
  if (s.mask == nullptr || s.groups == 1) return rows;
  const int64_t width = panel_width<T>(s.weight.columns), panels = padded<T>(s.weight.columns) / width;
  for (int64_t i = 0; i < panels * b.count; ++i) {
    const bool masked = is_masked(s, b.position[i % b.count] * s.groups + group);
    for (int64_t j = i * width; j < (i + 1) * width; ++j) copy[j] = masked ? T(0) : rows[j];
  }
  return copy;
}

// dW[slice, H] += dlogits[slice, rows] hidden.
template <class T>
void weight_gradient_in_full(const LinearBackward& b, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t wide = padded<T>(s.weight.columns), width = panel_width<T>(s.weight.columns);
  const Scratch<T> copy(s.mask != nullptr && s.groups > 1 ? wide * b.count : 0);
  int64_t loaded = -1;
  const T* hidden = nullptr;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / s.slices(), first = task % s.slices() * s.slice;
    if (group != loaded) hidden = group_hidden(b, group, copy.get());
    loaded = group;
    T* sum = static_cast<T*>(b.dweight) + (group * s.vocabulary + first) * b.weight_row;
    for_chains(b, b.chain, [&](int64_t m, int64_t count, bool add) {
      gemm<T>(smaller(s.slice, s.vocabulary - first), wide, count, {dlogits_of<T>(b, group, first) + m, b.stride, 1},
              hidden + m * width, b.count * width, width, sum, b.weight_row, add);
    });
  }
}

// The same in bfloat16; and the slice's dlogits become the left factor of hidden's gradient, [rows, slice].
template <class T>
void weight_gradient_in_half(const LinearBackward& b, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = b.call;
  const Scratch<Bfloat16> packed(s.slice * left_row(b.product_rows)), turned(b.count * s.slice);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / s.slices(), first = task % s.slices() * s.slice;
    const int64_t n = smaller(s.slice, s.vocabulary - first);
    T* dlogits = dlogits_of<T>(b, group, first);
    if (b.dweight != nullptr) {
      half_products(b, static_cast<const Bfloat16*>(b.hidden_rows), s.weight.columns, dlogits, first, n, packed.get(),
                    static_cast<T*>(b.dweight) + group * s.vocabulary * b.weight_row);
    }
    if (b.dhidden == nullptr) continue;
    pack_left({dlogits, DType::float32, 0, 1, b.stride}, b.count, n, turned.get(), s.slice);
    std::memcpy(dlogits, turned.get(), static_cast<size_t>(b.count * s.slice) * sizeof(Bfloat16));
  }
}

template <class T>
void weight_gradient(const LinearBackward& b, int64_t begin, int64_t end) {
  if constexpr (kHasHalf<T>) {
    const ProductScope scope;
    if (b.call.half) return weight_gradient_in_half<T>(b, begin, end);
  }
  if (b.dweight != nullptr) weight_gradient_in_full<T>(b, begin, end);
}

// Columns [first, first + columns) of dh[rows, H] = dlogits^T W, into `sum`.
template <class T>
void hidden_product_half(const LinearBackward& b, int64_t first, int64_t columns, Bfloat16* table, T* sum,
                         int64_t sum_row) {
  const LinearSoftEmbedding& s = b.call;
  for (int64_t i = 0; i < s.groups * s.slices(); ++i) {
    const int64_t group = i / s.slices(), v = i % s.slices() * s.slice, n = smaller(s.slice, s.vocabulary - v);
    pack_entries_right(s.weight, group, v, n, first, columns, table);
    gemm_bf16(b.count, padded_columns(columns), n, reinterpret_cast<const Bfloat16*>(dlogits_of<T>(b, group, v)),
              s.slice, table, right_panel(n), sum, sum_row, i > 0);
  }
}

template <class T>
void hidden_product(const LinearBackward& b, int64_t first, int64_t columns, T* entries, T* table, T* sum,
                    int64_t sum_row) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t wide = padded<T>(columns), width = panel_width<T>(columns);
  for (int64_t i = 0; i < s.groups * s.slices(); ++i) {
    const int64_t group = i / s.slices(), first_entry = i % s.slices() * s.slice;
    const int64_t n = smaller(s.slice, s.vocabulary - first_entry);
    for (int64_t v = 0; v < n; ++v) {
      read_entry(s.weight, group, first_entry + v, first, columns, entries);
      pack_row(entries, columns, width, n * width, table + v * width);
    }
    gemm<T>(b.count, wide, n, {dlogits_of<T>(b, group, first_entry), 1, b.stride}, table, n * width, width, sum,
            sum_row, i > 0);
  }
}

template <class T, bool Half>
void hidden_gradient_in(const LinearBackward& b, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t last = smaller(end * kRowUnit, s.weight.columns), sum_row = kColumnBlock + kPad;
  const Scratch<T> entries(kColumnBlock), sum(b.count * sum_row);
  const Scratch<Element<T, Half>> table(padded_depth(s.slice) * kColumnBlock);
  for (int64_t first = begin * kRowUnit; first < last; first += kColumnBlock) {
    const int64_t columns = smaller(kColumnBlock, last - first);
    if constexpr (Half) {
      hidden_product_half(b, first, columns, table.get(), sum.get(), sum_row);
    } else {
      hidden_product(b, first, columns, entries.get(), table.get(), sum.get(), sum_row);
    }
    for (int64_t m = 0; m < b.count; ++m) {
      narrow(sum.get() + m * sum_row, columns, b.dhidden, s.hidden.type, b.position[m] * s.weight.columns + first);
    }
  }
}

template <class T>
void hidden_gradient(const LinearBackward& b, int64_t begin, int64_t end) {
  if constexpr (kHasHalf<T>) {
    const ProductScope scope;
    if (b.call.half) return hidden_gradient_in<T, true>(b, begin, end);
  }
  hidden_gradient_in<T, false>(b, begin, end);
}

// ---------------------------------------------------------------------------------------------------
// bias

// Row by row: the general case. Rows [begin, end) of the block, n entries from `first`.
template <class T>
void add_rows(const LinearBackward& b, int64_t group, int64_t begin, int64_t end, int64_t first, int64_t n) {
  T entries[kSlice];
  for (int64_t m = begin; m < end; ++m) {
    const int64_t row = b.position[m] * b.call.groups + group;
    if (is_masked(b.call, row)) continue;
    const T* dlogits = dlogits_of<T>(b, group, first) + m;
    for (int64_t v = 0; v < n; ++v) entries[v] = dlogits[v * b.stride];
    const int64_t at = b.bias_rows.offset(row) + first * b.bias_step;
    if (b.bias_direct) {
      narrow(entries, n, b.dbias, b.bias_type, at);
      continue;
    }
    double* sum = static_cast<double*>(b.dbias) + at;
    for (int64_t v = 0; v < n; ++v) sum[v * b.bias_step] += static_cast<double>(entries[v]);
  }
}

// A bias that all rows share.
template <class T>
double row_sum(const T* dlogits, int64_t n) {
  constexpr int64_t kParts = 16;
  double part[kParts] = {};
  const int64_t whole = n / kParts * kParts;
  for (int64_t i = 0; i < whole; i += kParts) {
    for (int64_t j = 0; j < kParts; ++j) part[j] += static_cast<double>(dlogits[i + j]);
  }
  for (int64_t i = whole; i < n; ++i) part[i - whole] += static_cast<double>(dlogits[i]);
  for (int64_t width = kParts / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) part[j] += part[j + width];
  }
  return part[0];
}

template <class T>
void bias_gradient(const LinearBackward& b, int64_t begin, int64_t end) {
  const bool shared = same_for_all(b.bias_rows) && b.bias_step == 1 && !b.bias_direct;
  for_chains(b, b.chain, [&](int64_t m, int64_t count, bool) {
    for (int64_t group = 0; group < b.call.groups; ++group) {
      for (int64_t v = begin; v < end && shared; ++v) {
        static_cast<double*>(b.dbias)[v] += row_sum(dlogits_of<T>(b, group, v) + m, count);
      }
      for (int64_t v = begin; v < end && !shared; v += kSlice) {
        add_rows<T>(b, group, m, m + count, v, smaller(kSlice, end - v));
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------
// results

template <class T>
void narrow_sums(const TableSums& sums, int64_t columns, void* out, DType type, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / sums.rows, v = i % sums.rows, row = sums.panels * sums.width;
    for (int64_t j = 0; j < sums.panels; ++j) {
      const int64_t at = group * sums.rows * row + (j * sums.rows + v) * sums.width, first = j * sums.width;
      const int64_t n = smaller(sums.width, columns - first), to = i * columns + first;
      if (sums.wide) {
        narrow(static_cast<const double*>(sums.data) + at, n, out, type, to);
      } else {
        narrow(static_cast<const T*>(sums.data) + at, n, out, type, to);
      }
    }
  }
}

template <class T>
void mask_gradient(const LinearSoftEmbedding& s, const RowMatrix& grad, double* sum, int64_t begin, int64_t end) {
  const int64_t width = s.codebook.columns, units = (width + kRowUnit - 1) / kRowUnit;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / units, first = task % units * kRowUnit, n = smaller(kRowUnit, width - first);
    T entries[kRowUnit];
    for (int64_t row = group; row < s.positions * s.groups; row += s.groups) {
      if (!is_masked(s, row)) continue;
      read_row(grad, row, first, n, entries);
      for (int64_t d = 0; d < n; ++d) sum[group * width + first + d] += static_cast<double>(entries[d]);
    }
  }
}

}  // namespace
}  // namespace softdimo::cpu::SOFTDIMO_ISA
