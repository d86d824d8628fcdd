// The divergence of two rows of logits. See divergence.cpp.
#pragma once

#include "divergence_entry.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Two running maxima by lane: each waits for its own last comparison.
template <class T>
struct Maxima {
  Vec<T> first = splat(-kInfinity<T>), second = splat(-kInfinity<T>);

  SOFTDIMO_ALWAYS_INLINE void add(const Pair<T>& v) {
    first = greater<T>(v.first, first);
    second = greater<T>(v.second, second);
  }
};

template <class T, class E>
SOFTDIMO_ALWAYS_INLINE T row_top(const Maxima<T>& a, const Maxima<T>& b) {
  Maxima<T> all = a;
  all.add({b.first, b.second});
  return greatest<T, E>(greater<T>(all.first, all.second));
}

template <class T, class E>
void find_tops(const Divergence& s, const Row<T>& row, Room<T>& room, RowStatistics& found) {
  Maxima<T> teacher[2], model[2];
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    const Chunk<E> chunk = read_chunk<T, E>(s, row, first, room);
    for (int64_t v = 0; v < chunk.end; v += 2 * kPair<T>) {
      const int64_t w = v + kPair<T> < chunk.end ? v + kPair<T> : v;
      teacher[0].add(load_ordered(chunk.teacher + v));
      teacher[1].add(load_ordered(chunk.teacher + w));
      model[0].add(load_ordered(chunk.model + v));
      model[1].add(load_ordered(chunk.model + w));
    }
  }
  found.teacher_top = static_cast<double>(row_top<T, E>(teacher[0], teacher[1]));
  found.model_top = static_cast<double>(row_top<T, E>(model[0], model[1]));
}

// Sums over a row of u = exp(own) and w = exp(other), about the maxima, and of their products with the differences d
// of own and other as binary logarithms. Squares: products of the sums over blocks of entries.
template <class T>
struct Sums {
  Total<T> own, other, own_d, other_d;
  Vec<T> own_square{}, other_square{}, product{};
};

// The same of some entries.
template <class T>
struct Part {
  Vec<T> own{}, other{}, own_d{}, other_d{};

  // kBoth: the sum of w d is wanted too.
  template <bool kBoth>
  SOFTDIMO_ALWAYS_INLINE void add(const Scale<T>& own_scale, const Scale<T>& other_scale, Vec<T> a, Vec<T> b) {
    const Vec<T> x = binary_below_top(a, own_scale), y = binary_below_top(b, other_scale);
    const Vec<T> u = exp2_below(x), w = exp2_below(y), d = binary_difference<kBoth, T>(x, y);
    own += u;
    other += w;
    own_d += u * d;
    if constexpr (kBoth) other_d += w * d;
  }
};

template <bool kBoth, class T, class E>
SOFTDIMO_ALWAYS_INLINE void add_chunk(const Scale<T> own_scale, const Scale<T> other_scale, const E* own,
                                      const E* other, int64_t first_entry, int64_t end, const Ahead<T, E> ahead,
                                      Sums<T>& sums) {
  constexpr int64_t kBlock = sizeof(T) == 8 ? kPair<T> : 4 * kPair<T>;
  Vec<T> all_own{}, all_other{};
  Part<T> part;
  for (int64_t first = 0; first < end; first += kBlock) {
    part.own = part.other = Vec<T>{};
    for (int64_t v = first; v < smaller(first + kBlock, end); v += kPair<T>) {
      ahead.prefetch(first_entry + v);
      const Pair<T> a = load_pair(own + v), b = load_pair(other + v);
      part.template add<kBoth>(own_scale, other_scale, a.first, b.first);
      part.template add<kBoth>(own_scale, other_scale, a.second, b.second);
    }
    sums.own_square += part.own * part.own;
    sums.other_square += part.other * part.other;
    sums.product += part.own * part.other;
    all_own += part.own;
    all_other += part.other;
  }
  sums.own.add(all_own);
  sums.other.add(all_other);
  sums.own_d.add(part.own_d);
  if constexpr (kBoth) sums.other_d.add(part.other_d);
}

// The side that KL(own || other) is wanted of: the teacher's where both divergences are.
SOFTDIMO_ALWAYS_INLINE bool own_is_teacher(const Divergence& s) {
  return s.forward_weight != 0 || s.reverse_weight == 0;
}

template <bool kBoth, class T, class E>
void sum_row(const Divergence& s, const Scales<T>& scales, const Row<T>& row, const Row<T>& next, Room<T>& room,
             Sums<T>& sums) {
  const bool by_teacher = own_is_teacher(s);
  const Scale<T>&own = by_teacher ? scales.teacher : scales.model, &other = by_teacher ? scales.model : scales.teacher;
  const Ahead<T, E> ahead(s, next);
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    const Chunk<E> chunk = read_chunk<T, E>(s, row, first, room);
    const E *a = by_teacher ? chunk.teacher : chunk.model, *b = by_teacher ? chunk.model : chunk.teacher;
    add_chunk<kBoth>(own, other, a, b, first, chunk.end, ahead, sums);
  }
}

// forward_weight * forward + reverse_weight * reverse; a zero weight leaves its part out: 0 * inf would be NaN.
SOFTDIMO_ALWAYS_INLINE double weighted(const Divergence& s, double forward, double reverse) {
  const double first = s.forward_weight != 0 ? s.forward_weight * forward : 0.0;
  return s.reverse_weight != 0 ? first + s.reverse_weight * reverse : first;
}

