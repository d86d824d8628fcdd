// soft_embedding on CPUs, backward; compiled once per instruction set.
//
//   dp[n, v] = g[n] . E[v];  dlogits = p (dp - g . e) / T;  dE[v] = sum_n p[n, v] g[n]
//
// With R rows, V entries, D columns and s bytes per logit:
//   2 s R V bytes, 4 R V D FLOP (2 with only one of the two gradients), R V exponentials
//   floor  max(bytes / copy rate, FLOP / multiply-add rate + exponentials / exp rate)
//
// One task is a slice of the vocabulary x a part of the rows, so that a codebook gradient has one owner and no sum
// depends on the number of threads:
//
//     dp [rows, slice] = G E^T;  p, dlogits from logits, max, sum, delta;  dE [slice, D] += p^T G
//
// The logits of a block are fetched while dp is multiplied, the next rows of G while dE is.
//
// Three rules keep nearly one-hot rows exact: max and sum are saved apart; delta = g . e uses the wide e; the entry
// with p > 1/2 gets minus the sum of the other gradients, written by finish_rows. The slope along the temperature is
// taken about the mean of y.

#include "soft_embedding_backward_products.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------
// one slice of one row

// `count` gradients of logits, written in their own type: E is T, or uint16_t for bfloat16.
template <class T, class E>
struct Gradients {
  E* out;
  int64_t count;

  SOFTDIMO_ALWAYS_INLINE void put(int64_t v, Vec<T> first, Vec<T> second) const {
    if (v + kPair<T> <= count) return write(out + v, first, second);
    E rest[kPair<T>];
    write(rest, first, second);
    std::memcpy(out + v, rest, static_cast<size_t>(count - v) * sizeof(E));
  }
  static SOFTDIMO_ALWAYS_INLINE void write(E* to, Vec<T> first, Vec<T> second) {
    if constexpr (sizeof(E) == sizeof(T)) {
      store(to, first);
      store(to + kLanes<T>, second);
    } else if constexpr (kHasBfloat16Product) {
      store_left(first, second, to);
    } else {
      store_bfloat16(to, first);
      store_bfloat16(to + kLanes<T>, second);
    }
  }
};

// What the forward left of a row.
template <class T>
struct SavedRow {
  ScaledExp<T> exp;
  Top<T> top;
  T scale, delta;  // 1 / sum; g . e
  bool peaked;     // one entry has p > 1/2: then it is the maximum, whose p is scale

  SavedRow(const Backward& b, int64_t row, const ScaledExp<T>& shared)
      : exp(row_exp(b.call, row, shared)), top(saved_top<T>(b.row_max[row])),
        scale(T(1) / static_cast<const T*>(b.row_sum)[row]), delta(static_cast<const T*>(b.delta)[row]),
        peaked(scale > T(0.5)) {}
};

// p and dlogits from y, dp and the saved statistics; returns the sum of dlogits without the entry of p > 1/2. `kept`
// gets p too, where it is not null.
template <class Product, class T, class Source, class E>
SOFTDIMO_ALWAYS_INLINE T entry_gradients(const Source& y, T top, const SavedRow<T>& row, const T* dp, int64_t m,
                                         Product* product, T* kept, const Gradients<T, E>& out) {
  const ScaledExp<T> exp = row.exp;
  const T scale = row.scale, delta = row.delta;
  const bool peaked = row.peaked;
  Vec<T> others{};
  each_pair<T>(y, out.count, [&](int64_t v, Vec<T> a, Vec<T> b) __attribute__((always_inline)) {
    a = exp(a - top) * scale;
    b = exp(b - top) * scale;
    if (product != nullptr) product->put(m, v, a, b);
    if (kept != nullptr) {
      store(kept + v, a);
      store(kept + v + kLanes<T>, b);
    }
    const Vec<T> da = exp.over_t(a * (load(dp + v) - delta));
    const Vec<T> db = exp.over_t(b * (load(dp + v + kLanes<T>) - delta));
    out.put(v, da, db);
    if (peaked) others += (a > T(0.5) ? Vec<T>{} : da) + (b > T(0.5) ? Vec<T>{} : db);
  });
  return lane_sum<T>(others);
}

// The slope of a row's slice, about the slice's mean distance: about the maximum, terms several times as large would
// cancel, and an error that all of (dp - delta) share would stay.
template <class T>
void add_slope(const T* p, const T* dz, const T* distance, int64_t count, RowPartial<T>& partial) {
  Vec<T> mass{}, moment{}, residual{}, slope{};
  for (int64_t v = 0; v < count; v += kLanes<T>) {
    const Vec<T> share = load(p + v);
    mass += share;
    moment += share == T(0) ? Vec<T>{} : share * load(distance + v);  // no mass: the distance may be infinite
  }
  partial.mass = lane_sum<T>(mass);
  partial.centre = partial.mass > T(0) ? lane_sum<T>(moment) / partial.mass : T(0);
  for (int64_t v = 0; v < count; v += kLanes<T>) {
    const Vec<T> gradient = load(dz + v);
    residual += gradient;
    slope += load(p + v) == T(0) ? Vec<T>{} : gradient * (load(distance + v) - partial.centre);
  }
  partial.residual = lane_sum<T>(residual);
  partial.slope = lane_sum<T>(slope);
}

