// Backward of linear_soft_embedding: a block of rows at a time, whose dlogits [G, V, rows] all threads share.
#pragma once

#include "linear_soft_embedding_rows.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// The row state of one group: arrays over the block's rows.
template <class T>
struct RowState {
  T *top, *scale, *delta, *temperature;
};

template <class T>
RowState<T> row_state(const LinearBackward& b, int64_t group) {
  T* first = static_cast<T*>(b.row_state) + group * b.stride;
  const int64_t field = b.call.groups * b.stride;
  return {first, first + field, first + 2 * field, first + 3 * field};
}

template <class T>
T* slice_field(const LinearBackward& b, int64_t slice, SliceField field, int64_t group) {
  const int64_t index = slice * b.slice_fields + static_cast<int64_t>(field);
  return static_cast<T*>(b.partials) + (index * b.call.groups + group) * b.stride;
}

template <class T>
T* dlogits_of(const LinearBackward& b, int64_t group, int64_t v) {
  return static_cast<T*>(b.dlogits) + (group * b.dlogits_rows + v) * b.stride;
}

// ---------------------------------------------------------------------------------------------------
// rows into factors

// One group of one row: its gradient, and what forward saved. A masked group of it has mass and gradient zero.
template <class T>
void load_state(const LinearBackward& b, int64_t m, int64_t group, T* entries) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t width = s.codebook.columns, row = b.position[m] * s.groups + group;
  const RowState<T> state = row_state<T>(b, group);
  const bool masked = is_masked(s, row);
  if (masked) {
    for (int64_t d = 0; d < width; ++d) entries[d] = T(0);
  } else {
    read_row(b.grad, row, 0, width, entries);
  }
  state.top[m] = masked ? T(0) : static_cast<const T*>(b.row_max)[row];
  state.scale[m] = masked ? T(0) : T(1) / static_cast<const T*>(b.row_sum)[row];
  state.delta[m] = masked ? T(0) : static_cast<T>(dot(entries, static_cast<const T*>(b.soft) + row * width, width));
  state.temperature[m] = masked ? T(1) : row_temperature<T>(s, row);
}

template <class T, class S>
void load_group(const LinearBackward& b, int64_t m, int64_t group, T* entries) {
  const int64_t width = b.call.codebook.columns;
  load_state(b, m, group, entries);
  T* columns = static_cast<T*>(b.grad_columns) + group * padded<T>(b.count) * width;
  pack_column(entries, width, m, panel_width<T>(b.count), columns);
  const int64_t panel = panel_width<S>(width);
  S* rows = static_cast<S*>(b.grad_rows) + group * padded<S>(width) * b.count;
  pack_row(entries, width, panel, b.count * panel, rows + m * panel);
}

// The state of rows that only fill a vector.
template <class T>
void pad_state(const LinearBackward& b) {
  for (int64_t group = 0; group < b.call.groups; ++group) {
    const RowState<T> state = row_state<T>(b, group);
    for (int64_t m = b.count; m < padded<T>(b.count); ++m) {
      state.top[m] = state.scale[m] = state.delta[m] = T(0);
      state.temperature[m] = T(1);
    }
  }
}

template <class T, class S>
void load_rows_in(const LinearBackward& b, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t depth = s.weight.columns, width = s.codebook.columns, panel = panel_width<T>(depth);
  const Scratch<T> entries(depth > width ? depth : width);
  T *columns = static_cast<T*>(b.hidden_columns), *rows = static_cast<T*>(b.hidden_rows);
  const int64_t last = smaller(end * kRowUnit, b.count);
  for (int64_t m = begin * kRowUnit; m < last; ++m) {
    read_row(s.hidden, b.position[m], 0, depth, entries.get());
    pack_column(entries.get(), depth, m, panel_width<T>(b.count), columns);
    pack_row(entries.get(), depth, panel, b.count * panel, rows + m * panel);
    for (int64_t group = 0; group < s.groups; ++group) load_group<T, S>(b, m, group, entries.get());
  }
  if (last < b.count) return;
  pad_columns(depth, b.count, panel_width<T>(b.count), columns);
  for (int64_t group = 0; group < s.groups; ++group) {
    T* grads = static_cast<T*>(b.grad_columns) + group * padded<T>(b.count) * width;
    pad_columns(width, b.count, panel_width<T>(b.count), grads);
  }
  pad_state<T>(b);
}