// Whether p - q is not small beside p and q. A sum over m entries has at least the squares of these, and at most m
// times those of their differences: true ensures |p - q|^2 >= (|p|^2 + |q|^2) least / m.
template <class T>
bool far_apart(const Sums<T>& sums, double own, double other) {
  const T a = static_cast<T>(own), b = static_cast<T>(other);  // one over the sums
  const T least = static_cast<T>(sizeof(T) == 8 ? 0.5 : 0.03125);  // double has nothing wider to take its sums in
  const Vec<T> squares = sums.own_square * (a * a) + sums.other_square * (b * b);
  return sum_halves<T>(squares * (T(1) - least) - sums.product * (T(2) * a * b)) >= T(0);
}

// The divergence from the sums, where that costs no digits: p - q is not small beside p and q, and the divergences
// are not beside their parts. False where it does, or where an entry is (all but) -inf on one side alone.
template <class T>
bool direct_value(const Divergence& s, const Sums<T>& sums, RowStatistics& found, double* value) {
  const bool by_teacher = own_is_teacher(s), both = s.forward_weight != 0 && s.reverse_weight != 0;
  const double own = 1 / (by_teacher ? found.teacher_sum : found.model_sum);
  const double other = 1 / (by_teacher ? found.model_sum : found.teacher_sum);
  const double own_mean = sums.own_d.sum() * (own / kLog2E), other_mean = sums.other_d.sum() * (other / kLog2E);
  const double centre = ::log(other / own), first = own_mean - centre, second = centre - other_mean;
  found.centre = by_teacher ? centre : -centre;
  found.teacher_mean = by_teacher ? own_mean : -other_mean;
  found.model_mean = by_teacher ? other_mean : -own_mean;
  *value = by_teacher ? weighted(s, first, second) : weighted(s, second, first);
  return is_finite(*value) && far_apart(sums, own, other) && 16 * first >= ::fabs(own_mean) + ::fabs(centre) &&
         (!both || 16 * second >= ::fabs(other_mean) + ::fabs(centre));
}

// The divergence from centred terms. With r off by the excess e, which makes the sum of p exp(-r) one, the sums
// change by known amounts.
template <class T>
double centred_value(const Divergence& s, const Scales<T>& scales, const Row<T>& row, Room<T>& room,
                     RowStatistics& found) {
  const Centred<T> c = centred_row<T>(s, scales, found);
  Total<T> difference, forward, reverse;
  Vec<T> only_p{}, only_q{};
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    const Chunk<T> chunk = read_chunk<T, T>(s, row, first, room);
    Vec<T> cd{}, cf{}, cr{};
    for (int64_t v = 0; v < chunk.end; v += kLanes<T>) {
      const Vec<T> a = load(chunk.teacher + v), b = load(chunk.model + v);
      const Entry<T> e = centred_entry(c, a, b);
      cd += e.difference;
      cf += e.forward;
      cr += e.reverse;
      only_p = (b == -kInfinity<T>)&(a != -kInfinity<T>) ? splat(T(1)) : only_p;
      only_q = (a == -kInfinity<T>)&(b != -kInfinity<T>) ? splat(T(1)) : only_q;
    }
    difference.add(cd);
    forward.add(cf);
    reverse.add(cr);
  }
  const double d = difference.sum(), shift = ::log1p(-d);
  const double f = forward.sum() + (d + shift), r = (reverse.sum() - (d + shift) + d * shift) / (1 - d);
  found.excess = -shift;
  found.teacher_mean = lane_max<T>(only_p) > T(0) ? HUGE_VAL : f < 0 ? 0 : f;
  found.model_mean = lane_max<T>(only_q) > T(0) ? HUGE_VAL : r < 0 ? 0 : r;
  return weighted(s, found.teacher_mean, found.model_mean);
}

template <class T, class E>
T divergence_of_row(const Divergence& s, Scales<T>& scales, const Row<T>& row, const Row<T>& next, Room<T>& room,
                    RowStatistics& found) {
  find_tops<T, E>(s, row, room, found);
  if (!is_finite(found.teacher_top) || !is_finite(found.model_top)) {  // +inf, or nothing but -inf
    found.teacher_sum = found.model_sum = kNothing<double>;
    return kNothing<T>;
  }
  scales.set_tops(found);
  Sums<T> sums;
  if (s.forward_weight != 0 && s.reverse_weight != 0) {
    sum_row<true, T, E>(s, scales, row, next, room, sums);
  } else {
    sum_row<false, T, E>(s, scales, row, next, room, sums);
  }
  const double own = sums.own.sum(), other = sums.other.sum();
  if (!is_finite(own + other)) {  // NaN in either makes both NaN; +inf may come to light only here
    found.teacher_sum = found.model_sum = kNothing<double>;
    return kNothing<T>;
  }
  found.teacher_sum = own_is_teacher(s) ? own : other;
  found.model_sum = own_is_teacher(s) ? other : own;
  found.excess = 0;
  double value;
  found.direct = direct_value<T>(s, sums, found, &value) ? 1 : 0;
  return static_cast<T>(found.direct != 0 ? value : centred_value(s, scales, row, room, found));
}

template <class T>
T forward_row(const Divergence& s, Scales<T>& scales, const Row<T>& row, const Row<T>& next, Room<T>& room,
              RowStatistics& found) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (read_by_halves(s, row)) return divergence_of_row<T, Half>(s, scales, row, next, room, found);
  }
  return divergence_of_row<T, T>(s, scales, row, next, room, found);
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
