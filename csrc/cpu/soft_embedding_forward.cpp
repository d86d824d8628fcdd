// soft_embedding on CPUs, forward; compiled once per instruction set.
//
//   e[n] = sum_v p[n, v] E[v],  p = softmax(y / T)
//
// With R rows, V entries, D columns and s bytes per logit:
//   s R V bytes read, 2 R V D FLOP, R V exponentials
//   floor  max(bytes / read rate, FLOP / multiply-add rate + exponentials / exp rate)
//
// One task is a block of rows; the vocabulary passes in chunks of kVocabularyChunk or kLongChunk,
//
//     logits [rows, chunk] -> y -> p~ = exp((y - running max) / T) -> C [rows, D] += p~ E[chunk]
//
// and C is rescaled when a chunk raises a row's maximum. No probability leaves the cache, and with the exponentials of
// one chunk the logits of the next are fetched: products take too little of the time where they are in bfloat16.
//
// A bfloat16 codebook is multiplied in bfloat16 where the instruction set can: p~ enters the product rounded, in one
// term or (precision "high") two, and the sum it is divided by is that of the rounded p~.

#include "gemm_bf16.h"
#include "scratch.h"
#include "soft_embedding_rows.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// A row on its way through the vocabulary.
template <class T>
struct Running {
  Top<T> top;      // max y so far
  int64_t top_at;  // its lowest index, where the hard value is wanted
  Vec<T> sum;      // of exp((y - top) / T), by lane
};

// ---------------------------------------------------------------------------------------------------
// products

// p~ and its product with the codebook, packed as [G, panels, V, panel width] with zeros beyond D; multiplied in S.
template <class Compute, class Sums>
class WideProduct {
 public:
  using T = Compute;
  using S = Sums;
  static constexpr int64_t kChunk = kVocabularyChunk;

  explicit WideProduct(const Forward& f)
      : s_(f.call), p_(f.block_rows * kRow) {}

  static int64_t packed_bytes(const SoftEmbedding& s) {
    return s.groups * s.vocabulary * padded<S>(s.width) * static_cast<int64_t>(sizeof(S));
  }
  // Over G * V.
  static void pack(const SoftEmbedding& s, void* packed, int64_t begin, int64_t end) {
    const int64_t wide = padded<S>(s.width), columns = panel_width<S>(s.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / s.vocabulary, v = i % s.vocabulary;
      const int64_t source = group * s.codebook_stride[0] + v * s.codebook_stride[1];
      for (int64_t d0 = 0; d0 < wide; d0 += columns) {
        S* out = static_cast<S*>(packed) + (group * wide + d0) * s.vocabulary + v * columns;
        const int64_t count = smaller(columns, s.width - d0);
        read_codebook(s, source, d0, count, out);
        for (int64_t d = count; d < columns; ++d) out[d] = S(0);
      }
    }
  }
  static int64_t padded_width(int64_t width) { return padded<S>(width); }

  // Two vectors of row m of p~; returns `sum` with them added, as the product takes them.
  SOFTDIMO_ALWAYS_INLINE Vec<T> put(int64_t m, int64_t v, Vec<T> first, Vec<T> second, Vec<T> sum) {
    store_as<S, T>(p_.get() + m * kRow + v, first);
    store_as<S, T>(p_.get() + m * kRow + v + kLanes<T>, second);
    return sum + (first + second);
  }

  void multiply(int64_t rows, int64_t group, int64_t first, int64_t entries, S* c, int64_t c_row) {
    const int64_t wide = padded<S>(s_.width), columns = panel_width<S>(s_.width);
    const S* codebook = static_cast<const S*>(s_.packed_codebook) + group * wide * s_.vocabulary + first * columns;
    gemm<S>(rows, wide, entries, {p_.get(), kRow, 1}, codebook, s_.vocabulary * columns, columns, c, c_row, first > 0);
  }

 private:
  static constexpr int64_t kRow = kChunk + kPad;
  const SoftEmbedding& s_;
  const Scratch<S> p_;
};

#ifdef __AVX512BF16__

