// Forward of linear_soft_embedding: a block of rows passes over the vocabulary in slices.
#pragma once

#include "linear_soft_embedding_rows.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// The scratch of one forward task.
template <class T, class S, bool Half>
struct ForwardScratch {
  int64_t* rows;  // [block rows]: positions that are not masked
  Element<T, Half>* columns;  // the right factor hidden^T
  Element<T, Half>* table;    // [slice, H]: a left factor
  Bfloat16* gathered;         // [kPanel, H]: rows of hidden on their way into columns
  T* entries;     // one row of hidden or the codebook
  T* z;           // [slice, padded rows + kPad]: logits, then p
  Element<S, Half>* p;         // z as a left factor, where that is another type
  Element<S, Half>* codebook;  // [slice, D]: a right factor
  S* c;           // [block rows, padded D + kPad]: sum of exp((z - top) / T) E
  T* state;       // [4, padded rows]: top, sum, temperature, factor
};

// Turns one vector of rows of a tile of logits into exp((z - top) / t) and merges it into the running top and sum.
// `factor` is what earlier terms shrink by.
template <class T>
SOFTDIMO_ALWAYS_INLINE void merge_rows(T* z, int64_t z_row, int64_t n, bool unit, T* top, T* sum, const T* temperature,
                                       T* factor) {
  const Vec<T> before = load(top), t = load(temperature);
  Vec<T> best = before;
  for (int64_t v = 0; v < n; ++v) {
    const Vec<T> next = load(z + v * z_row);
    best = next > best ? next : best;  // never a NaN: it stays in its row through the exponential
  }
  const Vec<T> none = splat(T(-HUGE_VAL));
  const Vec<T> fallen = best == before ? splat(T(1)) : exp_scaled<T>(before - best, t, unit);
  const Vec<T> shrink = before == none ? Vec<T>{} : fallen;
  const auto empty = best == none;  // nothing finite yet: no mass, but NaN stays NaN
  Vec<T> part[4] = {};              // small entries of a long row are not lost one by one beside a large one
  for (int64_t v = 0; v < n; ++v) {
    const Vec<T> y = load(z + v * z_row);
    const Vec<T> p = empty ? (y == none ? Vec<T>{} : y) : exp_scaled<T>(y - best, t, unit);
    part[v % 4] += p;
    store(z + v * z_row, p);
  }
  store(sum, load(sum) * shrink + ((part[0] + part[1]) + (part[2] + part[3])));
  store(factor, shrink);
  store(top, best);
}

template <class S>
void scale_row(S* c, int64_t width, S by) {
  const Vec<S> factor = splat(by);
  for (int64_t d = 0; d < width; d += kLanes<S>) store(c + d, load(c + d) * factor);
}

template <class T>
void keep_logits(const LinearForward& f, int64_t group, const int64_t* rows, int64_t count, int64_t first, int64_t n,
                 const T* z, int64_t z_row) {
  if (f.logits == nullptr) return;
  for (int64_t v = 0; v < n; ++v) {
    T* kept = static_cast<T*>(f.logits) + (group * f.call.vocabulary + first + v) * f.call.positions;
    for_runs(rows, count, [&](int64_t m, int64_t run) {
      std::memcpy(kept + rows[m], z + v * z_row + m, static_cast<size_t>(run) * sizeof(T));
    });
  }
}

template <class T, class S, bool Half>
void load_columns(const LinearSoftEmbedding& s, int64_t count, const ForwardScratch<T, S, Half>& scratch) {
  const int64_t depth = s.weight.columns;
  if constexpr (Half) {
    for (int64_t m = 0; m < count; m += kPanel) {
      const int64_t some = smaller(kPanel, count - m);
      for (int64_t i = 0; i < some; ++i) copy_row(s.hidden, scratch.rows[m + i], depth, scratch.gathered + i * depth);
      pack_right({scratch.gathered, DType::bfloat16, 0, 1, depth}, depth, some, 0, padded_depth(depth) / kDepthStep,
                 scratch.columns + m / kPanel * right_panel(depth));
    }
  } else {
    const int64_t width = panel_width<T>(count);
    for (int64_t m = 0; m < count; ++m) {
      read_row(s.hidden, scratch.rows[m], 0, depth, scratch.entries);
      pack_column(scratch.entries, depth, m, width, scratch.columns);
    }
    pad_columns(depth, count, width, scratch.columns);
  }
}

