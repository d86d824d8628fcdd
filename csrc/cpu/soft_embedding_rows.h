// What forward and backward of soft_embedding share: rows of logits with their noise, by chunks of the vocabulary.
#pragma once

#include <cmath>

#include "exp_scaled.h"
#include "pack_bf16.h"
#include "random.h"
#include "simd.h"
#include "softdimo/cpu/soft_embedding.h"
#include "truncation.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Entries are taken two vectors at a time: what follows the last one is -inf.
template <class T>
constexpr int64_t kPair = 2 * kLanes<T>;

template <class T, class E>
SOFTDIMO_ALWAYS_INLINE void fetch_lines(const char* from, int64_t v) {
  if (from == nullptr) return;
  constexpr int64_t kLine = 64, kBytes = kPair<T> * static_cast<int64_t>(sizeof(E));
  for (int64_t i = 0; i < kBytes; i += kLine) __builtin_prefetch(from + v * static_cast<int64_t>(sizeof(E)) + i, 0, 2);
}

// Entries in memory, as vectors of the compute type. fetch() brings a pair of vectors elsewhere into the second-level
// cache: a hint, `from` may be null.
template <class T>
struct Entries {
  const T* data;
  SOFTDIMO_ALWAYS_INLINE void fetch(const char* from, int64_t v) const { fetch_lines<T, T>(from, v); }
  SOFTDIMO_ALWAYS_INLINE Vec<T> at(int64_t v) const { return load(data + v); }
  SOFTDIMO_ALWAYS_INLINE T one(int64_t v) const { return data[v]; }
};
struct Bfloat16Entries {
  const uint16_t* data;
  SOFTDIMO_ALWAYS_INLINE void fetch(const char* from, int64_t v) const { fetch_lines<float, uint16_t>(from, v); }
  SOFTDIMO_ALWAYS_INLINE Vec<float> at(int64_t v) const { return load_bfloat16(data + v); }
  SOFTDIMO_ALWAYS_INLINE float one(int64_t v) const { return from_bfloat16(data[v]); }
};

// body(v, y[v ..], y[v + lanes ..]) for the pairs of vectors of y[0 .. count).
template <class T, class Source, class Body>
SOFTDIMO_ALWAYS_INLINE void each_pair(const Source& y, int64_t count, const Body& body) {
  int64_t v = 0;
  for (; v + kPair<T> <= count; v += kPair<T>) body(v, y.at(v), y.at(v + kLanes<T>));
  if (v == count) return;
  alignas(64) T rest[kPair<T>];
  for (int64_t i = 0; i < kPair<T>; ++i) rest[i] = v + i < count ? y.one(v + i) : static_cast<T>(-HUGE_VAL);
  body(v, load(rest), load(rest + kLanes<T>));
}

// ---------------------------------------------------------------------------------------------------
// noise

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

// A number that is a sum of two.
template <class T>
struct Top {
  T high, low;
};

// A saved maximum as the sum of two.
template <class T>
Top<T> saved_top(double value) {
  const T high = static_cast<T>(value);
  return {high, value - value == 0.0 ? static_cast<T>(value - static_cast<double>(high)) : T(0)};
}

// ---------------------------------------------------------------------------------------------------
// rows

template <class T>
SOFTDIMO_ALWAYS_INLINE T row_temperature(const SoftEmbedding& s, int64_t row) {
  return s.row_temperature != nullptr ? static_cast<const T*>(s.row_temperature)[row] : static_cast<T>(s.temperature);
}

// A chunk of a row of logits whose entries need more than that: a copy in the compute type, truncated, noise added.
template <class T, int64_t kMost>
struct Staged {
  alignas(64) T y[kMost];
  alignas(64) T low[kMost];  // y + low is the value; written only with noise

  // Entries [first, first + count) of a row, then -inf. count <= kMost, first a multiple of 4.
  void read(const SoftEmbedding& s, int64_t row, int64_t first, int64_t count) {
    widen(s.logits, s.logits_type, s.logits_rows.offset(row) + first, count, y);
    const int64_t end = (count + kPair<T> - 1) / kPair<T> * kPair<T>;
    for (int64_t v = count; v < end; ++v) y[v] = static_cast<T>(-HUGE_VAL);
    if (s.row_threshold != nullptr) truncate(s, row, first, count);
    if (!s.noise) return;
    // y + g as a sum of two: one float32 cannot hold the noise beside large logits, and near ties decide the gradients
    // of nearly one-hot rows. float64 needs no low part: it is zero.
    alignas(64) T uniform[kMost];
    const uint64_t id = static_cast<uint64_t>(s.row_ids != nullptr ? s.row_ids[row] : row);
    fill_uniform(s.seed, id, s.offset, first, end, uniform);
    for (int64_t v = 0; v < end; v += kLanes<T>) add_noise(load(uniform + v), y + v, low + v);
  }