// The codebook in bfloat16, packed as pack_bf16.h says; p~ in Terms bfloat16 terms.
template <int Terms>
class Bfloat16Product {
 public:
  using T = float;
  using S = float;
  static constexpr int64_t kChunk = kLongChunk;  // entries take half the memory: fewer maxima, longer reads

  explicit Bfloat16Product(const Forward& f) : s_(f.call), size_(f.block_rows * kRow), p_(Terms * size_) {}

  static int64_t packed_bytes(const SoftEmbedding& s) {
    return s.groups * right_size(s.vocabulary, s.width) * static_cast<int64_t>(sizeof(Bfloat16));
  }
  static void pack(const SoftEmbedding& s, void* packed, int64_t begin, int64_t end) {
    // In steps of kDepthStep entries; a range of G * V rows packs the steps that begin in it.
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / s.vocabulary, v = i % s.vocabulary;
      if (v % kDepthStep != 0) continue;
      Bfloat16* out = static_cast<Bfloat16*>(packed) + group * right_size(s.vocabulary, s.width);
      pack_right(group_table(s, group), s.vocabulary, s.width, v / kDepthStep, v / kDepthStep + 1, out);
    }
  }
  static int64_t padded_width(int64_t width) { return padded_columns(width); }

  SOFTDIMO_ALWAYS_INLINE Vec<float> put(int64_t m, int64_t v, Vec<float> first, Vec<float> second, Vec<float> sum) {
    Bfloat16* out = p_.get() + m * kRow + v;
    sum = put_term(first, second, out, sum);
    if constexpr (Terms == 1) return sum;
    return put_term(first - rounded(first), second - rounded(second), out + size_, sum);
  }

  void multiply(int64_t rows, int64_t group, int64_t first, int64_t entries, float* c, int64_t c_row) {
    const Bfloat16* table = static_cast<const Bfloat16*>(s_.packed_codebook) +
                            group * right_size(s_.vocabulary, s_.width) + first * kPanel;
    const int64_t panel = right_panel(s_.vocabulary);
    gemm_bf16(rows, s_.width, entries, p_.get(), kRow, table, panel, c, c_row, first > 0);
    if constexpr (Terms == 2) {
      gemm_bf16(rows, s_.width, entries, p_.get() + size_, kRow, table, panel, c, c_row, true);
    }
  }

 private:
  static constexpr int64_t kRow = kChunk + kLeftPad;

  static SOFTDIMO_ALWAYS_INLINE Vec<float> put_term(Vec<float> first, Vec<float> second, Bfloat16* out,
                                                    Vec<float> sum) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    _mm512_storeu_si512(out, (__m512i)both);
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, both, ones);
  }

  const SoftEmbedding& s_;
  const int64_t size_;
  const Scratch<Bfloat16> p_;
  const ProductScope scope_;
};

#endif

// ---------------------------------------------------------------------------------------------------
// one chunk of one row

// The maximum; NaN is passed over, the sum tells of it.
template <class T, class Source>
SOFTDIMO_ALWAYS_INLINE T chunk_max(const Source& y, int64_t count) {
  Vec<T> first = splat(static_cast<T>(-HUGE_VAL)), second = first;
  each_pair<T>(y, count, [&](int64_t, Vec<T> a, Vec<T> b) __attribute__((always_inline)) {
    first = a > first ? a : first;
    second = b > second ? b : second;
  });
  return highest<T>(second > first ? second : first);
}

template <class T, class Source, class Copy>
int64_t first_equal(const Source& y, const Copy* noisy, int64_t count, Top<T> top) {
  for (int64_t v = 0; v < count; ++v) {
    if (y.one(v) == top.high && (noisy == nullptr || noisy->low[v] == top.low)) return v;
  }
  return -1;
}

// Raises the running maximum to that of a chunk. `c` (`width` sums so far) is rescaled to it.
template <class T, class S>
void rescale(Top<T> top, const ScaledExp<T>& exp, Running<T>& run, S* c, int64_t width) {
  if (run.top.high > -HUGE_VAL) {
    const Vec<T> scale = exp(splat((run.top.high - top.high) + (run.top.low - top.low)));
    run.sum *= scale;
    const Vec<S> factor = splat(static_cast<S>(scale[0]));
    for (int64_t d = 0; d < width; d += kLanes<S>) store(c + d, load(c + d) * factor);
  }
  run.top = top;
}

