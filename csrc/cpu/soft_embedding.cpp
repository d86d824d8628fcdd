// soft_embedding on CPUs, forward and backward; compiled once per instruction set.
//
//   forward   e[n] = sum_v p[n, v] E[v],  p = softmax(y / T)
//   backward  dp[n, v] = g[n] . E[v];  dlogits = p (dp - g . e) / T;  dE[v] = sum_n p[n, v] g[n]
//
// With R rows, V entries, D columns and s bytes per logit:
//   forward   s R V bytes read, 2 R V D FLOP, R V exponentials
//   backward  2 s R V bytes,    4 R V D FLOP (2 without a codebook gradient), R V exponentials
//   floor     max(bytes / copy rate, FLOP / multiply-add rate + exponentials / exp rate)
//
// Forward, one task = a block of rows: the vocabulary passes in chunks of kVocabularyChunk,
//
//     logits [rows, chunk] -> y -> p~ = exp((y - running max) / T) -> C [rows, D] += p~ E[chunk]
//
// and C is rescaled when a chunk raises a row's maximum. No probability leaves the cache.
//
// Backward, one task = a slice of the vocabulary x a part of the rows, so that a codebook gradient has one owner
// and no sum depends on the number of threads:
//
//     dp [rows, slice] = G E^T;  p, dlogits from logits, max, sum, delta;  dE [slice, D] += p^T G
//
// Three rules keep nearly one-hot rows exact: max and sum are saved apart; delta = g . e uses the wide e; the entry
// with p > 1/2 gets minus the sum of the other gradients, written by finish_rows. Sums that may cancel: the slope
// along the temperature is taken about the mean of y; products with a narrow codebook, parts of a codebook gradient
// and masked rows are summed in double; y with noise is a sum of two.

#include "softdimo/soft_embedding.h"

#include <cmath>

#include "gemm.h"
#include "scratch.h"
#include "simd.h"
#include "softdimo/philox.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------
// reading rows

// One vector of y plus its noise.
SOFTDIMO_ALWAYS_INLINE void add_noise(Vec<float> uniform, float* y, float* low) {
  const FloatPair sum = sum_pair(load(y), gumbel(uniform));
  store(y, sum.high);
  store(low, sum.low);
}
SOFTDIMO_ALWAYS_INLINE void add_noise(Vec<double> uniform, double* y, double* low) {
  store(y, load(y) + gumbel(uniform));
  store(low, Vec<double>{});
}

// y + g as a sum of two: one float32 cannot hold the noise beside large logits, and near ties decide the gradients of
// nearly one-hot rows. float64 needs no low part: it is zero.
template <class T>
void add_gumbel(const SoftEmbedding& s, int64_t row, int64_t first, int64_t count, T* y, T* low) {
  const uint64_t id = static_cast<uint64_t>(s.row_ids != nullptr ? s.row_ids[row] : row);
  alignas(64) T uniform[kVocabularyChunk];
  for (int64_t v = 0; v < count; v += 4) {
    const Words words = philox4x32(s.seed, id, static_cast<uint32_t>((first + v) / 4), s.offset);
    for (int i = 0; i < 4; ++i) uniform[v + i] = static_cast<T>(open_uniform(words.word[i]));
  }
  for (int64_t v = (count + 3) / 4 * 4; v < padded<T>(count); ++v) uniform[v] = T(0.5);
  for (int64_t v = 0; v < padded<T>(count); v += kLanes<T>) add_noise(load(uniform + v), y + v, low + v);
}

// Entries [first, first + count) of a row, noise added (`low` is written only then), then -inf up to
// padded(count). count <= kVocabularyChunk, first a multiple of it.
template <class T>
void read_row(const SoftEmbedding& s, int64_t row, int64_t first, int64_t count, T* y, T* low) {
  widen(s.logits, s.logits_type, s.logits_rows.offset(row) + first, count, y);
  for (int64_t v = count; v < padded<T>(count); ++v) y[v] = -HUGE_VAL;
  if (s.noise) add_gumbel(s, row, first, count, y, low);
}

// A row's maximum: the sum of two, like the entries.
template <class T>
struct Top {
  T high, low;
};

