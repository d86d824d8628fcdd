// soft_embedding on CPUs for tiny vocabularies, forward and backward in float32; compiled once per instruction set.
//
//   e[n] = sum_v p[n, v] E[v],  p = softmax(logits / T)
//   dp[n, v] = g[n] . E[v];  dlogits = p (dp - g . e) / T;  dE[v] = sum_n p[n, v] g[n]
//
// With R rows, V <= 256 entries, D <= 16 columns and s bytes per logit:
//   s R V bytes read, 2 R V D FLOP, R V exponentials; backward 2 s R V bytes, 4 R V D FLOP, R V exponentials
//   floor  max(bytes / read or copy rate, (R V D (backward 2 R V D) + 14 R V) / (lanes x 2 operations a cycle))
//
// The codebook lies transposed in the first-level cache: a row's probabilities stay in registers while they are
// multiplied with one column after another. No row is multiplied with fewer than a vector of entries, and no sum has a
// chain of more than V / lanes roundings (forward), or of the rows of kFlushBlocks blocks (gradient of the codebook,
// then in double).
//
// Entries of a row with p > 1/2 get minus the sum of the row's other gradients, as in soft_embedding_backward.cpp.

#include "soft_embedding_tiny.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

int64_t packed_bytes(const SoftEmbedding& s) {
  return s.groups * s.width * whole_row(s) * static_cast<int64_t>(sizeof(float));
}

