// Exact truncation of one row, top_k then top_p: which entries of x = logits / temperature are kept.
//
// Both ask for the same thing: the smallest entry such that the entries above it weigh less than a target. For top_k
// an entry weighs 1 and the target is k; for top_p it weighs exp(x - max) and the target is p times the weight that
// top_k left. It is found by halving the interval that holds it: a pass over the row in the cache weighs the upper
// half, and the ends of the interval snap to entries, so that groups of equal entries end it too. Midpoints are of
// values at first (logits are spread out), later of the integers that order floats, which ends in 32 (64) halvings
// whatever the row holds. Now and then the entries that are still in the interval are gathered, and the passes
// shorten. O(V) time, no sort.
//
// Within rounding of p: the entries equal to the boundary are decided one by one in the compute type, exactly as the
// specification decides (the mass up to and with the entry, rounded, minus its own, rounded, is below p), so that rows
// of equal entries agree to the entry. Otherwise an entry is kept or dropped alike wherever the mass before it is
// further from p than the rounding of a sum, about 1e-6 in float32.
#pragma once

#include <cmath>

#include "simd.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Kept: x > threshold, or x == threshold and index <= last; and NaN, so that the row tells.
template <class T>
struct Kept {
  T threshold;
  int64_t last;
};

template <class T>
SOFTDIMO_ALWAYS_INLINE int64_t whole_vectors(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Elements of scratch that truncate_row needs.
template <class T>
int64_t truncation_scratch(int64_t count) {
  return 3 * whole_vectors<T>(count);
}

// Sets y to -inf where x, the entries [first, first + count) of the row, is dropped. y may be x.
template <class T>
void drop_entries(const Kept<T>& kept, const T* x, int64_t first, int64_t count, T* y) {
  const int64_t ties = kept.last < first ? 0 : smaller(kept.last - first + 1, count);
  const T threshold = kept.threshold;
  for (int64_t v = 0; v < ties; ++v) y[v] = x[v] < threshold ? static_cast<T>(-HUGE_VAL) : y[v];
  for (int64_t v = ties; v < count; ++v) y[v] = x[v] <= threshold ? static_cast<T>(-HUGE_VAL) : y[v];
}

// Entries and their weights (null: 1 each), up to a whole number of vectors; -inf beyond the entries.
template <class T>
struct Weighed {
  const T* x;
  const T* weight;
  int64_t count;
};

// A row cut at a value.
template <class T>
struct Cut {
  double above;   // weight of the entries above it
  T most, least;  // the largest entry that is not above it, the smallest that is
};

template <class T>
Cut<T> cut(const Weighed<T>& row, T at) {
  constexpr int64_t kChunk = 32 * kLanes<T>;  // summed in T
  const Vec<T> lowest = splat(static_cast<T>(-HUGE_VAL)), highest = splat(static_cast<T>(HUGE_VAL));
  const Vec<T> one = splat(T(1));
  Vec<T> most = lowest, least = highest;
  double above = 0;
  for (int64_t first = 0; first < row.count; first += kChunk) {
    Vec<T> sum{};
    for (int64_t v = first; v < smaller(first + kChunk, row.count); v += kLanes<T>) {
      const Vec<T> x = load(row.x + v), weight = row.weight != nullptr ? load(row.weight + v) : one;
      const Vec<T> high = x > at ? x : highest, low = x > at ? lowest : x;
      sum += x > at ? weight : Vec<T>{};
      most = low > most ? low : most;
      least = high < least ? high : least;
    }
    above += static_cast<double>(lane_sum<T>(sum));
  }
  return {above, lane_max<T>(most), -lane_max<T>(-least)};
}

SOFTDIMO_ALWAYS_INLINE float between(float a, float b) {
  const int32_t i = bits<int32_t>(a), j = bits<int32_t>(b);
  const int32_t low = i ^ (i >> 31 & INT32_MAX), high = j ^ (j >> 31 & INT32_MAX);  // ordered as floats are
  const int32_t mid = (low & high) + ((low ^ high) >> 1);
  return bits<float>(mid ^ (mid >> 31 & INT32_MAX));
}
SOFTDIMO_ALWAYS_INLINE double between(double a, double b) {
  const int64_t i = bits<int64_t>(a), j = bits<int64_t>(b);
  const int64_t low = i ^ (i >> 63 & INT64_MAX), high = j ^ (j >> 63 & INT64_MAX);
  const int64_t mid = (low & high) + ((low ^ high) >> 1);
  return bits<double>(mid ^ (mid >> 63 & INT64_MAX));
}

// Copies what lies in [least, most] to x, and its weights, if it has any, to weight; both may be the row itself.
template <class T>
Weighed<T> gather(const Weighed<T>& row, T least, T most, T* x, T* weight) {
  int64_t count = 0;
  for (int64_t v = 0; v < row.count; v += kLanes<T>) {
    const Vec<T> value = load(row.x + v);
    const uint32_t lanes = lane_bits((value >= least) & (value <= most));
    if (lanes == 0) continue;
    store_lanes(x + count, value, lanes);
    if (row.weight != nullptr) store_lanes(weight + count, load(row.weight + v), lanes);
    count += __builtin_popcount(lanes);
  }
  const int64_t end = whole_vectors<T>(count);
  for (int64_t v = count; v < end; ++v) {
    x[v] = static_cast<T>(-HUGE_VAL);
    weight[v] = T(0);
  }
  return {x, row.weight != nullptr ? weight : nullptr, end};
}

template <class T>
struct Boundary {
  T value;
  double above;  // weight of the entries above it
};

// The smallest entry of [least, most] such that the entries above it weigh less than the target. `most` is the
// greatest entry. x and weight: scratch.
template <class T>
Boundary<T> find_boundary(Weighed<T> row, T least, T most, double target, T* x, T* weight) {
  constexpr int kByValue = 16, kGather = 4;
  double above = 0, gone = 0;  // weight above `most`; of entries that are no longer in the row
  for (int step = 1; least < most; ++step) {
    T mid = step <= kByValue ? least * T(0.5) + most * T(0.5) : between(least, most);
    if (!(mid < most)) mid = least;
    const Cut<T> parts = cut(row, mid);
    if (gone + parts.above < target) {
      above = gone + parts.above;
      most = parts.most;
    } else {
      least = parts.least;
    }
    if (step % kGather != 0) continue;
    row = gather(row, least, most, x, weight);
    gone = above;
  }
  return {most, above};
}

// The index of the last of the first `wanted` entries equal to a value.
template <class T>
int64_t last_equal(const T* x, int64_t count, T value, int64_t wanted) {
  int64_t last = -1;
  for (int64_t v = 0; v < count && wanted > 0; v += kLanes<T>) {
    for (uint32_t lanes = lane_bits(load(x + v) == value); lanes != 0 && wanted > 0; lanes &= lanes - 1) {
      last = v + __builtin_ctz(lanes);
      --wanted;
    }
  }
  return smaller(last, count - 1);
}

// How many of the entries that weigh `own` and follow entries that weigh `above` top_p keeps, of at most `most`.
template <class T>
int64_t kept_ties(double above, double own, double total, double top_p, int64_t most) {
  const T share = static_cast<T>(own / total);
  double mass = above / total;
  int64_t kept = 0;
  for (; kept < most; ++kept) {
    mass += static_cast<double>(share);
    const bool best = above == 0 && kept == 0;  // always kept
    if (!best && !(static_cast<T>(mass) - share < static_cast<T>(top_p))) break;
  }
  return kept;
}

// top_k: 0 keeps all. top_p: 1 keeps all. x: count entries, then -inf up to whole_vectors. Under top_p a row whose
// maximum is infinite keeps the first such entry alone.
template <class T>
Kept<T> truncate_row(const T* x, int64_t count, int64_t top_k, double top_p, T* scratch) {
  const int64_t end = whole_vectors<T>(count);
  Weighed<T> row{x, nullptr, end};
  const T lowest = static_cast<T>(-HUGE_VAL), most = cut(row, static_cast<T>(HUGE_VAL)).most;
  Kept<T> kept = {lowest, count - 1};
  int64_t ties = 0;  // entries kept at the threshold
  if (top_k > 0 && top_k < count) {
    const Boundary<T> edge = find_boundary(row, lowest, most, static_cast<double>(top_k), scratch, scratch + end);
    ties = top_k - static_cast<int64_t>(edge.above);
    kept = {edge.value, last_equal(x, count, edge.value, ties)};
  }
  if (!(top_p < 1)) return kept;
  if (!(most - most == T(0))) return {most, last_equal(x, count, most, 1)};  // infinite
  if (ties > 0) row = gather(row, kept.threshold, most, scratch, scratch + end);
  T* weight = scratch + 2 * end;
  for (int64_t v = 0; v < row.count; v += kLanes<T>) store(weight + v, exp_nonpositive(load(row.x + v) - most));
  row.weight = weight;
  const auto weigh = [&](T value) { return static_cast<double>(exp_nonpositive(splat(value - most))[0]); };
  double total = cut(row, kept.threshold).above;
  if (ties > 0) total += static_cast<double>(ties) * weigh(kept.threshold);
  const Boundary<T> edge = find_boundary(row, kept.threshold, most, top_p * total, scratch, scratch + end);
  const int64_t equal = edge.value == kept.threshold ? ties : count;
  ties = kept_ties<T>(edge.above, weigh(edge.value), total, top_p, equal);
  return {edge.value, last_equal(x, count, edge.value, ties)};
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