// With noise turns y into the distances to the top, exact where they are small; returns the top still to subtract.
template <class T>
T subtract_top(const SoftEmbedding& s, Top<T> top, int64_t count, const T* low, T* y) {
  if (!s.noise) return top.high;
  for (int64_t v = 0; v < padded<T>(count); v += kLanes<T>) {
    store(y + v, (load(y + v) - top.high) + (load(low + v) - top.low));
  }
  return T(0);
}

template <class T>
T row_temperature(const SoftEmbedding& s, int64_t row) {
  return s.row_temperature != nullptr ? static_cast<const T*>(s.row_temperature)[row] : static_cast<T>(s.temperature);
}

// exp(distance / t); distance <= 0.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> exp_scaled(Vec<T> distance, T t) {
  return exp_nonpositive(t == T(1) ? distance : distance / t);
}

bool is_masked(const SoftEmbedding& s, int64_t row) { return s.mask != nullptr && s.mask[row]; }

// Collects the rows of positions [begin, end) in one group that are not masked.
int64_t soft_rows(const SoftEmbedding& s, int64_t group, int64_t begin, int64_t end, int64_t* rows) {
  int64_t count = 0;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n * s.groups + group;
    if (!is_masked(s, row)) rows[count++] = row;
  }
  return count;
}

// ---------------------------------------------------------------------------------------------------
// the codebook, packed: [G, panels, V, panel width] with zeros beyond D

template <class T>
int64_t packed_size(int64_t groups, int64_t vocabulary, int64_t width) {
  return groups * vocabulary * padded<T>(width);
}

template <class T>
void pack_codebook(const SoftEmbedding& s, void* packed, int64_t begin, int64_t end) {
  const int64_t wide = padded<T>(s.width), columns = panel_width<T>(s.width);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / s.vocabulary, v = i % s.vocabulary;
    const int64_t source = group * s.codebook_stride[0] + v * s.codebook_stride[1];
    for (int64_t d0 = 0; d0 < wide; d0 += columns) {
      T* out = static_cast<T*>(packed) + (group * wide + d0) * s.vocabulary + v * columns;
      const int64_t count = smaller(columns, s.width - d0);
      if (s.codebook_stride[2] == 1) {
        widen(s.codebook, s.codebook_type, source + d0, count, out);
      } else {
        for (int64_t d = 0; d < count; ++d) {
          widen(s.codebook, s.codebook_type, source + (d0 + d) * s.codebook_stride[2], 1, out + d);
        }
      }
      for (int64_t d = count; d < columns; ++d) out[d] = T(0);
    }
  }
}

template <class T>
const T* group_codebook(const SoftEmbedding& s, int64_t group) {
  return static_cast<const T*>(s.packed_codebook) + group * padded<T>(s.width) * s.vocabulary;
}

// ---------------------------------------------------------------------------------------------------
// sums in S: double where the codebook is narrow (sums_in_double), else T

// A matrix in S: itself, or a copy with the same stride between rows.
template <class S, class T>
SOFTDIMO_ALWAYS_INLINE const S* in_type(const T* source, int64_t rows, int64_t columns, int64_t row, S* copy) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return source;
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) copy[i * row + j] = static_cast<S>(source[i * row + j]);
    }
    return copy;
  }
}

// Elements of the copy that in_type needs.
template <class S, class T>
constexpr int64_t copy_size(int64_t count) {
  return sizeof(S) == sizeof(T) ? 0 : count;
}

// ---------------------------------------------------------------------------------------------------
// forward

// A row on its way through the vocabulary.
template <class T>
struct Running {
  Top<T> top;       // max y so far
  int64_t top_at;   // its lowest index
  Vec<T> sum;       // of exp((y - top) / T), by lane
};

// The greatest low part among the entries with y = high; zero without noise.
template <class T>
T greatest_low(const SoftEmbedding& s, const T* y, const T* low, int64_t count, T high) {
  if (!s.noise) return T(0);
  Vec<T> best = splat(T(-HUGE_VAL));
  for (int64_t v = 0; v < padded<T>(count); v += kLanes<T>) {
    const Vec<T> next = load(low + v);
    best = (load(y + v) == high) & (next > best) ? next : best;
  }
  return lane_max<T>(best);
}

