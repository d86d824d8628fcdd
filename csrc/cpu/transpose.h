// Transposing blocks of vectors in registers.
#pragma once

#include "simd.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

template <int... I>
struct Indices {};
template <int N, int... I>
struct FirstIndices : FirstIndices<N - 1, N - 1, I...> {};
template <int... I>
struct FirstIndices<0, I...> {
  using type = Indices<I...>;
};

// The lower, or upper, halves of two vectors, lane by lane in turn.
template <class T, int First, int... I>
SOFTDIMO_ALWAYS_INLINE Vec<T> zip(Vec<T> a, Vec<T> b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * kLanes<T>)...);
}

// kLanes vectors, the rows of a matrix, become its columns. Zipping rows i and i + kLanes / 2 moves the first bit of the
// row's number to the end of the lane's number; after log2(kLanes) rounds row and lane have changed places.
template <class T>
SOFTDIMO_ALWAYS_INLINE void transpose(Vec<T>* rows) {
  constexpr int kLane = kLanes<T>;
  using All = typename FirstIndices<kLane>::type;
  Vec<T> next[kLane];
#pragma GCC unroll 4
  for (int bit = 1; bit < kLane; bit *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLane / 2; ++i) {
      next[2 * i] = zip<T, 0>(rows[i], rows[i + kLane / 2], All{});
      next[2 * i + 1] = zip<T, kLane / 2>(rows[i], rows[i + kLane / 2], All{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) rows[i] = next[i];
  }
}

// kLanes vectors, the rows of a matrix, become one in rows[0]: lane i is row i's lanes, taken together by halves.
template <class T, class Join>
SOFTDIMO_ALWAYS_INLINE void fold_rows(Vec<T>* rows, Join join) {
  constexpr int kLane = kLanes<T>;
  using All = typename FirstIndices<kLane>::type;
#pragma GCC unroll 4
  for (int half = kLane / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Vec<T> other = rows[i + half];
      rows[i] = join(zip<T, 0>(rows[i], other, All{}), zip<T, kLane / 2>(rows[i], other, All{}));
    }
  }
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
