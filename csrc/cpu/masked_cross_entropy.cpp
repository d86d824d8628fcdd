// masked_cross_entropy on CPUs, forward and backward; compiled once per instruction set.
//
//   forward   loss = log(1 + rest) - (1 - e) s_y - (e / V) sum_v s_v,   s = z - max z
//   backward  dz = softmax(z) - (1 - e) 1_y - e / V, times the upstream gradient
//
// One read of the logits forward; one read and one write backward; N V exponentials each. In a row with p > 1/2 that
// entry's gradient is minus the sum of the others: it is the row's maximum, and rest < 1 says that there is one.

#include "softdimo/cpu/masked_cross_entropy.h"

#include "row_statistics.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// sum_v (z_v - top)
template <class T>
double sum_of_distances(const RowReader<T>& row, T top) {
  double sum = 0;
  for (int64_t v = 0; v < row.count; v += kRowChunk) {
    const int64_t entries = smaller(kRowChunk, row.count - v), whole = entries / kLanes<T> * kLanes<T>;
    const T* z = row.read(v, entries);
    Vec<T> part{};
    for (int64_t i = 0; i < whole; i += kLanes<T>) part += load(z + i) - top;
    sum += lane_sum<T>(part);
    for (int64_t i = whole; i < entries; ++i) sum += z[i] - top;
  }
  return sum;
}

template <class T>
double row_loss(const CrossEntropy& c, const RowReader<T>& row, int64_t target, T top, double rest) {
  double loss = ::log1p(rest) - (1 - c.smoothing) * static_cast<double>(row.entry(target) - top);
  if (c.smoothing != 0) loss -= c.smoothing / static_cast<double>(c.vocabulary) * sum_of_distances(row, top);
  return loss;
}

template <class T>
void forward(const CrossEntropyForward& f, int64_t begin, int64_t end) {
  const CrossEntropy& c = f.call;
  alignas(64) T chunk[kRowChunk];
  for (int64_t n = begin; n < end; ++n) {
    T* const row_max = static_cast<T*>(f.row_max) + n;
    T* const row_rest = static_cast<T*>(f.row_rest) + n;
    if (!c.counts(n)) {
      f.loss[n] = 0;
      *row_max = *row_rest = T(0);
      continue;
    }
    const RowReader<T> row{c.logits, c.logits_type, c.logits_rows.offset(n), c.vocabulary,
                           c.logits_rows.offset(smaller(n + 1, end - 1)), chunk};
    const RowTop<T> top = row_top(row);
    if (!(top.value - top.value == T(0)) || !c.target_fits(n)) {
      f.loss[n] = *row_max = *row_rest = NAN;
      continue;
    }
    const double rest = row_sums<T, false>(row, top, T(1)).rest;
    *row_max = top.value;
    *row_rest = static_cast<T>(rest);
    f.loss[n] = row_loss(c, row, c.targets[n], top.value, rest);
  }
}

// What a row's gradient is made of; `peak` is a value that one entry has, or +inf.
template <class T>
struct RowGradient {
  T top, scale, share, peak, upstream;
};

// The gradient of one chunk without the target's part, times upstream; returns its own sum without the peak.
template <class T>
double chunk_gradient(const RowGradient<T>& r, const T* z, int64_t entries, T* gradient) {
  constexpr int kParts = kChains<T>;
  const int64_t whole = entries / (kParts * kLanes<T>) * (kParts * kLanes<T>);
  Vec<T> others[kParts] = {};
  const auto write = [&](int64_t i) {
    const Vec<T> value = load(z + i);
    const Vec<T> g = exp_nonpositive(value - r.top) * r.scale - r.share;
    store(gradient + i, g * r.upstream);
    return value == r.peak ? Vec<T>{} : g;
  };
  for (int64_t i = 0; i < whole; i += kParts * kLanes<T>) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) others[part] += write(i + part * kLanes<T>);
  }
  double sum = sum_of_chains<T>(others);
  for (int64_t i = whole; i < entries; i += kLanes<T>) {
    const Vec<T> g = write(i);
    for (int j = 0; j < kLanes<T> && i + j < entries; ++j) sum += g[j];
  }
  return sum;
}

template <class T>
void row_backward(const CrossEntropyBackward& b, int64_t n, const RowReader<T>& row, T* gradient) {
  const CrossEntropy& c = b.call;
  const T top = static_cast<const T*>(b.row_max)[n], rest = static_cast<const T*>(b.row_rest)[n];
  const T upstream = static_cast<T>(static_cast<const T*>(b.grad)[n * b.grad_step] / b.factor);
  const T share = static_cast<T>(c.smoothing / static_cast<double>(c.vocabulary));
  const bool dominant = rest < T(1);
  const RowGradient<T> r{top, T(1) / (T(1) + rest), share, dominant ? top : T(HUGE_VAL), upstream};
  const int64_t target = c.target_fits(n) ? c.targets[n] : 0;  // a row without one is NaN
  const T hit = static_cast<T>(1 - c.smoothing);
  double others = 0;
  for (int64_t v = 0; v < c.vocabulary; v += kRowChunk) {
    const int64_t entries = smaller(kRowChunk, c.vocabulary - v);
    others += chunk_gradient(r, row.read(v, entries), entries, gradient);
    if (target >= v && target < v + entries) gradient[target - v] -= hit * upstream;
    narrow(gradient, entries, b.dlogits, c.logits_type, n * c.vocabulary + v);
  }
  if (!dominant) return;
  const int64_t peak = row_top(row).at;  // the row is in the cache
  if (peak != target) others -= static_cast<double>(hit);
  const double value = -others * static_cast<double>(upstream);
  narrow(&value, 1, b.dlogits, c.logits_type, n * c.vocabulary + peak);
}

template <class T>
void backward(const CrossEntropyBackward& b, int64_t begin, int64_t end) {
  const CrossEntropy& c = b.call;
  const int64_t bytes = c.vocabulary * size_of(c.logits_type);
  alignas(64) T chunk[kRowChunk], gradient[kRowChunk];
  for (int64_t n = begin; n < end; ++n) {
    if (!c.counts(n)) {
      std::memset(static_cast<char*>(b.dlogits) + n * bytes, 0, static_cast<size_t>(bytes));
      continue;
    }
    row_backward<T>(b, n, {c.logits, c.logits_type, c.logits_rows.offset(n), c.vocabulary,
                           c.logits_rows.offset(smaller(n + 1, end - 1)), chunk}, gradient);
  }
}

}  // namespace

const CrossEntropyTable& masked_cross_entropy_table() {
  static constexpr CrossEntropyTable table = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