template <class T>
int64_t first_equal(const SoftEmbedding& s, const T* y, const T* low, int64_t count, Top<T> top) {
  for (int64_t v = 0; v < count; ++v) {
    if (y[v] == top.high && (!s.noise || low[v] == top.low)) return v;
  }
  return -1;
}

// Raises the running maximum to that of a chunk. `c` (D columns) is rescaled to it.
template <class T, class S>
void raise_top(const SoftEmbedding& s, const T* y, const T* low, int64_t first, int64_t count, T high, T t,
               Running<T>& run, S* c, int64_t width) {
  const Top<T> top{high, greatest_low(s, y, low, count, high)}, before = run.top;
  if (!(top.high > before.high || top.low > before.low)) return;
  if (before.high > -HUGE_VAL) {
    const Vec<T> scale = exp_scaled(splat((before.high - top.high) + (before.low - top.low)), t);
    run.sum *= scale;
    const Vec<S> factor = splat(static_cast<S>(scale[0]));
    for (int64_t d = 0; d < width; d += kLanes<S>) store(c + d, load(c + d) * factor);
  }
  run.top = top;
  run.top_at = first + first_equal(s, y, low, count, top);
}

// Turns y into exp((y - top) / t) in place and adds it to the sum.
template <class T, class S>
void merge_chunk(const SoftEmbedding& s, T* y, const T* low, int64_t first, int64_t count, T t, Running<T>& run,
                 S* c, int64_t width) {
  const int64_t end = padded<T>(count);
  Vec<T> best = load(y);
  for (int64_t v = kLanes<T>; v < end; v += kLanes<T>) {
    const Vec<T> next = load(y + v);
    best = next > best ? next : best;
    best = best == best ? best : next;  // a NaN in the first vector must not hide the rest
  }
  T high = -HUGE_VAL;
  for (int i = 0; i < kLanes<T>; ++i) high = best[i] > high ? best[i] : high;
  const bool level = s.noise && high == run.top.high && high > -HUGE_VAL;  // then the low parts decide
  if (high > run.top.high || level) raise_top(s, y, low, first, count, high, t, run, c, width);
  const bool empty = run.top.high == -HUGE_VAL;  // nothing finite yet: no mass, but NaN stays NaN
  const T top = empty ? run.top.high : subtract_top(s, run.top, count, low, y);
  Vec<T> sum{};  // of this chunk alone: small entries of a long row are not lost one by one beside a large one
  for (int64_t v = 0; v < end; v += kLanes<T>) {
    Vec<T> p = load(y + v);
    p = empty ? (p == top ? Vec<T>{} : p) : exp_scaled(p - top, t);
    sum += p;
    store(y + v, p);
  }
  run.sum += sum;
}

template <class T>
void write_mask_row(const Forward& f, int64_t row) {
  const SoftEmbedding& s = f.call;
  const T* embedding = static_cast<const T*>(s.mask_embedding) + row % s.groups * s.width;
  narrow(embedding, s.width, f.output, s.codebook_type, row * s.width);
  f.row_max[row] = 0.0;
  static_cast<T*>(f.row_sum)[row] = T(1);
  if (f.soft == nullptr) return;
  for (int64_t d = 0; d < s.width; ++d) static_cast<T*>(f.soft)[row * s.width + d] = T(0);
}

template <class T, class S>
void write_soft_row(const Forward& f, int64_t row, const Running<T>& run, const S* c, T* e) {
  const SoftEmbedding& s = f.call;
  const T sum = lane_sum<T>(run.sum);
  for (int64_t d = 0; d < s.width; ++d) e[d] = static_cast<T>(c[d] / sum);
  f.row_max[row] = static_cast<double>(run.top.high) + static_cast<double>(run.top.low);
  static_cast<T*>(f.row_sum)[row] = sum;
  if (f.soft != nullptr) {
    for (int64_t d = 0; d < s.width; ++d) static_cast<T*>(f.soft)[row * s.width + d] = e[d];
  }
  if (f.hard) {
    // sum is NaN exactly where the row holds no distribution; then e says so.
    const T* table = group_codebook<T>(s, row % s.groups);
    const int64_t columns = panel_width<T>(s.width);
    for (int64_t d = 0; d < s.width && sum > T(0); ++d) {
      e[d] = table[d / columns * columns * s.vocabulary + run.top_at * columns + d % columns];
    }
  }
  narrow(e, s.width, f.output, s.codebook_type, row * s.width);
}