// 32 rows [rows, depth] of bfloat16 from row m of the block into both right factors: a panel of `columns`, and one step
// of their product's `rows`.
inline void pack_half(const LinearBackward& b, const Bfloat16* gathered, int64_t depth, int64_t m, Bfloat16* columns,
                      Bfloat16* rows) {
  const int64_t some = smaller(kPanel, b.count - m), steps = padded_depth(depth) / kDepthStep;
  columns += m / kPanel * right_panel(depth);
  pack_right({gathered, DType::bfloat16, 0, 1, depth}, depth, some, 0, steps, columns);
  const int64_t most = b.product_rows, within = m % most, length = smaller(most, b.count - (m - within));
  const int64_t step = within / kDepthStep;
  pack_right({gathered, DType::bfloat16, -within * depth, depth, 1}, length, depth, step, step + 1,
             rows + m / most * right_size(most, depth));
}

template <class T>
void load_rows_half(const LinearBackward& b, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t depth = s.weight.columns, width = s.codebook.columns;
  const int64_t products = (b.count + b.product_rows - 1) / b.product_rows;
  const Scratch<Bfloat16> gathered(kPanel * (depth > width ? depth : width));
  const Scratch<T> entries(width);
  Bfloat16 *columns = static_cast<Bfloat16*>(b.grad_columns), *rows = static_cast<Bfloat16*>(b.grad_rows);
  for (int64_t first = begin * kPanel; first < end * kPanel; first += kPanel) {
    const int64_t some = smaller(kPanel, b.count - first);
    for (int64_t i = 0; i < some; ++i) copy_row(s.hidden, b.position[first + i], depth, gathered.get() + i * depth);
    pack_half(b, gathered.get(), depth, first, static_cast<Bfloat16*>(b.hidden_columns),
              static_cast<Bfloat16*>(b.hidden_rows));
    for (int64_t group = 0; group < s.groups; ++group) {
      for (int64_t i = 0; i < some; ++i) {
        load_state(b, first + i, group, entries.get());
        copy_row(b.grad, b.position[first + i] * s.groups + group, width, gathered.get() + i * width);
      }
      pack_half(b, gathered.get(), width, first, columns + group * right_size(width, b.count),
                rows + group * products * right_size(b.product_rows, width));
    }
  }
  if (end * kPanel >= b.count) pad_state<T>(b);
}

template <class T>
void load_rows(const LinearBackward& b, int64_t begin, int64_t end) {
  if constexpr (kHasHalf<T>) {
    if (b.call.half) return load_rows_half<T>(b, begin, end);
  }
  sums_in_double(b.call) ? load_rows_in<T, double>(b, begin, end) : load_rows_in<T, T>(b, begin, end);
}

// ---------------------------------------------------------------------------------------------------
// one slice of the vocabulary

// One task's place, and its scratch.
template <class T, class S, bool Half>
struct Slice {
  int64_t group, index, first, count;  // entries [first, first + count)
  Element<T, Half>* table;             // [slice, max(H, D)]: a left factor
  T* p;                                // [slice, stride]: logits, then p
  T* distance;                         // [slice, stride]: z - max, for the temperature's gradient
  Element<S, Half>* p_copy;            // p as a left factor, where that is another type
};