// The entry at the maximum, or -1.
template <class T, class Source>
int64_t peak_of(const Source& y, T top, int64_t count) {
  for (int64_t v = 0; v < count; ++v) {
    if (y.one(v) == top) return v;
  }
  return -1;
}

// ---------------------------------------------------------------------------------------------------
// tasks

template <class Product>
class BackwardRange {
 public:
  using T = typename Product::T;
  using S = typename Product::S;

  explicit BackwardRange(const Backward& b) : b_(b), product_(b), shared_(static_cast<T>(b.call.temperature)) {}

  void run(const Slice& slice) {
    const SoftEmbedding& s = b_.call;
    const int64_t blocks = split_blocks(b_), first = (slice.group * b_.splits + slice.split) * blocks;
    bool any = false;
    for (int64_t i = 0; i < blocks; ++i) {
      const Block block(b_, slice.group, slice.split, i);
      clear_masked(slice, block);
      if (block.count == 0) continue;
      if (wants_entries()) multiply_codebook(slice, block, first + i);
      for (int64_t m = 0; m < block.count; ++m) row_gradient(slice, block.rows[m], m);
      if (b_.dcodebook == nullptr) continue;
      multiply_rows(slice, block, first + i, i + 1 < blocks, any);
      any = true;
    }
    if (b_.dcodebook == nullptr) return;
    S* out = static_cast<S*>(b_.dcodebook) +
             ((slice.split * s.groups + slice.group) * s.vocabulary + slice.first) * s.width;
    if (any) return product_.write(slice, out);
    std::memset(out, 0, static_cast<size_t>(slice.count * s.width) * sizeof(S));
  }

 private:
  bool wants_entries() const { return b_.dlogits != nullptr || b_.dtemperature != nullptr; }

  void multiply_codebook(const Slice& slice, const Block& block, int64_t index) {
    const void* addresses[kBlockRows];
    for (int64_t m = 0; m < block.count; ++m) addresses[m] = logits_at(b_.call, block.rows[m], slice.first);
    Prefetch logits(addresses, block.count, slice.count * size_of(b_.call.logits_type));
    product_.multiply_codebook(slice, index, block.count, &logits);
  }

  void multiply_rows(const Slice& slice, const Block& block, int64_t index, bool more, bool add) {
    constexpr int64_t kPiece = 4096, kMost = 512;
    const void* addresses[kMost];
    const int64_t bytes = more ? Product::block_bytes(b_) : 0;
    int64_t count = 0;
    for (int64_t at = 0; at < bytes && count < kMost; at += kPiece) {
      addresses[count++] = Product::upstream_at(b_, index + 1) + at;
    }
    Prefetch upstream(addresses, count, smaller(kPiece, bytes));
    product_.multiply_rows(slice, index, block.count, add, &upstream);
  }

  void clear_masked(const Slice& slice, const Block& block) {
    const SoftEmbedding& s = b_.call;
    if (b_.dlogits == nullptr || block.count == block.end - block.begin) return;
    for (int64_t n = block.begin; n < block.end; ++n) {
      const int64_t row = n * s.groups + slice.group;
      if (is_masked(s, row)) std::memset(gradients_at(row, slice), 0, slice.count * size_of(s.logits_type));
    }
  }

  char* gradients_at(int64_t row, const Slice& slice) const {
    return static_cast<char*>(b_.dlogits) + (row * b_.call.vocabulary + slice.first) * size_of(b_.call.logits_type);
  }

  RowPartial<T>& partial(const Slice& slice, int64_t row) {
    return static_cast<RowPartial<T>*>(b_.partials)[slice.index * b_.call.rows + row];
  }

  void row_gradient(const Slice& slice, int64_t row, int64_t m) {
    const SoftEmbedding& s = b_.call;
    const SavedRow<T> saved(b_, row, shared_);
    const char* logits = logits_at(s, row, slice.first);
    if (b_.dtemperature == nullptr && b_.dlogits != nullptr) {
      if (reads_in_place<T>(s)) {
        const Entries<T> y{reinterpret_cast<const T*>(logits)};
        return in_place(y, slice, row, m, saved, reinterpret_cast<T*>(gradients_at(row, slice)));
      }
      if constexpr (sizeof(T) == sizeof(float)) {
        if (reads_bfloat16<T>(s)) {
          const Bfloat16Entries y{reinterpret_cast<const uint16_t*>(logits)};
          return in_place(y, slice, row, m, saved, reinterpret_cast<uint16_t*>(gradients_at(row, slice)));
        }
      }
    }
    staged(slice, row, m, saved);
  }