// Reads the block's rows: hidden^T, and the state before the first slice.
template <class T, class S, bool Half>
int64_t load_block(const LinearSoftEmbedding& s, int64_t group, int64_t begin, int64_t end,
                   const ForwardScratch<T, S, Half>& scratch, int64_t stride) {
  int64_t count = 0;
  for (int64_t n = begin; n < end; ++n) {
    if (!is_masked(s, n * s.groups + group)) scratch.rows[count++] = n;
  }
  load_columns(s, count, scratch);
  for (int64_t m = 0; m < padded<T>(count); ++m) {
    scratch.state[m] = -HUGE_VAL;
    scratch.state[stride + m] = T(0);
    scratch.state[2 * stride + m] = m < count ? row_temperature<T>(s, scratch.rows[m] * s.groups + group) : T(1);
  }
  return count;
}

template <class T, class S, bool Half>
void write_rows(const LinearForward& f, int64_t group, int64_t count, const ForwardScratch<T, S, Half>& scratch,
                int64_t stride, int64_t c_row) {
  const LinearSoftEmbedding& s = f.call;
  const int64_t width = s.codebook.columns;
  for (int64_t m = 0; m < count; ++m) {
    const int64_t row = scratch.rows[m] * s.groups + group;
    const T sum = scratch.state[stride + m];
    const S* c = scratch.c + m * c_row;
    for (int64_t d = 0; d < width; ++d) scratch.entries[d] = static_cast<T>(c[d] / sum);
    narrow(scratch.entries, width, f.output, s.codebook.type, row * width);
    if (f.row_max == nullptr) continue;
    static_cast<T*>(f.row_max)[row] = scratch.state[m];
    static_cast<T*>(f.row_sum)[row] = sum;
    for (int64_t d = 0; f.soft != nullptr && d < width; ++d) {
      static_cast<T*>(f.soft)[row * width + d] = scratch.entries[d];
    }
  }
}

template <class T>
void write_mask_row(const LinearForward& f, int64_t row) {
  const LinearSoftEmbedding& s = f.call;
  const int64_t width = s.codebook.columns, group = row % s.groups;
  narrow(static_cast<const T*>(s.mask_embedding) + group * width, width, f.output, s.codebook.type, row * width);
  if (f.row_max != nullptr) {
    static_cast<T*>(f.row_max)[row] = T(0);
    static_cast<T*>(f.row_sum)[row] = T(1);
  }
  for (int64_t d = 0; f.soft != nullptr && d < width; ++d) static_cast<T*>(f.soft)[row * width + d] = T(0);
  for (int64_t v = 0; f.logits != nullptr && v < s.vocabulary; ++v) {
    static_cast<T*>(f.logits)[(group * s.vocabulary + v) * s.positions + row / s.groups] = T(0);
  }
}

// C[rows, D] (+)= p^T E[slice].
template <class T, class S, bool Half>
void add_entries(const LinearSoftEmbedding& s, int64_t group, int64_t first, int64_t n, int64_t count, int64_t z_row,
                 const ForwardScratch<T, S, Half>& scratch, int64_t c_row) {
  const int64_t columns = s.codebook.columns;
  if constexpr (Half) {
    pack_left({scratch.z, DType::float32, 0, 1, z_row}, count, n, scratch.p, left_row(s.slice));
    pack_entries_right(s.codebook, group, first, n, 0, columns, scratch.codebook);
    gemm_bf16(count, padded_columns(columns), n, scratch.p, left_row(s.slice), scratch.codebook, right_panel(n),
              scratch.c, c_row, first > 0);
  } else {
    const int64_t width = panel_width<S>(columns);
    for (int64_t i = 0; i < n; ++i) {
      read_entry(s.codebook, group, first + i, 0, columns, scratch.entries);
      pack_row(scratch.entries, columns, width, n * width, scratch.codebook + i * width);
    }
    const S* p = in_sums(scratch.z, n * z_row, scratch.p);
    gemm<S>(count, padded<S>(columns), n, {p, 1, z_row}, scratch.codebook, n * width, width, scratch.c, c_row,
            first > 0);
  }
}