// The scratch of one forward task.
template <class T, class S>
struct ForwardScratch {
  T* p;             // [block rows, chunk + kPad]
  S* c;             // [block rows, padded D + kPad]
  T* e;             // [D]
  Running<T>* run;  // [block rows]
  S* p_copy;        // of p and of the codebook's chunk, for in_type
  S* table_copy;
};

template <class T, class S>
void forward_block(const Forward& f, int64_t group, int64_t begin, int64_t end, const ForwardScratch<T, S>& scratch) {
  const SoftEmbedding& s = f.call;
  const int64_t wide = padded<S>(s.width), c_row = wide + kPad, p_row = kVocabularyChunk + kPad;
  alignas(64) T low[kVocabularyChunk];
  int64_t rows[kBlockRows];
  const int64_t count = soft_rows(s, group, begin, end, rows);
  for (int64_t m = 0; m < count; ++m) scratch.run[m] = {{T(-HUGE_VAL), T(0)}, 0, Vec<T>{}};
  const int64_t columns = panel_width<T>(s.width);
  const int64_t panel = sizeof(S) == sizeof(T) ? s.vocabulary * columns : panel_width<S>(s.width);
  for (int64_t v = 0; v < s.vocabulary; v += kVocabularyChunk) {
    const int64_t entries = smaller(kVocabularyChunk, s.vocabulary - v);
    for (int64_t m = 0; m < count; ++m) {
      T* y = scratch.p + m * p_row;
      read_row(s, rows[m], v, entries, y, low);
      const int64_t scaled = v > 0 ? wide : 0;  // c holds nothing before the first product
      merge_chunk(s, y, low, v, entries, row_temperature<T>(s, rows[m]), scratch.run[m], scratch.c + m * c_row, scaled);
    }
    const S* p = in_type<S>(scratch.p, count, entries, p_row, scratch.p_copy);
    const S* table = in_type<S>(group_codebook<T>(s, group) + v * columns, entries, wide, columns, scratch.table_copy);
    gemm<S>(count, wide, entries, {p, p_row, 1}, table, panel, columns, scratch.c, c_row, v > 0);
  }
  for (int64_t m = 0; m < count; ++m) write_soft_row(f, rows[m], scratch.run[m], scratch.c + m * c_row, scratch.e);
  for (int64_t n = begin; n < end && count < end - begin; ++n) {
    if (is_masked(s, n * s.groups + group)) write_mask_row<T>(f, n * s.groups + group);
  }
}

template <class T, class S>
void forward_tasks(const Forward& f, int64_t begin, int64_t end) {
  const SoftEmbedding& s = f.call;
  const int64_t positions = s.rows / s.groups;
  const int64_t blocks = (positions + f.block_rows - 1) / f.block_rows;
  const int64_t p_size = f.block_rows * (kVocabularyChunk + kPad);
  const Scratch<T> p(p_size), e(s.width);
  const Scratch<S> c(f.block_rows * (padded<S>(s.width) + kPad)), p_copy(copy_size<S, T>(p_size));
  const Scratch<S> table_copy(copy_size<S, T>(kVocabularyChunk * padded<T>(s.width)));
  const Scratch<Running<T>> run(f.block_rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * f.block_rows;
    forward_block<T, S>(f, task / blocks, first, smaller(first + f.block_rows, positions),
                        {p.get(), c.get(), e.get(), run.get(), p_copy.get(), table_copy.get()});
  }
}

template <class T>
void forward(const Forward& f, int64_t begin, int64_t end) {
  sums_in_double(f.call) ? forward_tasks<T, double>(f, begin, end) : forward_tasks<T, T>(f, begin, end);
}

// ---------------------------------------------------------------------------------------------------
// backward