  template <class Source, class E>
  void in_place(const Source& y, const Slice& slice, int64_t row, int64_t m, const SavedRow<T>& saved, E* dlogits) {
    Product* product = b_.dcodebook != nullptr ? &product_ : nullptr;
    const T others = entry_gradients(y, saved.top.high, saved, product_.dp(m), m, product, static_cast<T*>(nullptr),
                                     Gradients<T, E>{dlogits, slice.count});
    if (saved.peaked) write_peak(slice, row, others, peak_of<T>(y, saved.top.high, slice.count));
  }

  void write_peak(const Slice& slice, int64_t row, T others, int64_t peak) {
    partial(slice, row).others = others;
    partial(slice, row).peak = peak < 0 ? -1 : slice.first + peak;
  }

  // By way of copies in the compute type: noise, other types, the temperature's gradient, no gradient of the logits.
  void staged(const Slice& slice, int64_t row, int64_t m, const SavedRow<T>& saved) {
    const SoftEmbedding& s = b_.call;
    Staged<T, kVocabularyChunk> chunk;
    chunk.read(s, row, slice.first, slice.count);
    const int64_t end = whole_panels(slice.count, kPair<T>);
    chunk.subtract(s.noise, saved.top, end);
    const Entries<T> distance{chunk.y};
    Product* product = b_.dcodebook != nullptr ? &product_ : nullptr;
    if (!wants_entries()) {
      each_pair<T>(distance, end, [&](int64_t v, Vec<T> a, Vec<T> b) {
        product->put(m, v, saved.exp(a) * saved.scale, saved.exp(b) * saved.scale);
      });
      return;
    }
    alignas(64) T p[kVocabularyChunk], dz[kVocabularyChunk];
    const T others = entry_gradients(distance, T(0), saved, product_.dp(m), m, product, p, Gradients<T, T>{dz, end});
    if (saved.peaked) write_peak(slice, row, others, peak_of<T>(distance, T(0), slice.count));
    if (b_.dtemperature != nullptr) add_slope(p, dz, chunk.y, end, partial(slice, row));
    if (b_.dlogits == nullptr) return;
    narrow(dz, slice.count, b_.dlogits, s.logits_type, row * s.vocabulary + slice.first);
  }

  const Backward& b_;
  Product product_;
  const ScaledExp<T> shared_;
};

template <class Product>
void backward_tasks(const Backward& b, int64_t begin, int64_t end) {
  const int64_t tiles = (b.call.vocabulary + b.tile - 1) / b.tile;
  BackwardRange<Product> range(b);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % tiles, first = index * b.tile;
    range.run({task / tiles / b.splits, task / tiles % b.splits, index, first,
               smaller(b.tile, b.call.vocabulary - first)});
  }
}

// delta[n] = g[n] . e[n], with e in the compute type; and G for the products.
template <class Product>
void pack_upstream(const Backward& b, int64_t begin, int64_t end) {
  using T = typename Product::T;
  const SoftEmbedding& s = b.call;
  const int64_t blocks = split_blocks(b);
  const Scratch<T> g(s.width);
  for (int64_t i = begin; i < end; ++i) {
    const Block block(b, i / blocks / b.splits, i / blocks % b.splits, i % blocks);
    for (int64_t m = 0; m < block.count; ++m) {
      const int64_t row = block.rows[m];
      widen(b.grad, s.codebook_type, row * s.width, s.width, g.get());
      Product::pack_row(b, i, m, g.get());
      static_cast<T*>(b.delta)[row] =
          static_cast<T>(dot(g.get(), static_cast<const T*>(b.soft) + row * s.width, s.width));
    }
    Product::pack_block(b, i, block.count);
  }
}

template <class Product>
constexpr BackwardKernels kKernels = {Product::packed_bytes, Product::pack, Product::upstream_bytes,
                                      pack_upstream<Product>, backward_tasks<Product>};

}  // namespace

const SoftEmbeddingBackwardTable& soft_embedding_backward_table() {
  static constexpr SoftEmbeddingBackwardTable table = {
      {kKernels<WideProduct<double, double>>, kKernels<WideProduct<float, float>>, kKernels<WideProduct<float, double>>,
#ifdef __AVX512BF16__
       kKernels<Bfloat16Product<1>>, kKernels<Bfloat16Product<2>>}};
#else
       {}, {}}};
#endif
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
