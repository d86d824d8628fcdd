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
// with p > 1/2 gets minus the sum of the other gradients, written by finish_rows.

#include "softdimo/soft_embedding.h"

#include <cmath>

#include "gemm.h"
#include "scratch.h"
#include "simd.h"
#include "softdimo/philox.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

constexpr int64_t kPad = 16;  // elements between scratch rows: power-of-two strides share cache sets

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------------------------------
// reading rows

template <class T>
void add_gumbel(const SoftEmbedding& s, int64_t row, int64_t first, int64_t count, T* y) {
  const uint64_t id = static_cast<uint64_t>(s.row_ids != nullptr ? s.row_ids[row] : row);
  alignas(64) T uniform[kVocabularyChunk];
  for (int64_t v = 0; v < count; v += 4) {
    const Words words = philox4x32(s.seed, id, static_cast<uint32_t>((first + v) / 4), s.offset);
    for (int i = 0; i < 4; ++i) uniform[v + i] = static_cast<T>(open_uniform(words.word[i]));
  }
  for (int64_t v = (count + 3) / 4 * 4; v < padded<T>(count); ++v) uniform[v] = T(0.5);
  for (int64_t v = 0; v < count; v += kLanes<T>) store(y + v, load(y + v) + gumbel(load(uniform + v)));
}

// Entries [first, first + count) of a row, noise added, then -inf up to padded(count). count <= kVocabularyChunk,
// first a multiple of it.
template <class T>
void read_row(const SoftEmbedding& s, int64_t row, int64_t first, int64_t count, T* y) {
  widen(s.logits, s.logits_type, s.logits_rows.offset(row) + first, count, y);
  for (int64_t v = count; v < padded<T>(count); ++v) y[v] = -HUGE_VAL;
  if (s.noise) add_gumbel(s, row, first, count, y);
}

template <class T>
T row_temperature(const SoftEmbedding& s, int64_t row) {
  return s.row_temperature != nullptr ? static_cast<const T*>(s.row_temperature)[row] : static_cast<T>(s.temperature);
}

// exp((y - top) / t); y <= top.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> exp_below(Vec<T> y, T top, T t) {
  const Vec<T> distance = y - top;
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
// forward

// A row on its way through the vocabulary.
template <class T>
struct Running {
  T top;            // max y so far
  int64_t top_at;   // its lowest index
  Vec<T> sum;       // of exp((y - top) / T), by lane
};

template <class T>
int64_t first_equal(const T* y, int64_t count, T value) {
  for (int64_t v = 0; v < count; ++v) {
    if (y[v] == value) return v;
  }
  return -1;
}