template <class T, class S, bool Half>
void read_logits(const LinearBackward& b, const Slice<T, S, Half>& slice) {
  const LinearSoftEmbedding& s = b.call;
  const size_t rest = static_cast<size_t>(padded<T>(b.count) - b.count) * sizeof(T);
  for (int64_t v = 0; v < slice.count; ++v) {
    const T* kept = static_cast<const T*>(b.logits) + (slice.group * s.vocabulary + slice.first + v) * s.positions;
    T* z = slice.p + v * b.stride;
    for_runs(b.position, b.count, [&](int64_t m, int64_t run) {
      std::memcpy(z + m, kept + b.position[m], static_cast<size_t>(run) * sizeof(T));
    });
    std::memset(z + b.count, 0, rest);
  }
}

// p and dlogits of one vector of rows, from logits and dp (overwritten by dlogits).
template <class T, class S, bool Half>
SOFTDIMO_ALWAYS_INLINE void rows_gradient(const LinearBackward& b, const Slice<T, S, Half>& slice,
                                          const RowState<T>& state, int64_t m) {
  const Vec<T> top = load(state.top + m), scale = load(state.scale + m), delta = load(state.delta + m);
  const Vec<T> t = load(state.temperature + m);
  const bool unit = unit_temperature(b.call), slope = b.dtemperature != nullptr, wanted = b.wants_dlogits();
  T* dlogits = dlogits_of<T>(b, slice.group, slice.first) + m;
  const auto masked = scale == T(0);
  Vec<T> others{}, dominant{};
  for (int64_t v = 0; v < slice.count; ++v) {
    T* at = slice.p + v * b.stride + m;
    const Vec<T> below = load(at) - top;
    const Vec<T> p = masked ? Vec<T>{} : exp_scaled<T>(below, t, unit) * scale;
    store(at, p);
    if (!wanted) continue;
    Vec<T> dz = p * (load(dlogits + v * b.stride) - delta);
    dz = unit ? dz : dz / t;
    dz = masked ? Vec<T>{} : dz;
    store(dlogits + v * b.stride, dz);
    others += p > T(0.5) ? Vec<T>{} : dz;
    dominant = p > dominant ? p : dominant;
    if (slope) store(slice.distance + v * b.stride + m, below);
  }
  if (!wanted) return;
  store(slice_field<T>(b, slice.index, SliceField::others, slice.group) + m, others);
  int64_t* peaks = b.peaks + (slice.index * b.call.groups + slice.group) * b.stride + m;
  for (int i = 0; i < kLanes<T>; ++i) {
    peaks[i] = -1;
    for (int64_t v = 0; dominant[i] > T(0.5) && v < slice.count; ++v) {
      if (slice.p[v * b.stride + m + i] > T(0.5)) peaks[i] = slice.first + v;
    }
  }
}

// The slope of one vector of rows about the slice's mean distance: about the maximum, terms several times as large
// would cancel, and an error that all of (dp - delta) share would stay.
template <class T, class S, bool Half>
SOFTDIMO_ALWAYS_INLINE void rows_slope(const LinearBackward& b, const Slice<T, S, Half>& slice, int64_t m) {
  const auto field = [&](SliceField which) { return slice_field<T>(b, slice.index, which, slice.group) + m; };
  const T* dlogits = dlogits_of<T>(b, slice.group, slice.first) + m;
  Vec<T> mass{}, moment{}, slope{}, residual{};
  for (int64_t v = 0; v < slice.count; ++v) {
    const Vec<T> p = load(slice.p + v * b.stride + m);
    mass += p;
    moment += p == T(0) ? Vec<T>{} : p * load(slice.distance + v * b.stride + m);  // without mass it may be infinite
  }
  const Vec<T> centre = mass > T(0) ? moment / mass : Vec<T>{};
  for (int64_t v = 0; v < slice.count; ++v) {
    const Vec<T> dz = load(dlogits + v * b.stride), p = load(slice.p + v * b.stride + m);
    residual += dz;
    slope += p == T(0) ? Vec<T>{} : dz * (load(slice.distance + v * b.stride + m) - centre);
  }
  store(field(SliceField::mass), mass);
  store(field(SliceField::centre), centre);
  store(field(SliceField::slope), slope);
  store(field(SliceField::residual), residual);
}

