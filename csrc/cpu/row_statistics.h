// One row's maximum and the mass of its other entries, in two passes over a row that stays in the cache.
//
//   top = max z;  rest = sum over all entries but the first maximum of exp((z - top) / T)
//
// The maximum counts exactly 1 in the sum 1 + rest, so log(1 + rest) keeps its digits in rows where rest is small.
// Entries are summed in float within a chunk of fixed size, chunks in double and in order.
#pragma once

#include <cmath>

#include "simd.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

constexpr int64_t kRowChunk = 1024;  // entries summed at a time

// A row in memory, and room for one chunk of it in the compute type.
template <class T>
struct RowReader {
  const void* data;
  DType type;
  int64_t first;  // its first element
  int64_t count;
  int64_t next;  // the first element of the row that will be read after it
  T* chunk;      // [kRowChunk], aligned

  // Entries [at, at + entries) as T, then -inf up to a whole vector; in place where they lie so already.
  SOFTDIMO_ALWAYS_INLINE const T* read(int64_t at, int64_t entries) const {
    if (type == kDType<T> && entries % kLanes<T> == 0) return static_cast<const T*>(data) + first + at;
    return copy(at, entries);
  }
  SOFTDIMO_ALWAYS_INLINE T* copy(int64_t at, int64_t entries) const {
    widen(data, type, first + at, entries, chunk);
    for (int64_t v = entries; v % kLanes<T> != 0; ++v) chunk[v] = -HUGE_VAL;
    return chunk;
  }
  // Asks for what the next row holds at the same place: memory then answers while this row is worked on.
  SOFTDIMO_ALWAYS_INLINE void prefetch(int64_t at, int64_t entries) const {
    const int64_t bytes = size_of(type);
    const char* p = static_cast<const char*>(data) + (next + at) * bytes;
    for (int64_t i = 0; i < entries * bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
  SOFTDIMO_ALWAYS_INLINE T entry(int64_t at) const {
    T value = 0;
    widen(data, type, first + at, 1, &value);
    return value;
  }
};

template <class T>
struct RowTop {
  T value;     // -inf where no entry is greater; NaN entries are passed over
  int64_t at;  // its lowest index
};

template <class T>
RowTop<T> row_top(const RowReader<T>& row) {
  RowTop<T> top{T(-HUGE_VAL), 0};
  for (int64_t v = 0; v < row.count; v += kRowChunk) {
    const int64_t entries = smaller(kRowChunk, row.count - v);
    const T* z = row.read(v, entries);
    Vec<T> best = splat(T(-HUGE_VAL)), place{};  // by lane: the maximum, and where its vector starts in the chunk
    for (int64_t i = 0; i < entries; i += kLanes<T>) {
      const Vec<T> next = load(z + i);
      place = next > best ? splat(static_cast<T>(i)) : place;
      best = next > best ? next : best;
    }
    const T high = lane_max<T>(best);
    if (!(high > top.value)) continue;
    top = {high, v + kRowChunk};
    for (int i = 0; i < kLanes<T>; ++i) {
      const int64_t at = v + static_cast<int64_t>(place[i]) + i;
      if (best[i] == high && at < top.at) top.at = at;
    }
  }
  return top;
}

// Sums over a row; `moment` is sum exp(s) (-s) with s = (z - top) / T.
struct RowSums {
  double rest;
  double moment;
};

// Vectors of partial sums: at least 32 chains, which are short, lose little and do not wait for each other.
template <class T>
constexpr int kChains = kLanes<T> < 8 ? 32 / kLanes<T> : 4;

template <class T>
SOFTDIMO_ALWAYS_INLINE T sum_of_chains(Vec<T>* chain) {
  for (int width = kChains<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) chain[i] += chain[i + width];
  }
  return lane_sum<T>(chain[0]);
}

// The sums of one chunk.
template <class T, bool kMoment, bool kDivide>
RowSums chunk_sums(const RowReader<T>& row, int64_t v, const T* z, int64_t entries, T top, T t) {
  constexpr int kParts = kChains<T>;
  Vec<T> rest[kParts] = {}, moment[kParts] = {};
  const auto add = [&](int part, int64_t i) {
    const Vec<T> distance = load(z + i) - top;
    const Vec<T> s = kDivide ? distance / t : distance;
    const Vec<T> mass = exp_nonpositive(s);
    rest[part] += mass;
    if (kMoment) moment[part] -= mass == T(0) ? Vec<T>{} : mass * s;  // no mass: the distance may be infinite
  };
  int64_t i = 0;
  for (; i + kParts * kLanes<T> <= entries; i += kParts * kLanes<T>) {
    row.prefetch(v + i, kParts * kLanes<T>);
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) add(part, i + part * kLanes<T>);
  }
  for (int part = 0; i < entries; i += kLanes<T>, ++part) add(part, i);
  return {sum_of_chains<T>(rest), kMoment ? sum_of_chains<T>(moment) : T(0)};
}

// NaN in the row gives NaN. `top` is finite.
template <class T, bool kMoment>
RowSums row_sums(const RowReader<T>& row, RowTop<T> top, T t) {
  RowSums sums{0, 0};
  for (int64_t v = 0; v < row.count; v += kRowChunk) {
    const int64_t entries = smaller(kRowChunk, row.count - v);
    const bool holds_top = top.at >= v && top.at < v + entries;
    const T* z = holds_top ? row.copy(v, entries) : row.read(v, entries);
    if (holds_top) row.chunk[top.at - v] = -HUGE_VAL;
    const RowSums part = t == T(1) ? chunk_sums<T, kMoment, false>(row, v, z, entries, top.value, t)
                                   : chunk_sums<T, kMoment, true>(row, v, z, entries, top.value, t);
    sums.rest += part.rest;
    sums.moment += part.moment;
  }
  return sums;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
