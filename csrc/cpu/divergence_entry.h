// Rows and entries of the divergences: how logits are read, and what one entry contributes. See divergence.cpp.
#pragma once

#include <cmath>

#include "simd.h"
#include "softdimo/cpu/divergence.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

template <class T>
constexpr int64_t kChunk = 32 * kLanes<T>;  // entries that are read at a time; sums over chunks are in double
template <class T>
constexpr DType kType = sizeof(T) == 8 ? DType::float64 : DType::float32;
template <class T>
constexpr T kInfinity = static_cast<T>(HUGE_VAL);
template <class T>
constexpr T kNothing = static_cast<T>(__builtin_nan(""));
template <class T>
constexpr T kFar = T(1e30);  // scaled logits and log ratios end here: 0 times such a one is 0

SOFTDIMO_ALWAYS_INLINE bool is_finite(double x) { return x - x == 0; }

template <class T>
SOFTDIMO_ALWAYS_INLINE constexpr int64_t padded(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A sum in double of vectors, by lane.
template <class T>
struct Total {
  double lane[kLanes<T>] = {};

  SOFTDIMO_ALWAYS_INLINE void add(Vec<T> v) {
    T part[kLanes<T>];
    store(part, v);
    for (int i = 0; i < kLanes<T>; ++i) lane[i] += static_cast<double>(part[i]);
  }
  SOFTDIMO_ALWAYS_INLINE double sum() const {
    double part[kLanes<T>];
    std::memcpy(part, lane, sizeof part);
    for (int width = kLanes<T> / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) part[i] += part[i + width];
    }
    return part[0];
  }
};

// ---------------------------------------------------------------------------------------------------
// reading rows

template <class T>
struct Row {
  int64_t index;
  const char *teacher, *uncond, *model;  // its first logits
  T guidance;
};

SOFTDIMO_ALWAYS_INLINE int64_t row_index(const Divergence& s, int64_t i) {
  return s.counted != nullptr ? s.counted[i] : i;
}

SOFTDIMO_ALWAYS_INLINE const char* first_logit(const LogitRows& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + logits.rows.offset(row) * size_of(logits.type);
}

template <class T>
SOFTDIMO_ALWAYS_INLINE Row<T> find_row(const Divergence& s, int64_t row) {
  Row<T> found{row, first_logit(s.teacher, row), nullptr, first_logit(s.model, row), T(1)};
  if (s.uncond.data == nullptr) return found;
  found.uncond = first_logit(s.uncond, row);
  found.guidance = s.row_guidance != nullptr ? static_cast<const T*>(s.row_guidance)[row] : static_cast<T>(s.guidance);
  return found;
}

// Room for one chunk, where it cannot be read or written in place.
template <class T>
struct Buffers {
  alignas(64) T teacher[kChunk<T>];
  alignas(64) T uncond[kChunk<T>];
  alignas(64) T model[kChunk<T>];
};

// Entries [first, first + count) of a row as T, then -inf up to padded(count).
template <class T>
SOFTDIMO_ALWAYS_INLINE const T* read(const char* row, DType type, int64_t first, int64_t count, T* copy) {
  if (type == kType<T> && count % kLanes<T> == 0) return reinterpret_cast<const T*>(row) + first;
  widen(row, type, first, count, copy);
  for (int64_t v = count; v < padded<T>(count); ++v) copy[v] = -kInfinity<T>;
  return copy;
}

// u + s (c - u) from its nearer end, s != 1. -inf where both are; +inf in either makes +inf or NaN of it.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> guide(Vec<T> c, Vec<T> u, T s) {
  Vec<T> step = (c == -kInfinity<T>)&(u == -kInfinity<T>) ? Vec<T>{} : c - u;
  step = u == kInfinity<T> ? splat(kNothing<T>) : step;
  return s < T(1) ? u + s * step : c + (s - T(1)) * step;
}

template <class T>
struct Chunk {
  const T *teacher, *model;
  int64_t end;  // padded
};

template <class T>
SOFTDIMO_ALWAYS_INLINE Chunk<T> read_chunk(const Divergence& s, const Row<T>& row, int64_t first, Buffers<T>& room) {
  const int64_t count = smaller(kChunk<T>, s.vocabulary - first), end = padded<T>(count);
  const T* teacher = read(row.teacher, s.teacher.type, first, count, room.teacher);
  if (row.guidance != T(1)) {
    const T* uncond = read(row.uncond, s.uncond.type, first, count, room.uncond);
    for (int64_t v = 0; v < end; v += kLanes<T>) {
      store(room.teacher + v, guide(load(teacher + v), load(uncond + v), row.guidance));
    }
    teacher = room.teacher;
  }
  return {teacher, read(row.model, s.model.type, first, count, room.model), end};
}