// Calls body(first, count, add) for the block's rows, `most` at a time; `add` says whether the sum holds something yet.
template <class Body>
void for_chains(const LinearBackward& b, int64_t most, Body body) {
  for (int64_t m = 0; m < b.count; m += most) body(m, smaller(most, b.count - m), m > 0 || !b.first);
}

// sum[entries first .., columns] += left[n, rows] right, in bfloat16, a panel of columns after the other, each of which
// streams through memory. `rows` holds the right factors of the block's products.
template <class T>
void half_products(const LinearBackward& b, const Bfloat16* rows, int64_t columns, const T* left, int64_t first,
                   int64_t n, Bfloat16* packed, T* sum) {
  const int64_t most = b.product_rows, vocabulary = b.call.vocabulary, panels = (columns + kPanel - 1) / kPanel;
  for_chains(b, most, [&](int64_t m, int64_t count, bool add) {
    const Bfloat16* right = rows + m / most * right_size(most, columns);
    pack_left({left, DType::float32, m, b.stride, 1}, n, count, packed, left_row(most));
    for (int64_t i = 0; i < panels; ++i) {
      gemm_bf16(n, smaller(padded_columns(columns) - i * kPanel, kPanel), count, packed, left_row(most),
                right + i * right_panel(count), right_panel(count), sum + (i * vocabulary + first) * kPanel, kPanel,
                add);
    }
  });
}

// dE[slice, D] += p[slice, rows] G.
template <class T, class S, bool Half>
void codebook_gradient(const LinearBackward& b, const Slice<T, S, Half>& slice) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t columns = s.codebook.columns, wide = padded<S>(columns), width = panel_width<S>(columns);
  S* sum = static_cast<S*>(b.dcodebook) + slice.group * s.vocabulary * b.codebook_row;
  if constexpr (Half) {
    const int64_t products = (b.count + b.product_rows - 1) / b.product_rows;
    const Bfloat16* rows = static_cast<const Bfloat16*>(b.grad_rows);
    rows += slice.group * products * right_size(b.product_rows, columns);
    half_products(b, rows, columns, slice.p, slice.first, slice.count, slice.p_copy, sum);
  } else {
    sum += slice.first * b.codebook_row;
    const S* p = in_sums(slice.p, slice.count * b.stride, slice.p_copy);
    const S* rows = static_cast<const S*>(b.grad_rows) + slice.group * wide * b.count;
    for_chains(b, b.chain, [&](int64_t m, int64_t count, bool add) {
      gemm<S>(slice.count, wide, count, {p + m, b.stride, 1}, rows + m * width, b.count * width, width, sum,
              b.codebook_row, add);
    });
  }
}

// dp[slice, rows] = E[slice] G^T, into the place of dlogits.
template <class T, class S, bool Half>
void codebook_product(const LinearBackward& b, const Slice<T, S, Half>& slice) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t wide = padded<T>(b.count), width = panel_width<T>(b.count), depth = s.codebook.columns;
  T* dp = dlogits_of<T>(b, slice.group, slice.first);
  if constexpr (Half) {
    const Bfloat16* grads = static_cast<const Bfloat16*>(b.grad_columns) + slice.group * right_size(depth, b.count);
    pack_entries(s.codebook, slice.group, slice.first, slice.count, slice.table);
    gemm_bf16(slice.count, padded_columns(b.count), depth, slice.table, left_row(depth), grads, right_panel(depth), dp,
              b.stride, false);
  } else {
    const T* grads = static_cast<const T*>(b.grad_columns) + slice.group * wide * depth;
    copy_entries(s.codebook, slice.group, slice.first, slice.count, slice.table, depth + kPad);
    gemm<T>(slice.count, wide, depth, {slice.table, depth + kPad, 1}, grads, depth * width, width, dp, b.stride, false);
  }
}