// Turns y into exp((y - top) / t) in place and adds it to the sum. `c` (D columns) is rescaled to a higher top.
template <class T>
void merge_chunk(T* y, int64_t first, int64_t count, T t, Running<T>& run, T* c, int64_t width) {
  const int64_t end = padded<T>(count);
  Vec<T> best = load(y);
  for (int64_t v = kLanes<T>; v < end; v += kLanes<T>) {
    const Vec<T> next = load(y + v);
    best = next > best ? next : best;
    best = best == best ? best : next;  // a NaN in the first vector must not hide the rest
  }
  T top = -HUGE_VAL;
  for (int i = 0; i < kLanes<T>; ++i) top = best[i] > top ? best[i] : top;
  if (top > run.top) {
    if (run.top > -HUGE_VAL) {
      const Vec<T> scale = exp_below(splat(run.top), top, t);
      run.sum *= scale;
      for (int64_t d = 0; d < width; d += kLanes<T>) store(c + d, load(c + d) * scale);
    }
    run.top = top;
    run.top_at = first + first_equal(y, count, top);
  }
  Vec<T> sum{};  // of this chunk alone: small entries of a long row are not lost one by one beside a large one
  for (int64_t v = 0; v < end; v += kLanes<T>) {
    Vec<T> p = load(y + v);
    if (run.top == -HUGE_VAL) {
      p = p == run.top ? Vec<T>{} : p;  // nothing finite yet: no mass, but NaN stays NaN
    } else {
      p = exp_below(p, run.top, t);
    }
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
  static_cast<T*>(f.row_max)[row] = T(0);
  static_cast<T*>(f.row_sum)[row] = T(1);
  if (f.soft == nullptr) return;
  for (int64_t d = 0; d < s.width; ++d) static_cast<T*>(f.soft)[row * s.width + d] = T(0);
}

template <class T>
void write_soft_row(const Forward& f, int64_t row, const Running<T>& run, T* c) {
  const SoftEmbedding& s = f.call;
  const T sum = lane_sum<T>(run.sum);
  for (int64_t d = 0; d < s.width; ++d) c[d] /= sum;
  static_cast<T*>(f.row_max)[row] = run.top;
  static_cast<T*>(f.row_sum)[row] = sum;
  if (f.soft != nullptr) {
    for (int64_t d = 0; d < s.width; ++d) static_cast<T*>(f.soft)[row * s.width + d] = c[d];
  }
  if (f.hard) {
    // sum is NaN exactly where the row holds no distribution; then c says so.
    const T* table = group_codebook<T>(s, row % s.groups);
    const int64_t columns = panel_width<T>(s.width);
    for (int64_t d = 0; d < s.width && sum > T(0); ++d) {
      c[d] = table[d / columns * columns * s.vocabulary + run.top_at * columns + d % columns];
    }
  }
  narrow(c, s.width, f.output, s.codebook_type, row * s.width);
}

template <class T>
void forward_block(const Forward& f, int64_t group, int64_t begin, int64_t end, T* p, T* c, Running<T>* run) {
  const SoftEmbedding& s = f.call;
  const int64_t wide = padded<T>(s.width), c_row = wide + kPad, p_row = kVocabularyChunk + kPad;
  int64_t rows[kBlockRows];
  const int64_t count = soft_rows(s, group, begin, end, rows);
  for (int64_t m = 0; m < count; ++m) run[m] = {T(-HUGE_VAL), 0, Vec<T>{}};
  const T* table = group_codebook<T>(s, group);
  for (int64_t v = 0; v < s.vocabulary; v += kVocabularyChunk) {
    const int64_t entries = smaller(kVocabularyChunk, s.vocabulary - v);
    for (int64_t m = 0; m < count; ++m) {
      read_row(s, rows[m], v, entries, p + m * p_row);
      const int64_t scaled = v > 0 ? wide : 0;  // c holds nothing before the first product
      merge_chunk(p + m * p_row, v, entries, row_temperature<T>(s, rows[m]), run[m], c + m * c_row, scaled);
    }
    const int64_t columns = panel_width<T>(s.width);
    gemm<T>(count, wide, entries, {p, p_row, 1}, table + v * columns, s.vocabulary * columns, columns, c, c_row,
            v > 0);
  }
  for (int64_t m = 0; m < count; ++m) write_soft_row(f, rows[m], run[m], c + m * c_row);
  for (int64_t n = begin; n < end && count < end - begin; ++n) {
    if (is_masked(s, n * s.groups + group)) write_mask_row<T>(f, n * s.groups + group);
  }
}

template <class T>
void forward(const Forward& f, int64_t begin, int64_t end) {
  const SoftEmbedding& s = f.call;
  const int64_t positions = s.rows / s.groups;
  const int64_t blocks = (positions + f.block_rows - 1) / f.block_rows;
  const Scratch<T> p(f.block_rows * (kVocabularyChunk + kPad));
  const Scratch<T> c(f.block_rows * (padded<T>(s.width) + kPad));
  const Scratch<Running<T>> run(f.block_rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * f.block_rows;
    forward_block(f, task / blocks, first, smaller(first + f.block_rows, positions), p.get(), c.get(), run.get());
  }
}

// ---------------------------------------------------------------------------------------------------
// backward

// delta[n] = g[n] . e[n], with e in the compute type.
template <class T>
void row_dots(const Backward& b, int64_t begin, int64_t end) {
  const SoftEmbedding& s = b.call;
  const Scratch<T> g(s.width);
  for (int64_t row = begin; row < end; ++row) {
    T sum = T(0);
    if (!is_masked(s, row)) {
      widen(b.grad, s.codebook_type, row * s.width, s.width, g.get());
      const T* e = static_cast<const T*>(b.soft) + row * s.width;
      for (int64_t d = 0; d < s.width; ++d) sum += g[d] * e[d];
    }
    static_cast<T*>(b.delta)[row] = sum;
  }
}

// One task's place, and its scratch.
template <class T>
struct Slice {
  int64_t group, split, first, count;  // vocabulary entries [first, first + count)
  int64_t index;                       // of the slice in the vocabulary
  T* table;                            // E^T of the slice: [panels, D, panel width]
  T* g;                                // [block rows, padded D + kPad]
  T* dp;                               // [block rows, padded tile + kPad], then dlogits
  T* p;                                // likewise
  T* de;                               // [tile, padded D + kPad]
};

template <class T>
void transpose_codebook(const SoftEmbedding& s, const Slice<T>& slice) {
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

// p and dlogits of one row's slice from logits, saved statistics and dp (overwritten by dlogits).
template <class T>
RowPartial<T> row_gradient(const Backward& b, const Slice<T>& slice, int64_t row, T* p, T* dp) {
  const SoftEmbedding& s = b.call;
  const T top = static_cast<const T*>(b.row_max)[row], scale = T(1) / static_cast<const T*>(b.row_sum)[row];
  const T delta = static_cast<const T*>(b.delta)[row], t = row_temperature<T>(s, row);
  read_row(s, row, slice.first, slice.count, p);
  Vec<T> sum{}, slope{}, dominant{};
  for (int64_t v = 0; v < padded<T>(slice.count); v += kLanes<T>) {
    const Vec<T> y = load(p + v);
    const Vec<T> mass = exp_below(y, top, t) * scale;
    Vec<T> dz = mass * (load(dp + v) - delta);
    dz = t == T(1) ? dz : dz / t;
    store(p + v, mass);
    store(dp + v, dz);
    sum += mass > T(0.5) ? Vec<T>{} : dz;
    slope += mass == T(0) ? Vec<T>{} : dz * (y - top);
    dominant = mass > T(0.5) ? mass : dominant;
  }
  RowPartial<T> partial{lane_sum<T>(sum), lane_sum<T>(slope), -1};
  if (lane_max<T>(dominant) > T(0.5)) {
    for (int64_t v = 0; v < slice.count; ++v) {
      if (p[v] > T(0.5)) partial.peak = slice.first + v;
    }
  }
  return partial;
}

template <class T>
void zero_gradient(const Backward& b, const Slice<T>& slice, int64_t row) {
  const SoftEmbedding& s = b.call;
  char* out = static_cast<char*>(b.dlogits);
  const int64_t bytes = size_of(s.logits_type);
  std::memset(out + (row * s.vocabulary + slice.first) * bytes, 0, static_cast<size_t>(slice.count * bytes));
}

template <class T>
void backward_block(const Backward& b, const Slice<T>& slice, int64_t begin, int64_t end, bool first_block) {
  const SoftEmbedding& s = b.call;
  const int64_t wide = padded<T>(s.width), g_row = wide + kPad, p_row = padded<T>(slice.count) + kPad;
  int64_t rows[kBlockRows];
  const int64_t count = soft_rows(s, slice.group, begin, end, rows);
  for (int64_t n = begin; n < end && count < end - begin && b.dlogits != nullptr; ++n) {
    const int64_t row = n * s.groups + slice.group;
    if (is_masked(s, row)) zero_gradient(b, slice, row);
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
    partials[rows[m]] = row_gradient(b, slice, rows[m], slice.p + m * p_row, dp);
    if (b.dlogits == nullptr) continue;
    narrow(dp, slice.count, b.dlogits, s.logits_type, rows[m] * s.vocabulary + slice.first);
  }
  if (b.dcodebook == nullptr) return;
  gemm<T>(slice.count, wide, count, {slice.p, 1, p_row}, slice.g, panel_width<T>(s.width), g_row, slice.de, g_row,
          !first_block);
}

template <class T>
void backward_task(const Backward& b, const Slice<T>& slice) {
  const SoftEmbedding& s = b.call;
  const int64_t positions = s.rows / s.groups, wide = padded<T>(s.width);
  const int64_t part = (positions + b.splits - 1) / b.splits;
  const int64_t begin = smaller(slice.split * part, positions), end = smaller(begin + part, positions);
  transpose_codebook(s, slice);
  for (int64_t n = begin; n < end; n += kBlockRows) {
    backward_block(b, slice, n, smaller(n + kBlockRows, end), n == begin);
  }
  if (b.dcodebook == nullptr) return;
  T* out = static_cast<T*>(b.dcodebook) +
           ((slice.split * s.groups + slice.group) * s.vocabulary + slice.first) * s.width;
  for (int64_t v = 0; v < slice.count; ++v) {
    for (int64_t d = 0; d < s.width; ++d) {
      out[v * s.width + d] = begin < end ? slice.de[v * (wide + kPad) + d] : T(0);
    }
  }
}

template <class T>
void backward(const Backward& b, int64_t begin, int64_t end) {
  const SoftEmbedding& s = b.call;
  const int64_t tiles = (s.vocabulary + b.tile - 1) / b.tile;
  const int64_t wide = padded<T>(s.width), columns = padded<T>(b.tile);
  const Scratch<T> table(columns * s.width), g(kBlockRows * (wide + kPad)), dp(kBlockRows * (columns + kPad));
  const Scratch<T> p(kBlockRows * (columns + kPad)), de(b.tile * (wide + kPad));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % tiles, first = index * b.tile;
    backward_task<T>(b, {task / tiles / b.splits, task / tiles % b.splits, first,
                         smaller(b.tile, s.vocabulary - first), index, table.get(), g.get(), dp.get(), p.get(),
                         de.get()});
  }
}

// Merges the slices of each row in index order: the dominant entry's gradient and the temperature's.
template <class T>
void finish_rows(const Backward& b, int64_t begin, int64_t end) {
  const SoftEmbedding& s = b.call;
  const int64_t tiles = (s.vocabulary + b.tile - 1) / b.tile;
  for (int64_t row = begin; row < end; ++row) {
    RowPartial<T> total{T(0), T(0), -1};
    for (int64_t i = 0; i < tiles && !is_masked(s, row); ++i) {
      const RowPartial<T>& partial = static_cast<const RowPartial<T>*>(b.partials)[i * s.rows + row];
      total.sum += partial.sum;
      total.slope += partial.slope;
      if (partial.peak >= 0) total.peak = partial.peak;
    }
    if (b.dlogits != nullptr && total.peak >= 0) {
      const T value = -total.sum;
      narrow(&value, 1, b.dlogits, s.logits_type, row * s.vocabulary + total.peak);
    }
    if (b.dtemperature != nullptr) {
      static_cast<T*>(b.dtemperature)[row] = is_masked(s, row) ? T(0) : -total.slope / row_temperature<T>(s, row);
    }
  }
}

template <class T>
void reduce(const void* parts, int64_t count, int64_t n, void* out, DType type, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T sum = static_cast<const T*>(parts)[i];
    for (int64_t part = 1; part < count; ++part) sum += static_cast<const T*>(parts)[part * n + i];
    narrow(&sum, 1, out, type, i);
  }
}

template <class T>
void mask_gradient(const SoftEmbedding& s, const void* grad, void* chunks, int64_t begin, int64_t end) {
  const int64_t positions = s.rows / s.groups, size = s.groups * s.width;
  const Scratch<T> g(s.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    T* sum = static_cast<T*>(chunks) + chunk * size;
    for (int64_t i = 0; i < size; ++i) sum[i] = T(0);
    const int64_t last = smaller((chunk + 1) * kMaskChunk, positions) * s.groups;
    for (int64_t row = chunk * kMaskChunk * s.groups; row < last; ++row) {
      if (!is_masked(s, row)) continue;
      widen(grad, s.codebook_type, row * s.width, s.width, g.get());
      T* target = sum + row % s.groups * s.width;
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