void pack(const SoftEmbedding& s, void* packed, int64_t begin, int64_t end) {
  const int64_t row = whole_row(s);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / s.vocabulary, v = i % s.vocabulary;
    float entry[kTinyWidth];
    read_codebook(s, group * s.codebook_stride[0] + v * s.codebook_stride[1], 0, s.width, entry);
    float* out = static_cast<float*>(packed) + group * s.width * row;
    for (int64_t d = 0; d < s.width; ++d) {
      out[d * row + v] = entry[d];
      for (int64_t rest = v + 1; v == s.vocabulary - 1 && rest < row; ++rest) out[d * row + rest] = 0.0f;
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// forward

// By lane: the sums of p~ E[:, d] for every column d, then that of p~ = exp((y - top) / t).
template <class Exp>
void row_sums(const float* y, float top, const Exp& exp, const float* columns, int64_t entries, int64_t width,
              Vec<float>* sums) {
  each_piece(entries, [&](auto count, int64_t first) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    Vec<float> p[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = exp(load(y + first + i * kLane) - top);
    for (int64_t d = 0; d < width; ++d) {
      const float* column = columns + d * entries + first;
      Vec<float> sum = p[0] * load(column);
#pragma GCC unroll 8
      for (int i = 1; i < kCount; ++i) sum += p[i] * load(column + i * kLane);
      sums[d] = first > 0 ? sums[d] + sum : sum;
    }
#pragma GCC unroll 3
    for (int half = kCount / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
      for (int i = 0; i < half; ++i) p[i] += p[i + half];
    }
    sums[width] = first > 0 ? sums[width] + p[0] : p[0];
  });
}

class ForwardTasks {
 public:
  explicit ForwardTasks(const Forward& f)
      : f_(f), entries_(whole_row(f.call)), sums_(f.call.width + 1), shared_(static_cast<float>(f.call.temperature)),
        stage_(kTinyRows * entries_), vectors_(kTinyRows * sums_), folded_(kTinyRows * sums_ + kLane),
        value_(kTinyRows * f.call.width + kLane) {}

  void run(int64_t begin, int64_t end) {
    const SoftEmbedding& s = f_.call;
    int64_t rows[kTinyRows], count = 0;
    for (int64_t row = begin; row < end; ++row) {
      if (!is_masked(s, row)) rows[count++] = row;
    }
    const float* y[kTinyRows];
    alignas(64) float top[kTinyRows];
    find_tops(rows, count, y, top);
    for (int64_t m = 0; m < count; ++m) {
      prefetch_row(s, smaller(rows[m] + kTinyRows, s.rows - 1));
      row_exp(s, rows[m], shared_).with_kind([&](const auto& exp) {
        row_sums(y[m], top[m], exp, packed_columns(s, rows[m] % s.groups), entries_, s.width,
                 vectors_.get() + m * sums_);
      });
    }
    for (int64_t i = count * sums_; i % kLane != 0; ++i) vectors_[i] = Vec<float>{};
    fold_all(vectors_.get(), (count * sums_ + kLane - 1) / kLane * kLane,
             [](Vec<float> a, Vec<float> b) { return a + b; }, folded_.get());
    write(begin, end, top);
  }

 private:
  void find_tops(const int64_t* rows, int64_t count, const float** y, float* top) {
    Vec<float> best[kTinyRows];
    for (int64_t m = 0; m < count; ++m) {
      y[m] = read_row(f_.call, rows[m], stage_.get() + m * entries_);
      best[m] = splat(static_cast<float>(-HUGE_VAL));
      for (int64_t v = 0; v < entries_; v += kLane) best[m] = greater(load(y[m] + v), best[m]);
    }
    for (int64_t m = count; m < kTinyRows; ++m) best[m] = Vec<float>{};
    fold_all(best, kTinyRows, greater, top);
  }

  void write(int64_t begin, int64_t end, const float* top) {
    const SoftEmbedding& s = f_.call;
    const int64_t width = s.width;
    const float* folded = folded_.get();
    for (int64_t row = begin; row < end; ++row) {
      const bool masked = is_masked(s, row);
      const float sum = masked ? 1.0f : folded[width], scale = masked ? 0.0f : 1.0f / sum;
      float* value = value_.get() + (row - begin) * width;
      for (int64_t d = 0; d < width; d += kLane) {  // beyond the row: the next one comes later
        store(value + d, masked ? Vec<float>{} : load(folded + d) * scale);
      }
      f_.row_max[row] = masked ? 0.0 : static_cast<double>(*top);
      static_cast<float*>(f_.row_sum)[row] = sum;
      top += masked ? 0 : 1;
      folded += masked ? 0 : sums_;
    }
    const int64_t first = begin * width, size = (end - begin) * width;
    if (f_.soft != nullptr) std::memcpy(static_cast<float*>(f_.soft) + first, value_.get(), size * sizeof(float));
    for (int64_t row = begin; row < end && s.mask != nullptr; ++row) {
      const float* embedding = static_cast<const float*>(s.mask_embedding) + row % s.groups * width;
      if (s.mask[row]) std::memcpy(value_.get() + (row - begin) * width, embedding, width * sizeof(float));
    }
    narrow(value_.get(), size, f_.output, s.codebook_type, first);
  }

  const Forward& f_;
  const int64_t entries_, sums_;  // of a row
  const ScaledExp<float> shared_;
  const Scratch<float> stage_;
  const Scratch<Vec<float>> vectors_;
  const Scratch<float> folded_, value_;
};

void forward(const Forward& f, int64_t begin, int64_t end) {
  ForwardTasks tasks(f);
  for (int64_t task = begin; task < end; ++task) {
    tasks.run(task * kTinyRows, smaller((task + 1) * kTinyRows, f.call.rows));
  }
}

// ---------------------------------------------------------------------------------------------------
// backward

constexpr int64_t kBlockPositions = 32;  // rows of a block, of all groups together, but at least one position
constexpr int64_t kFlushBlocks = 4;      // blocks whose sums are taken in float

// sums [columns, entries] += g^T p~ over rows that lie g_row and p_row apart.
template <int kColumns, int kVectors>
void add_products(const float* g, int64_t g_row, const float* p, int64_t p_row, int64_t rows, float* sums,
                  int64_t entries) {
  Vec<float> sum[kColumns][kVectors];
  for (int c = 0; c < kColumns; ++c) {
    for (int i = 0; i < kVectors; ++i) sum[c][i] = load(sums + c * entries + i * kLane);
  }
  for (int64_t row = 0; row < rows; ++row, g += g_row, p += p_row) {
    Vec<float> part[kVectors];
    for (int i = 0; i < kVectors; ++i) part[i] = load(p + i * kLane);
    for (int c = 0; c < kColumns; ++c) {
      for (int i = 0; i < kVectors; ++i) sum[c][i] += g[c] * part[i];
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    for (int i = 0; i < kVectors; ++i) store(sums + c * entries + i * kLane, sum[c][i]);
  }
}

template <int kVectors>
auto products_of(int64_t columns) {
  return columns == 1   ? add_products<1, kVectors>
         : columns == 2 ? add_products<2, kVectors>
         : columns == 3 ? add_products<3, kVectors>
                        : add_products<4, kVectors>;
}

class BackwardSplits {
 public:
  explicit BackwardSplits(const Backward& b)
      : b_(b), entries_(whole_row(b.call)), p_row_(entries_ + kPad), table_(b.call.groups * b.call.width * entries_),
        rows_(b.call.groups > kBlockPositions ? b.call.groups : kBlockPositions / b.call.groups * b.call.groups),
        shared_(static_cast<float>(b.call.temperature)), stage_(entries_), gradient_(entries_), p_(rows_ * p_row_),
        g_(rows_ * b.call.width), sums_(table_), totals_(table_) {}

  void run(int64_t split) {
    const SoftEmbedding& s = b_.call;
    const int64_t part = split_rows(b_) * s.groups, last = smaller((split + 1) * part, s.rows);
    clear(sums_.get(), table_);
    clear(totals_.get(), table_);
    int64_t blocks = 0;
    for (int64_t begin = split * part; begin < last; begin += rows_) {
      const int64_t end = smaller(begin + rows_, last);
      for (int64_t row = begin; row < end; ++row) read_gradient(row, row - begin);
      if (b_.dcodebook == nullptr) continue;
      for (int64_t group = 0; group < s.groups; ++group) add_rows(group, (end - begin) / s.groups);
      if (++blocks % kFlushBlocks == 0) flush();
    }
    if (b_.dcodebook == nullptr) return;
    flush();
    write(static_cast<double*>(b_.dcodebook) + split * s.groups * s.vocabulary * s.width);
  }

 private:
  template <class T>
  static void clear(T* data, int64_t count) {
    std::memset(data, 0, static_cast<size_t>(count) * sizeof(T));
  }

  // p~ and g / sum of row m of the block, and its gradient.
  void read_gradient(int64_t row, int64_t m) {
    const SoftEmbedding& s = b_.call;
    prefetch_row(s, smaller(row + kTinyRows, s.rows - 1));
    float *p = p_.get() + m * p_row_, *g = g_.get() + m * s.width;
    if (is_masked(s, row)) {
      clear(p, entries_);
      clear(g, s.width);
      if (b_.dlogits == nullptr) return;
      const int64_t size = size_of(s.logits_type);
      return clear(static_cast<char*>(b_.dlogits) + row * s.vocabulary * size, s.vocabulary * size);
    }
    widen(b_.grad, s.codebook_type, row * s.width, s.width, g);
    const float scale = 1.0f / static_cast<const float*>(b_.row_sum)[row];
    const float* e = static_cast<const float*>(b_.soft) + row * s.width;
    double delta = 0;
    for (int64_t d = 0; d < s.width; ++d) delta += static_cast<double>(g[d]) * static_cast<double>(e[d]);
    for (int64_t d = 0; d < s.width; ++d) g[d] *= scale;
    const bool direct = b_.dlogits != nullptr && s.logits_type == DType::float32 && entries_ == s.vocabulary;
    float* out = direct ? static_cast<float*>(b_.dlogits) + row * s.vocabulary : gradient_.get();
    const float top = static_cast<float>(b_.row_max[row]);
    row_exp(s, row, shared_).with_kind([&](const auto& exp) {
      row_gradient(row, exp, top, static_cast<float>(delta) * scale, g, p, out);
    });
    if (b_.dlogits == nullptr) return;
    if (scale > 0.5f) write_peak(scale, p, out);
    if (!direct) narrow(out, s.vocabulary, b_.dlogits, s.logits_type, row * s.vocabulary);
  }

  // g and delta are divided by the sum of p~.
  template <class Exp>
  void row_gradient(int64_t row, const Exp& exp, float top, float delta, const float* g, float* p, float* out) {
    const SoftEmbedding& s = b_.call;
    const float* y = read_row(s, row, stage_.get());
    const float* columns = packed_columns(s, row % s.groups);
    each_piece(entries_, [&](auto count, int64_t first) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      Vec<float> dp[kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) dp[i] = splat(-delta);
      for (int64_t d = 0; d < s.width; ++d) {
        const float* column = columns + d * entries_ + first;
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) dp[i] += g[d] * load(column + i * kLane);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Vec<float> part = exp(load(y + first + i * kLane) - top);
        store(p + first + i * kLane, part);
        store(out + first + i * kLane, exp.over_t(part * dp[i]));
      }
    });
  }

  // The entry with p > 1/2 gets minus the sum of the others.
  void write_peak(float scale, const float* p, float* out) {
    Vec<float> others{};
    for (int64_t v = 0; v < entries_; v += kLane) others += load(p + v) * scale > 0.5f ? Vec<float>{} : load(out + v);
    const float peak = -lane_sum<float>(others);
    for (int64_t v = 0; v < entries_; v += kLane) {
      store(out + v, load(p + v) * scale > 0.5f ? splat(peak) : load(out + v));
    }
  }

  // The block's p~^T g of one group.
  void add_rows(int64_t group, int64_t positions) {
    const SoftEmbedding& s = b_.call;
    const int64_t g_row = s.groups * s.width, p_row = s.groups * p_row_;
    for (int64_t d = 0; d < s.width; d += 4) {
      const float *g = g_.get() + group * s.width + d, *p = p_.get() + group * p_row_;
      float* sums = sums_.get() + (group * s.width + d) * entries_;
      int64_t v = 0;
      for (; v + 4 * kLane <= entries_; v += 4 * kLane) {
        products_of<4>(s.width - d)(g, g_row, p + v, p_row, positions, sums + v, entries_);
      }
      for (; v < entries_; v += kLane) {
        products_of<1>(s.width - d)(g, g_row, p + v, p_row, positions, sums + v, entries_);
      }
    }
  }

  void flush() {
    for (int64_t i = 0; i < table_; ++i) totals_[i] += static_cast<double>(sums_[i]);
    clear(sums_.get(), table_);
  }

  void write(double* out) const {
    const SoftEmbedding& s = b_.call;
    for (int64_t group = 0; group < s.groups; ++group) {
      const double* totals = totals_.get() + group * s.width * entries_;
      for (int64_t v = 0; v < s.vocabulary; ++v) {
        for (int64_t d = 0; d < s.width; ++d) *out++ = totals[d * entries_ + v];
      }
    }
  }

  const Backward& b_;
  const int64_t entries_, p_row_, table_, rows_;
  const ScaledExp<float> shared_;
  const Scratch<float> stage_, gradient_, p_, g_, sums_;  // sums and totals: [G, D, entries]
  const Scratch<double> totals_;
};

void backward(const Backward& b, int64_t begin, int64_t end) {
  BackwardSplits splits(b);
  for (int64_t split = begin; split < end; ++split) splits.run(split);
}

}  // namespace

const SoftEmbeddingTinyTable& soft_embedding_tiny_table() {
  static constexpr SoftEmbeddingTinyTable table = {packed_bytes, pack, forward, backward};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