template <class T, class S, bool Half>
void slice_task(const LinearBackward& b, const Slice<T, S, Half>& slice) {
  if (b.logits != nullptr) {
    read_logits(b, slice);
  } else {
    compute_logits<Half>(b.call, slice.group, slice.first, slice.count, b.count,
                         [&](int64_t m) { return b.position[m]; },
                         static_cast<const Element<T, Half>*>(b.hidden_columns), slice.table, slice.p, b.stride);
  }
  if (b.wants_dlogits()) codebook_product(b, slice);
  const RowState<T> state = row_state<T>(b, slice.group);
  for (int64_t m = 0; m < padded<T>(b.count); m += kLanes<T>) {
    rows_gradient(b, slice, state, m);
    if (b.dtemperature != nullptr) rows_slope(b, slice, m);
  }
  if (b.dcodebook != nullptr) codebook_gradient(b, slice);
}

template <class T, class S, bool Half>
void slices_in(const LinearBackward& b, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t tile = s.slice * b.stride;
  const int64_t depth = s.weight.columns > s.codebook.columns ? s.weight.columns : s.codebook.columns;
  const Scratch<Element<T, Half>> table(s.slice * (Half ? left_row(depth) : depth + kPad));
  const Scratch<T> p(tile), distance(b.dtemperature != nullptr ? tile : 0);
  const Scratch<Element<S, Half>> p_copy(Half ? s.slice * left_row(b.product_rows) : copy_size<S, T>(tile));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % s.slices(), first = index * s.slice, count = smaller(s.slice, s.vocabulary - first);
    slice_task<T, S, Half>(
        b, {task / s.slices(), index, first, count, table.get(), p.get(), distance.get(), p_copy.get()});
  }
}

template <class T>
void slices(const LinearBackward& b, int64_t begin, int64_t end) {
  if constexpr (kHasHalf<T>) {
    const ProductScope scope;
    if (b.call.half) return slices_in<T, T, true>(b, begin, end);
  }
  sums_in_double(b.call) ? slices_in<T, double, false>(b, begin, end) : slices_in<T, T, false>(b, begin, end);
}

// ---------------------------------------------------------------------------------------------------
// whole rows

// The row's slope, sum of dlogits (z - mean z), from slices that took it about their own means.
template <class T>
double merged_slope(const LinearBackward& b, int64_t group, int64_t m) {
  const int64_t slices = b.call.slices();
  const auto field = [&](int64_t i, SliceField which) {
    return static_cast<double>(slice_field<T>(b, i, which, group)[m]);
  };
  double mass = 0, moment = 0, slope = 0;
  for (int64_t i = 0; i < slices; ++i) {
    mass += field(i, SliceField::mass);
    moment += field(i, SliceField::mass) * field(i, SliceField::centre);
  }
  for (int64_t i = 0; i < slices; ++i) {
    slope += field(i, SliceField::slope) +
             (field(i, SliceField::centre) - moment / mass) * field(i, SliceField::residual);
  }
  return slope;
}

// Merges the slices of each row in index order: the dominant entry's gradient and the temperature's.
template <class T>
void finish_rows(const LinearBackward& b, int64_t begin, int64_t end) {
  const LinearSoftEmbedding& s = b.call;
  const int64_t slices = s.slices();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / b.count, m = task % b.count, row = b.position[m] * s.groups + group;
    if (is_masked(s, row)) continue;
    double others = 0;
    int64_t peak = -1;
    for (int64_t i = 0; i < slices; ++i) {
      const int64_t found = b.peaks[(i * s.groups + group) * b.stride + m];
      others += slice_field<T>(b, i, SliceField::others, group)[m];
      peak = found >= 0 ? found : peak;
    }
    if (peak >= 0) dlogits_of<T>(b, group, peak)[m] = static_cast<T>(-others);
    if (b.dtemperature == nullptr) continue;
    static_cast<T*>(b.dtemperature)[row] = static_cast<T>(-merged_slope<T>(b, group, m) / row_temperature<T>(s, row));
  }
}

}  // namespace
}  // namespace softdimo::cpu::SOFTDIMO_ISA
