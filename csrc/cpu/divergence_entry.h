// Entries of the divergences: what one contributes. See divergence.cpp.
#pragma once

#include "divergence_rows.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

template <class T>
constexpr T kFar = T(1e30);  // scaled logits and log ratios end here: 0 times such a one is 0
constexpr double kLog2E = 1.4426950408889634074;

template <class T>
struct Scale {
  T top;
  T binary;                // log2(e) / temperature
  T inverse, inverse_low;  // 1 / temperature, as a sum of two: the product is rounded like the quotient
  T least;                 // -kFar times the temperature
};

template <class T>
SOFTDIMO_ALWAYS_INLINE Scale<T> scale_of(double temperature) {
  const double most = sizeof(T) == 8 ? 1.7e308 : 3.4e38;
  // Nothing finite is told apart above most / 100, and there an absent entry would come out within reach of exp.
  temperature = temperature > most / 100 ? most / 100 : temperature;
  if (static_cast<T>(temperature) == T(0)) temperature = NAN;  // as in the other operators
  const double far = static_cast<double>(kFar<T>) * temperature;
  const double inverse = 1 / temperature;
  const T least = static_cast<T>(far > most ? -most : -far);
  const T binary = static_cast<T>(kLog2E * inverse > most ? most : kLog2E * inverse);
  if (inverse > most) return {T(0), binary, static_cast<T>(most), T(0), least};
  const T high = static_cast<T>(inverse);
  const double wide = inverse - static_cast<double>(high), rest = ::fma(-inverse, temperature, 1.0) * inverse;
  return {T(0), binary, high, static_cast<T>(sizeof(T) == 8 ? rest : wide), least};
}

template <class T>
struct Scales {
  Scale<T> teacher, model;

  explicit Scales(const Divergence& s)
      : teacher(scale_of<T>(s.teacher_temperature)), model(scale_of<T>(s.model_temperature)) {}

  SOFTDIMO_ALWAYS_INLINE void set_tops(const RowStatistics& row) {
    teacher.top = static_cast<T>(row.teacher_top);
    model.top = static_cast<T>(row.model_top);
  }
};

// log2 of exp((logit - top) / temperature).
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> binary_below_top(Vec<T> logit, const Scale<T>& scale) {
  return (logit - scale.top) * scale.binary;
}

// own - other. An absent entry weighs nothing, where 0 times infinity would be NaN: in KL(own || other) where `own`
// lacks it; where both divergences are wanted (kBoth) if both sides do. Otherwise their sums become infinite or NaN.
template <bool kBoth, class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> binary_difference(Vec<T> own, Vec<T> other) {
  const Vec<T> d = own - other;
  if constexpr (kBoth) return own == other ? Vec<T>{} : d;
  else return greater<T>(d, splat(-kFar<T>));
}

// 2^t for t <= 0, to 1e-7 of itself beside the rounding; exactly 1 for 0, 0 below the normal range, NaN for NaN.
// Numbers below the normal range would take the processor a hundred times as long.
SOFTDIMO_ALWAYS_INLINE Vec<float> exp2_below(Vec<float> t) {
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512DQ__)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec<float> r = (Vec<float>)_mm512_reduce_ps((__m512)t, kDown);  // t - floor(t); 0 for an infinity
  Vec<float> poly = r * 1.8671304e-03f + 9.01703e-03f;
  poly = poly * r + 5.5799913e-02f;
  poly = poly * r + 2.4016444e-01f;
  poly = poly * r + 6.931513e-01f;
  poly = poly * r + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)poly, (__m512)t);
#else
  constexpr float kMagic = 12583039.0f;  // 1.5 * 2^23 + 127: adding it rounds, and leaves the exponent's bits last
  const Vec<float> shifted = t + kMagic, r = t - (shifted - kMagic);
  Vec<float> poly = r * 1.3264727e-03f + 9.671513e-03f;
  poly = poly * r + 5.5507336e-02f;
  poly = poly * r + 2.4022242e-01f;
  poly = poly * r + 6.93147e-01f;
  poly = poly * r + 1.0f;
  return t < -126.0f ? Vec<float>{} : poly * (Vec<float>)((UintVec)shifted << 23);
#endif
}
SOFTDIMO_ALWAYS_INLINE Vec<double> exp2_below(Vec<double> t) {
  Vec<double> out{};
  for (int i = 0; i < kLanes<double>; ++i) out[i] = ::exp2(t[i]);
  return out;
}

// distance / temperature, not beyond kFar; NaN for NaN.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> scaled(Vec<T> distance, const Scale<T>& scale) {
  const Vec<T> d = scale.least > distance ? scale.least : distance;
  return d * scale.inverse + d * scale.inverse_low;
}

// (logit - top) / temperature, at most 0.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> below_top(Vec<T> logit, const Scale<T>& scale) {
  return scaled<T>(logit - scale.top, scale);
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
SOFTDIMO_ALWAYS_INLINE Centred<T> centred_row(const Divergence& s, const Scales<T>& scales, const RowStatistics& row) {
  const T top = scales.teacher.top - scales.model.top;
  return {scales.teacher,
          scales.model,
          s.teacher_temperature == s.model_temperature,
          top,
          rounding(scales.teacher.top, scales.model.top, top),
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
  return scaled<T>(most < d ? most : d, c.teacher);
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
  const Vec<T> x = below_top<T>(a, c.teacher), y = below_top<T>(b, c.model);
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