SOFTDIMO_ALWAYS_INLINE void prefetch(const char* row, DType type, int64_t first, int64_t last) {
  const int64_t end = last * size_of(type);
  for (int64_t byte = first * size_of(type); byte < end; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

// Into the second cache, while another row is worked on.
template <class T>
SOFTDIMO_ALWAYS_INLINE void prefetch_chunk(const Divergence& s, const Row<T>& row, int64_t first) {
  const int64_t last = smaller(first + kChunk<T>, s.vocabulary);
  prefetch(row.teacher, s.teacher.type, first, last);
  prefetch(row.model, s.model.type, first, last);
  if (row.guidance != T(1)) prefetch(row.uncond, s.uncond.type, first, last);
}

// ---------------------------------------------------------------------------------------------------
// entries

template <class T>
struct Scale {
  T top;
  T inverse, inverse_low;  // 1 / temperature, as a sum of two: the product is rounded like the quotient
  T least;                 // -kFar times the temperature
};

template <class T>
SOFTDIMO_ALWAYS_INLINE Scale<T> scale_of(double logit, double temperature) {
  const T top = static_cast<T>(logit);
  const double most = sizeof(T) == 8 ? 1.7e308 : 3.4e38;
  // Nothing finite is told apart above most / 100, and there an absent entry would come out within reach of exp.
  temperature = temperature > most / 100 ? most / 100 : temperature;
  if (static_cast<T>(temperature) == T(0)) temperature = NAN;  // as in the other operators
  const double far = static_cast<double>(kFar<T>) * temperature;
  const double inverse = 1 / temperature;
  const T least = static_cast<T>(far > most ? -most : -far);
  if (inverse > most) return {top, static_cast<T>(most), T(0), least};
  const T high = static_cast<T>(inverse);
  const double wide = inverse - static_cast<double>(high), rest = ::fma(-inverse, temperature, 1.0) * inverse;
  return {top, high, static_cast<T>(sizeof(T) == 8 ? rest : wide), least};
}

// distance / temperature, not beyond kFar; NaN for NaN. kUnit: the temperature is 1.
template <bool kUnit, class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> scaled(Vec<T> distance, const Scale<T>& scale) {
  const Vec<T> d = scale.least > distance ? scale.least : distance;
  if constexpr (kUnit) return d;
  return d * scale.inverse + d * scale.inverse_low;
}

// (logit - top) / temperature, at most 0.
template <bool kUnit, class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> below_top(Vec<T> logit, const Scale<T>& scale) {
  return scaled<kUnit, T>(logit - scale.top, scale);
}

// exp(x) for x <= 0, a third faster than exp_nonpositive: to 1e-8 + 2e-9 x beside its rounding, much less than what
// the rounding of x costs. 0 below the normal range, NaN for NaN.
SOFTDIMO_ALWAYS_INLINE Vec<float> exp_below(Vec<float> x) {
  constexpr float kMagic = 12583039.0f;  // 1.5 * 2^23 + 127: adding it rounds, and leaves the exponent's bits last
  const Vec<float> shifted = x * 1.44269504088896341f + kMagic;
  const Vec<float> r = x - (shifted - kMagic) * 0.693147180559945309f;
  Vec<float> poly = r * 1.392632606e-03f + 8.363292553e-03f;
  poly = poly * r + 4.166655242e-02f;
  poly = poly * r + 1.666657627e-01f;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  return x < -87.0f ? Vec<float>{} : poly * (Vec<float>)((UintVec)shifted << 23);
}
SOFTDIMO_ALWAYS_INLINE Vec<double> exp_below(Vec<double> x) { return exp_nonpositive(x); }

// a - b - difference, exactly (Knuth's two-sum).
template <class V>
SOFTDIMO_ALWAYS_INLINE V rounding(V a, V b, V difference) {
  const V negated_b = difference - a;
  return (a - (difference - negated_b)) - (b + negated_b);
}

// What turns logits of a row into its centred terms.
template <class T>
struct Centred {
  Scale<T> teacher, model;
  bool same_temperature;
  T top, top_rounding;  // teacher.top - model.top
  T p_scale, q_scale;   // 1 / sums
  T centre, excess;
};

template <class T>
SOFTDIMO_ALWAYS_INLINE Centred<T> centred_row(const Divergence& s, const RowStatistics& row) {
  const T teacher_top = static_cast<T>(row.teacher_top), model_top = static_cast<T>(row.model_top);
  const T top = teacher_top - model_top;
  return {scale_of<T>(row.teacher_top, s.teacher_temperature),
          scale_of<T>(row.model_top, s.model_temperature),
          s.teacher_temperature == s.model_temperature,
          top,
          rounding(teacher_top, model_top, top),
          static_cast<T>(1 / row.teacher_sum),
          static_cast<T>(1 / row.model_sum),
          static_cast<T>(row.centre),
          static_cast<T>(row.excess)};
}

// (a - b - top) / temperature with the rounding errors of all three differences added back: exact for nearly equal
// logits and for rows that differ by a large common offset alike.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> exact_difference(const Centred<T>& c, Vec<T> a, Vec<T> b) {
  const Vec<T> entry = a - b;
  const Vec<T> d = (entry - c.top) + (rounding(a, b, entry) - c.top_rounding);
  const T most = -c.teacher.least;
  return scaled<false, T>(most < d ? most : d, c.teacher);
}

// (x + expm1(-x)) / x^2 for |x| < 1/2, to the last bit or so.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> curvature(Vec<T> x) {
  constexpr float kSingle[] = {2.49224358e-05f, -1.99621762e-04f, 1.38888737e-03f, -8.33318196e-03f,
                               4.16666679e-02f, -1.66666672e-01f, 0.5f};
  constexpr double kDouble[] = {1.0 / 1307674368000, -1.0 / 87178291200, 1.0 / 6227020800, -1.0 / 479001600,
                                1.0 / 39916800,      -1.0 / 3628800,     1.0 / 362880,     -1.0 / 40320,
                                1.0 / 5040,          -1.0 / 720,         1.0 / 120,        -1.0 / 24,
                                1.0 / 6,             -1.0 / 2};
  if constexpr (sizeof(T) == 4) {
    Vec<T> sum = splat(kSingle[0]);
    for (int i = 1; i < 7; ++i) sum = sum * x + kSingle[i];
    return sum;
  } else {
    Vec<T> sum = splat(kDouble[0]);
    for (int i = 1; i < 14; ++i) sum = sum * x + kDouble[i];
    return -sum;
  }
}