// delta[n] = g[n] . e[n], with e in the compute type.
template <class T>
void row_dots(const Backward& b, int64_t begin, int64_t end) {
  const SoftEmbedding& s = b.call;
  const Scratch<T> g(s.width);
  for (int64_t row = begin; row < end; ++row) {
    double sum = 0;
    if (!is_masked(s, row)) {
      widen(b.grad, s.codebook_type, row * s.width, s.width, g.get());
      sum = dot(g.get(), static_cast<const T*>(b.soft) + row * s.width, s.width);
    }
    static_cast<T*>(b.delta)[row] = static_cast<T>(sum);
  }
}

// One task's place, and its scratch.
template <class T, class S>
struct Slice {
  int64_t group, split, first, count;  // vocabulary entries [first, first + count)
  int64_t index;                       // of the slice in the vocabulary
  T* table;                            // E^T of the slice: [panels, D, panel width]
  T* g;                                // [block rows, padded D + kPad]
  T* dp;                               // [block rows, padded tile + kPad], then dlogits
  T* p;                                // likewise
  S* de;                               // [tile, padded D + kPad]
  S* p_copy;                           // of p and g, for in_type
  S* g_copy;
};

template <class T, class S>
void transpose_codebook(const SoftEmbedding& s, const Slice<T, S>& slice) {
  const T* source = group_codebook<T>(s, slice.group);
  const int64_t from = panel_width<T>(s.width), to = panel_width<T>(slice.count);
  for (int64_t v = 0; v < padded<T>(slice.count); ++v) {
    T* out = slice.table + v / to * to * s.width + v % to;
    for (int64_t d = 0; d < s.width; ++d) {
      const T* entry = source + d / from * from * s.vocabulary + (slice.first + v) * from + d % from;
      out[d * to] = v < slice.count ? *entry : T(0);
    }
  }
}

// The slope of a row's slice, about the slice's mean distance: about the maximum, terms several times as large would
// cancel, and an error that all of (dp - delta) share would stay.
template <class T>
void add_slope(const T* p, const T* dz, const T* distance, int64_t count, RowPartial<T>& partial) {
  Vec<T> mass{}, moment{}, residual{}, slope{};
  for (int64_t v = 0; v < padded<T>(count); v += kLanes<T>) {
    const Vec<T> share = load(p + v);
    mass += share;
    moment += share == T(0) ? Vec<T>{} : share * load(distance + v);  // no mass: the distance may be infinite
  }
  partial.mass = lane_sum<T>(mass);
  partial.centre = partial.mass > T(0) ? lane_sum<T>(moment) / partial.mass : T(0);
  for (int64_t v = 0; v < padded<T>(count); v += kLanes<T>) {
    const Vec<T> gradient = load(dz + v);
    residual += gradient;
    slope += load(p + v) == T(0) ? Vec<T>{} : gradient * (load(distance + v) - partial.centre);
  }
  partial.residual = lane_sum<T>(residual);
  partial.slope = lane_sum<T>(slope);
}

// A saved maximum as the sum of two.
template <class T>
Top<T> saved_top(double value) {
  const T high = static_cast<T>(value);
  return {high, value - value == 0.0 ? static_cast<T>(value - static_cast<double>(high)) : T(0)};
}

// p and dlogits of one row's slice from logits, saved statistics and dp (overwritten by dlogits).
template <class T>
RowPartial<T> row_gradient(const Backward& b, int64_t first, int64_t count, int64_t row, T* p, T* dp) {
  const SoftEmbedding& s = b.call;
  const T scale = T(1) / static_cast<const T*>(b.row_sum)[row];
  const T delta = static_cast<const T*>(b.delta)[row], t = row_temperature<T>(s, row);
  alignas(64) T low[kVocabularyChunk], distance[kVocabularyChunk];
  read_row(s, row, first, count, p, low);
  const T top = subtract_top(s, saved_top<T>(b.row_max[row]), count, low, p);
  Vec<T> others{}, dominant{};
  for (int64_t v = 0; v < padded<T>(count); v += kLanes<T>) {
    const Vec<T> below = load(p + v) - top;
    const Vec<T> mass = exp_scaled(below, t) * scale;
    Vec<T> dz = mass * (load(dp + v) - delta);
    dz = t == T(1) ? dz : dz / t;
    store(p + v, mass);
    store(dp + v, dz);
    store(distance + v, below);
    others += mass > T(0.5) ? Vec<T>{} : dz;
    dominant = mass > T(0.5) ? mass : dominant;
  }
  RowPartial<T> partial{};
  partial.others = lane_sum<T>(others);
  partial.peak = -1;
  if (lane_max<T>(dominant) > T(0.5)) {
    for (int64_t v = 0; v < count; ++v) {
      if (p[v] > T(0.5)) partial.peak = first + v;
    }
  }
  if (b.dtemperature != nullptr) add_slope(p, dp, distance, count, partial);
  return partial;
}