  // -inf for what is not kept.
  void truncate(const SoftEmbedding& s, int64_t row, int64_t first, int64_t count) {
    const T t = row_temperature<T>(s, row);
    for (int64_t v = 0; v < count; ++v) low[v] = y[v] / t;
    drop_entries<T>({static_cast<const T*>(s.row_threshold)[row], s.row_last[row]}, low, first, count, y);
  }

  // Turns y into the distances to the top: with noise exact where they are small.
  void subtract(bool noise, Top<T> top, int64_t count) {
    for (int64_t v = 0; v < count; v += kLanes<T>) {
      const Vec<T> high = load(y + v) - top.high;
      store(y + v, noise ? high + (load(low + v) - top.low) : high);
    }
  }

  // The greatest low part among the entries with y = high.
  T greatest_low(int64_t count, T high) const {
    Vec<T> best = splat(static_cast<T>(-HUGE_VAL));
    for (int64_t v = 0; v < count; v += kLanes<T>) {
      const Vec<T> next = load(low + v);
      best = (load(y + v) == high) & (next > best) ? next : best;
    }
    return lane_max<T>(best);
  }
};

SOFTDIMO_ALWAYS_INLINE bool as_given(const SoftEmbedding& s) { return !s.noise && s.row_threshold == nullptr; }

// Whether a row's entries are taken from memory as they are, or a conversion away.
template <class T>
SOFTDIMO_ALWAYS_INLINE bool reads_in_place(const SoftEmbedding& s) {
  return as_given(s) && s.logits_type == (sizeof(T) == sizeof(double) ? DType::float64 : DType::float32);
}
template <class T>
SOFTDIMO_ALWAYS_INLINE bool reads_bfloat16(const SoftEmbedding& s) {
  return sizeof(T) == sizeof(float) && as_given(s) && s.logits_type == DType::bfloat16;
}

SOFTDIMO_ALWAYS_INLINE const char* logits_at(const SoftEmbedding& s, int64_t row, int64_t first) {
  return static_cast<const char*>(s.logits) + (s.logits_rows.offset(row) + first) * size_of(s.logits_type);
}

// The exponentials of one row; `shared` are those of the scalar temperature.
template <class T>
SOFTDIMO_ALWAYS_INLINE ScaledExp<T> row_exp(const SoftEmbedding& s, int64_t row, const ScaledExp<T>& shared) {
  return s.row_temperature != nullptr ? ScaledExp<T>(row_temperature<T>(s, row)) : shared;
}

SOFTDIMO_ALWAYS_INLINE bool is_masked(const SoftEmbedding& s, int64_t row) { return s.mask != nullptr && s.mask[row]; }

// Collects the rows of positions [begin, end) in one group that are not masked.
SOFTDIMO_ALWAYS_INLINE int64_t soft_rows(const SoftEmbedding& s, int64_t group, int64_t begin, int64_t end,
                                         int64_t* rows) {
  int64_t count = 0;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n * s.groups + group;
    if (!is_masked(s, row)) rows[count++] = row;
  }
  return count;
}

// ---------------------------------------------------------------------------------------------------
// the codebook

// Columns [first, first + count) of the entry that starts `source` elements into the codebook.
template <class T>
SOFTDIMO_ALWAYS_INLINE void read_codebook(const SoftEmbedding& s, int64_t source, int64_t first, int64_t count, T* out) {
  const int64_t step = s.codebook_stride[2];
  if (step == 1) return widen(s.codebook, s.codebook_type, source + first, count, out);
  for (int64_t d = 0; d < count; ++d) widen(s.codebook, s.codebook_type, source + (first + d) * step, 1, out + d);
}

// One group's codebook [V, D] for the packing of bfloat16 products.
SOFTDIMO_ALWAYS_INLINE Table group_table(const SoftEmbedding& s, int64_t group) {
  return {s.codebook, s.codebook_type, group * s.codebook_stride[0], s.codebook_stride[1], s.codebook_stride[2]};
}

// ---------------------------------------------------------------------------------------------------
// sums in S: double where the codebook is narrow (sums_in_double), else T

// Stores a vector as S.
template <class S, class T>
SOFTDIMO_ALWAYS_INLINE void store_as(S* out, Vec<T> v) {
  if constexpr (sizeof(S) == sizeof(T)) {
    store(out, v);
  } else {
    typedef T Half __attribute__((vector_size(SOFTDIMO_SIMD_BYTES / 2), aligned(alignof(T)), may_alias));
    T lanes[kLanes<T>];
    store(lanes, v);
    store(out, __builtin_convertvector(*reinterpret_cast<const Half*>(lanes), Vec<S>));
    store(out + kLanes<S>, __builtin_convertvector(*reinterpret_cast<const Half*>(lanes + kLanes<S>), Vec<S>));
  }
}

// n elements as S; the vectors of the last ones may reach beyond them.
template <class S, class T>
SOFTDIMO_ALWAYS_INLINE void copy_as(const T* source, int64_t n, S* out) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store_as<S, T>(out + i, load(source + i));
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