template <class T>
struct Entry {
  Vec<T> p, q, ratio, difference;  // difference: p - q
  Vec<T> forward, reverse;         // terms of KL(p || q) and KL(q || p), without the infinite ones
};

// Of two probabilities that differ, the smaller one is the larger times exp(-|r|), so that both belong to the same r;
// nearly equal ones are p and p exp(-r). An entry that is -inf on one side has a ratio of -kFar or kFar.
template <class T>
SOFTDIMO_ALWAYS_INLINE Entry<T> centred_entry(const Centred<T>& c, Vec<T> a, Vec<T> b) {
  const Vec<T> x = below_top<false, T>(a, c.teacher), y = below_top<false, T>(b, c.model);
  Vec<T> d = x - y;
  if (c.same_temperature) {
    const Vec<T> exact = exact_difference(c, a, b);
    d = exact - exact == T(0) ? exact : d;
  }
  Entry<T> e;
  e.ratio = (d - c.centre) - c.excess;
  const Vec<T> far = e.ratio < T(0) ? -e.ratio : e.ratio;
  const auto near = far < T(0.5), q_larger = e.ratio <= T(-0.5);
  const Vec<T> base = exp_below(q_larger ? y : x) * (q_larger ? splat(c.q_scale) : splat(c.p_scale));
  const Vec<T> share = exp_below(-far), other = base * share;

  const Vec<T> g = e.ratio * e.ratio * curvature<T>(e.ratio);
  const Vec<T> lost = T(1) - share, more = base * (far - lost), less = base * (lost - far * share);
  e.difference = near ? base * (e.ratio - g) : q_larger ? other - base : base - other;
  e.forward = near ? base * g : q_larger ? less : more;
  e.reverse = near ? e.difference * e.ratio - e.forward : q_larger ? more : less;
  e.p = q_larger ? other : base;
  e.q = near ? base - e.difference : q_larger ? base : other;
  return e;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