void zero_gradient(const Backward& b, int64_t first, int64_t count, int64_t row) {
  const SoftEmbedding& s = b.call;
  char* out = static_cast<char*>(b.dlogits);
  const int64_t bytes = size_of(s.logits_type);
  std::memset(out + (row * s.vocabulary + first) * bytes, 0, static_cast<size_t>(count * bytes));
}

template <class T, class S>
void backward_block(const Backward& b, const Slice<T, S>& slice, int64_t begin, int64_t end, bool first_block) {
  const SoftEmbedding& s = b.call;
  const int64_t wide = padded<T>(s.width), g_row = wide + kPad, p_row = padded<T>(slice.count) + kPad;
  int64_t rows[kBlockRows];
  const int64_t count = soft_rows(s, slice.group, begin, end, rows);
  for (int64_t n = begin; n < end && count < end - begin && b.dlogits != nullptr; ++n) {
    const int64_t row = n * s.groups + slice.group;
    if (is_masked(s, row)) zero_gradient(b, slice.first, slice.count, row);
  }
  for (int64_t m = 0; m < count; ++m) {
    T* g = slice.g + m * g_row;
    widen(b.grad, s.codebook_type, rows[m] * s.width, s.width, g);
    for (int64_t d = s.width; d < wide; ++d) g[d] = T(0);
  }
  const int64_t columns = panel_width<T>(slice.count);
  gemm<T>(count, padded<T>(slice.count), s.width, {slice.g, g_row, 1}, slice.table, columns * s.width, columns,
          slice.dp, p_row, false);
  RowPartial<T>* partials = static_cast<RowPartial<T>*>(b.partials) + slice.index * s.rows;
  for (int64_t m = 0; m < count; ++m) {
    T* dp = slice.dp + m * p_row;
    partials[rows[m]] = row_gradient(b, slice.first, slice.count, rows[m], slice.p + m * p_row, dp);
    if (b.dlogits == nullptr) continue;
    narrow(dp, slice.count, b.dlogits, s.logits_type, rows[m] * s.vocabulary + slice.first);
  }
  if (b.dcodebook == nullptr) return;
  const S* p = in_type<S>(slice.p, count, slice.count, p_row, slice.p_copy);
  const S* g = in_type<S>(slice.g, count, wide, g_row, slice.g_copy);
  gemm<S>(slice.count, padded<S>(s.width), count, {p, 1, p_row}, g, panel_width<S>(s.width), g_row, slice.de, g_row,
          !first_block);
}

template <class T, class S>
void backward_task(const Backward& b, const Slice<T, S>& slice) {
  const SoftEmbedding& s = b.call;
  const int64_t positions = s.rows / s.groups, wide = padded<T>(s.width);
  const int64_t part = (positions + b.splits - 1) / b.splits;
  const int64_t begin = smaller(slice.split * part, positions), end = smaller(begin + part, positions);
  transpose_codebook(s, slice);
  for (int64_t n = begin; n < end; n += kBlockRows) {
    backward_block(b, slice, n, smaller(n + kBlockRows, end), n == begin);
  }
  if (b.dcodebook == nullptr) return;
  S* out = static_cast<S*>(b.dcodebook) +
           ((slice.split * s.groups + slice.group) * s.vocabulary + slice.first) * s.width;
  for (int64_t v = 0; v < slice.count; ++v) {
    for (int64_t d = 0; d < s.width; ++d) {
      out[v * s.width + d] = begin < end ? slice.de[v * (wide + kPad) + d] : S(0);
    }
  }
}