// Where a row stands: entries [first, first + count) as row m of a block; c has `width` sums of its earlier chunks.
template <class S>
struct Place {
  int64_t m, first, count;
  S* c;
  int64_t width;
  const char* ahead;  // the logits that are wanted next, to be fetched meanwhile
};

// Turns the chunk y into exp((y - top) / t), hands it to the product and adds it to the sum. `noisy` holds y where it
// has noise.
template <class Product, class T, class S, class Source>
SOFTDIMO_ALWAYS_INLINE void merge_chunk(const Source& y, Staged<T, Product::kChunk>* noisy, const Place<S>& at,
                                        bool hard, const ScaledExp<T>& exp, Running<T>& run, Product& product) {
  const T high = chunk_max<T>(y, at.count);
  const bool level = noisy != nullptr && high == run.top.high && high > -HUGE_VAL;  // then the low parts decide
  if (high > run.top.high || level) {
    const Top<T> top{high, noisy != nullptr ? noisy->greatest_low(at.count, high) : T(0)};
    if (top.high > run.top.high || top.low > run.top.low) {
      rescale(top, exp, run, at.c, at.width);
      if (hard) run.top_at = at.first + first_equal<T>(y, noisy, at.count, top);
    }
  }
  if (run.top.high == -HUGE_VAL) {  // nothing finite yet: no mass, but NaN stays NaN
    each_pair<T>(y, at.count, [&](int64_t v, Vec<T> a, Vec<T> b) {
      a = a == run.top.high ? Vec<T>{} : a;
      b = b == run.top.high ? Vec<T>{} : b;
      run.sum = product.put(at.m, v, a, b, run.sum);
    });
    return;
  }
  if (noisy != nullptr) noisy->subtract(true, run.top, at.count);
  const T top = noisy != nullptr ? T(0) : run.top.high;
  Vec<T> sum{};  // of this chunk alone: small entries of a long row are not lost one by one beside a large one
  each_pair<T>(y, at.count, [&](int64_t v, Vec<T> a, Vec<T> b) __attribute__((always_inline)) {
    y.fetch(at.ahead, v);
    sum = product.put(at.m, v, exp(a - top), exp(b - top), sum);
  });
  run.sum += sum;
}

template <class Product, class T, class S>
void read_chunk(const Forward& f, int64_t row, const Place<S>& at, const ScaledExp<T>& shared, Running<T>& run,
                Product& product) {
  const SoftEmbedding& s = f.call;
  const ScaledExp<T> exp = row_exp(s, row, shared);
  const char* logits = logits_at(s, row, at.first);
  using Copy = Staged<T, Product::kChunk>;
  Copy* const none = nullptr;
  if (reads_in_place<T>(s)) {
    return merge_chunk(Entries<T>{reinterpret_cast<const T*>(logits)}, none, at, f.hard, exp, run, product);
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (reads_bfloat16<T>(s)) {
      return merge_chunk(Bfloat16Entries{reinterpret_cast<const uint16_t*>(logits)}, none, at, f.hard, exp, run,
                         product);
    }
  }
  Copy staged;
  staged.read(s, row, at.first, at.count);
  merge_chunk(Entries<T>{staged.y}, s.noise ? &staged : nullptr, at, f.hard, exp, run, product);
}

// ---------------------------------------------------------------------------------------------------
// blocks of rows

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

// The soft value is computed where it is kept: in `soft`, or in an output of its type. e: scratch.
template <class T, class S>
void write_soft_row(const Forward& f, int64_t row, const Running<T>& run, const S* c, T* e) {
  const SoftEmbedding& s = f.call;
  const bool is_output = f.soft == nullptr && !f.hard;  // then the codebook's type is T
  T* wide = static_cast<T*>(is_output ? f.output : f.soft) + row * s.width;
  const T sum = lane_sum<T>(run.sum);
  const S scale = S(1) / static_cast<S>(sum);
  for (int64_t d = 0; d < s.width; ++d) wide[d] = static_cast<T>(c[d] * scale);
  f.row_max[row] = static_cast<double>(run.top.high) + static_cast<double>(run.top.low);
  static_cast<T*>(f.row_sum)[row] = sum;
  if (is_output) return;
  // sum is NaN exactly where the row holds no distribution; then the soft value says so.
  const bool picks = f.hard && sum > T(0);
  if (picks) {
    const int64_t source = row % s.groups * s.codebook_stride[0] + run.top_at * s.codebook_stride[1];
    read_codebook(s, source, 0, s.width, e);
  }
  narrow(picks ? e : wide, s.width, f.output, s.codebook_type, row * s.width);
}