template <class T, class S, bool Half>
void forward_block(const LinearForward& f, int64_t group, int64_t begin, int64_t end,
                   const ForwardScratch<T, S, Half>& scratch) {
  const LinearSoftEmbedding& s = f.call;
  const int64_t stride = padded<T>(f.block_rows), z_row = stride + kPad;
  const int64_t wide = padded<S>(s.codebook.columns), c_row = wide + kPad;
  const int64_t count = load_block(s, group, begin, end, scratch, stride);
  T *top = scratch.state, *sum = top + stride, *temperature = sum + stride, *factor = temperature + stride;
  for (int64_t v = 0; v < s.vocabulary && count > 0; v += s.slice) {
    const int64_t n = smaller(s.slice, s.vocabulary - v);
    compute_logits<Half>(s, group, v, n, count, [&](int64_t m) { return scratch.rows[m]; }, scratch.columns,
                         scratch.table, scratch.z, z_row);
    keep_logits(f, group, scratch.rows, count, v, n, scratch.z, z_row);
    for (int64_t m = 0; m < padded<T>(count); m += kLanes<T>) {
      merge_rows(scratch.z + m, z_row, n, unit_temperature(s), top + m, sum + m, temperature + m, factor + m);
    }
    for (int64_t m = 0; m < count && v > 0; ++m) {
      if (factor[m] != T(1)) scale_row(scratch.c + m * c_row, wide, static_cast<S>(factor[m]));
    }
    add_entries(s, group, v, n, count, z_row, scratch, c_row);
  }
  write_rows(f, group, count, scratch, stride, c_row);
  for (int64_t n = begin; n < end && count < end - begin; ++n) {
    if (is_masked(s, n * s.groups + group)) write_mask_row<T>(f, n * s.groups + group);
  }
}

template <class T, class S, bool Half>
void forward_tasks(const LinearForward& f, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = f.call;
  const int64_t blocks = (s.positions + f.block_rows - 1) / f.block_rows, depth = s.weight.columns;
  const int64_t width = s.codebook.columns, stride = padded<T>(f.block_rows), z_size = s.slice * (stride + kPad);
  const Scratch<int64_t> rows(f.block_rows);
  const Scratch<Element<T, Half>> columns(Half ? right_size(depth, f.block_rows) : stride * depth);
  const Scratch<Element<T, Half>> table(s.slice * (Half ? left_row(depth) : depth + kPad));
  const Scratch<T> z(z_size), state(4 * stride), entries(depth > width ? depth : width);
  const Scratch<Bfloat16> gathered(Half ? kPanel * depth : 0);
  const Scratch<Element<S, Half>> p(Half ? f.block_rows * left_row(s.slice) : copy_size<S, T>(z_size));
  const Scratch<Element<S, Half>> codebook(Half ? right_size(s.slice, width) : s.slice * padded<S>(width));
  const Scratch<S> c(f.block_rows * (padded<S>(width) + kPad));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * f.block_rows;
    forward_block<T, S, Half>(f, task / blocks, first, smaller(first + f.block_rows, s.positions),
                              {rows.get(), columns.get(), table.get(), gathered.get(), entries.get(), z.get(), p.get(),
                               codebook.get(), c.get(), state.get()});
  }
}

template <class T>
void forward(const LinearForward& f, int64_t begin, int64_t end) {
  if constexpr (kHasHalf<T>) {
    const ProductScope scope;
    if (f.call.half) return forward_tasks<T, T, true>(f, begin, end);
  }
  sums_in_double(f.call) ? forward_tasks<T, double, false>(f, begin, end) : forward_tasks<T, T, false>(f, begin, end);
}

}  // namespace
}  // namespace softdimo::cpu::SOFTDIMO_ISA