template <class T, class S>
void backward_tasks(const Backward& b, int64_t begin, int64_t end) {
  const SoftEmbedding& s = b.call;
  const int64_t tiles = (s.vocabulary + b.tile - 1) / b.tile;
  const int64_t wide = padded<T>(s.width), columns = padded<T>(b.tile);
  const int64_t g_size = kBlockRows * (wide + kPad), p_size = kBlockRows * (columns + kPad);
  const Scratch<T> table(columns * s.width), g(g_size), dp(p_size), p(p_size);
  const Scratch<S> de(b.tile * (wide + kPad)), p_copy(copy_size<S, T>(p_size)), g_copy(copy_size<S, T>(g_size));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % tiles, first = index * b.tile;
    backward_task<T, S>(b, {task / tiles / b.splits, task / tiles % b.splits, first,
                            smaller(b.tile, s.vocabulary - first), index, table.get(), g.get(), dp.get(), p.get(),
                            de.get(), p_copy.get(), g_copy.get()});
  }
}

template <class T>
void backward(const Backward& b, int64_t begin, int64_t end) {
  sums_in_double(b.call) ? backward_tasks<T, double>(b, begin, end) : backward_tasks<T, T>(b, begin, end);
}

// The row's slope, sum of dlogits (y - mean y), from slices that took it about their own means.
template <class T>
double merged_slope(const RowPartial<T>* partial, int64_t tiles, int64_t step) {
  double mass = 0, moment = 0, slope = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const RowPartial<T>& slice = partial[i * step];
    mass += slice.mass;
    moment += static_cast<double>(slice.mass) * slice.centre;
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const RowPartial<T>& slice = partial[i * step];
    slope += slice.slope + (slice.centre - moment / mass) * slice.residual;
  }
  return slope;
}

// Merges the slices of each row in index order: the dominant entry's gradient and the temperature's.
template <class T>
void finish_rows(const Backward& b, int64_t begin, int64_t end) {
  const SoftEmbedding& s = b.call;
  const int64_t tiles = (s.vocabulary + b.tile - 1) / b.tile;
  for (int64_t row = begin; row < end; ++row) {
    const RowPartial<T>* partial = static_cast<const RowPartial<T>*>(b.partials) + row;
    const bool masked = is_masked(s, row);
    double others = 0;
    int64_t peak = -1;
    for (int64_t i = 0; i < tiles && !masked; ++i) {
      others += partial[i * s.rows].others;
      if (partial[i * s.rows].peak >= 0) peak = partial[i * s.rows].peak;
    }
    if (b.dlogits != nullptr && peak >= 0) {
      const double value = -others;
      narrow(&value, 1, b.dlogits, s.logits_type, row * s.vocabulary + peak);
    }
    if (b.dtemperature != nullptr) {
      const double slope = masked ? 0.0 : merged_slope(partial, tiles, s.rows);
      static_cast<T*>(b.dtemperature)[row] = masked ? T(0) : static_cast<T>(-slope / row_temperature<T>(s, row));
    }
  }
}

template <class T>
void reduce(const void* parts, int64_t count, int64_t n, void* out, DType type, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += static_cast<const T*>(parts)[part * n + i];
    narrow(&sum, 1, out, type, i);
  }
}

template <class T>
void mask_gradient(const SoftEmbedding& s, const void* grad, double* chunks, int64_t begin, int64_t end) {
  const int64_t positions = s.rows / s.groups, size = s.groups * s.width;
  const Scratch<T> g(s.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sum = chunks + chunk * size;
    for (int64_t i = 0; i < size; ++i) sum[i] = 0;
    const int64_t last = smaller((chunk + 1) * kMaskChunk, positions) * s.groups;
    for (int64_t row = chunk * kMaskChunk * s.groups; row < last; ++row) {
      if (!is_masked(s, row)) continue;
      widen(grad, s.codebook_type, row * s.width, s.width, g.get());
      double* target = sum + row % s.groups * s.width;
      for (int64_t d = 0; d < s.width; ++d) target[d] += g[d];
    }
  }
}

template <class T>
constexpr SoftEmbeddingKernels kKernels = {packed_size<T>, pack_codebook<T>, forward<T>, row_dots<T>,
                                           backward<T>,    finish_rows<T>,   reduce<T>,  mask_gradient<T>};

}  // namespace

const SoftEmbeddingTable& soft_embedding_table() {
  static constexpr SoftEmbeddingTable table = {kKernels<float>, kKernels<double>};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