// The rows of one task.
struct Block {
  int64_t group, begin, end, count;
  int64_t rows[kBlockRows];  // those that are not masked

  Block(const Forward& f, int64_t task) {
    const int64_t positions = f.call.rows / f.call.groups, blocks = (positions + f.block_rows - 1) / f.block_rows;
    group = task / blocks;
    begin = task % blocks * f.block_rows;
    end = smaller(begin + f.block_rows, positions);
    count = soft_rows(f.call, group, begin, end, rows);
  }
};

template <class Product>
class ForwardRange {
 public:
  using T = typename Product::T;
  using S = typename Product::S;

  explicit ForwardRange(const Forward& f)
      : f_(f), product_(f), wide_(Product::padded_width(f.call.width)), c_(f.block_rows * (wide_ + kPad)),
        e_(f.call.width), run_(f.block_rows), shared_(static_cast<T>(f.call.temperature)) {}

  // `next` is the block that follows, or the last one again.
  void run(const Block& block, const Block& next) {
    constexpr int64_t kChunk = Product::kChunk;
    const SoftEmbedding& s = f_.call;
    const int64_t c_row = wide_ + kPad;
    for (int64_t m = 0; m < block.count; ++m) run_[m] = {{static_cast<T>(-HUGE_VAL), T(0)}, 0, Vec<T>{}};
    for (int64_t v = 0; v < s.vocabulary; v += kChunk) {
      const int64_t entries = smaller(kChunk, s.vocabulary - v), scaled = v > 0 ? wide_ : 0;  // c: nothing before
      const bool last = v + kChunk >= s.vocabulary;
      const Block& then = last ? next : block;
      for (int64_t m = 0; m < block.count; ++m) {
        const char* ahead = m < then.count ? logits_at(s, then.rows[m], last ? 0 : v + kChunk) : nullptr;
        read_chunk(f_, block.rows[m], Place<S>{m, v, entries, c_.get() + m * c_row, scaled, ahead}, shared_, run_[m],
                   product_);
      }
      product_.multiply(block.count, block.group, v, entries, c_.get(), c_row);
    }
    for (int64_t m = 0; m < block.count; ++m) write_soft_row(f_, block.rows[m], run_[m], c_.get() + m * c_row, e_.get());
    for (int64_t n = block.begin; n < block.end && block.count < block.end - block.begin; ++n) {
      if (is_masked(s, n * s.groups + block.group)) write_mask_row<T>(f_, n * s.groups + block.group);
    }
  }

 private:
  const Forward& f_;
  Product product_;
  const int64_t wide_;
  const Scratch<S> c_;
  const Scratch<T> e_;
  const Scratch<Running<T>> run_;
  const ScaledExp<T> shared_;
};

template <class Product>
void forward_tasks(const Forward& f, int64_t begin, int64_t end) {
  ForwardRange<Product> range(f);
  for (int64_t task = begin; task < end; ++task) {
    range.run(Block(f, task), Block(f, smaller(task + 1, end - 1)));
  }
}

// The kernels of one product.
template <class Product>
constexpr ForwardKernels kKernels = {Product::packed_bytes, Product::pack, forward_tasks<Product>};

}  // namespace

const SoftEmbeddingForwardTable& soft_embedding_forward_table() {
  static constexpr SoftEmbeddingForwardTable table = {
      {kKernels<WideProduct<double, double>>, kKernels<WideProduct<float, float>>, kKernels<WideProduct<float, double>>,
#ifdef __AVX512BF16__
       kKernels<Bfloat16Product<1>>, kKernels<Bfloat16Product<2>>}};
#else
       {}, {}}};
#endif
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
