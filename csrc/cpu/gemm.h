// A register-blocked matrix product: C[M, N] (+)= A[M, K] B[K, N], A and B anywhere, N a multiple of the vector.
//
// One tile keeps MR x NV vectors of C in registers; per k it loads NV vectors of B and broadcasts MR scalars of A.
// K is cut into chains of at most kChain products. Each starts at zero and is added to C at its end: after one large
// product every later sum of its chain is rounded at that size, so long chains lose more. Every entry of C is the
// same operations in the same order whatever MR its row fell into, so a row's bits do not depend on its neighbours.
#pragma once

#include "prefetch.h"
#include "simd.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Rows per tile: accumulators fill the register file, less B's vectors and a temporary.
#if SOFTDIMO_SIMD_BYTES == 64
constexpr int kTileRows = 14;  // of 32 registers
#elif SOFTDIMO_SIMD_BYTES == 32
constexpr int kTileRows = 6;  // of 16
#else
constexpr int kTileRows = 4;  // of 16, without fused multiply-add
#endif

constexpr int64_t kChain = 112;
constexpr int64_t kPrefetchStep = 32;  // products between two prefetches

template <class T>
struct Matrix {
  T* data;
  int64_t row;  // stride between rows
  int64_t col;  // stride between columns
};

template <class T, int MR, int NV>
__attribute__((noinline)) void tile(int64_t depth, Matrix<const T> a, const T* b, int64_t b_row, T* c,
                                    int64_t c_row, bool add, Prefetch* prefetch) {
  constexpr int kLane = kLanes<T>;
  Vec<T> sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      sum[m][n] = Vec<T>{};
      __builtin_prefetch(c + m * c_row + n * kLane, 1);  // needed at the end
    }
  }
  const int64_t step = prefetch != nullptr ? kPrefetchStep : depth;
  for (int64_t k = 0; k < depth; k += step) {
    if (prefetch != nullptr) prefetch->step();
    for (int64_t count = smaller(depth - k, step); count > 0; --count) {
      Vec<T> right[NV];
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) right[n] = load(b + n * kLane);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const T value = a.data[m * a.row];
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) sum[m][n] += right[n] * value;
      }
      a.data += a.col;
      b += b_row;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      T* out = c + m * c_row + n * kLane;
      store(out, add ? sum[m][n] + load(out) : sum[m][n]);
    }
  }
}

template <class T, int NV, int MR = kTileRows>
SOFTDIMO_ALWAYS_INLINE void tile_of(int rows, int64_t depth, Matrix<const T> a, const T* b, int64_t b_row, T* c,
                                    int64_t c_row, bool add, Prefetch* prefetch) {
  if constexpr (MR > 1) {
    if (rows < MR) return tile_of<T, NV, MR - 1>(rows, depth, a, b, b_row, c, c_row, add, prefetch);
  }
  tile<T, MR, NV>(depth, a, b, b_row, c, c_row, add, prefetch);
}

SOFTDIMO_ALWAYS_INLINE int64_t tile_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
SOFTDIMO_ALWAYS_INLINE int64_t chain_count(int64_t depth) { return depth > 0 ? (depth + kChain - 1) / kChain : 1; }

// Calls of Prefetch::step in a product: once per kPrefetchStep products of each chain.
SOFTDIMO_ALWAYS_INLINE int64_t prefetch_steps(int64_t rows, int64_t panels, int64_t depth) {
  int64_t steps = 0;
  const int64_t chains = chain_count(depth);
  for (int64_t j = 0, k = 0; j < chains; ++j) {
    const int64_t chain = (depth - k) / (chains - j);
    steps += (chain + kPrefetchStep - 1) / kPrefetchStep;
    k += chain;
  }
  return steps * tile_count(rows) * panels;
}

// One panel of NV vectors of columns, all rows: rows are split evenly into tiles, and K into chains.
template <class T, int NV>
void panel(int64_t rows, int64_t depth, Matrix<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
           bool add, Prefetch* prefetch) {
  const int64_t tiles = tile_count(rows), chains = chain_count(depth);
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int count = static_cast<int>((rows - row) / (tiles - i));
    for (int64_t j = 0, k = 0; j < chains; ++j) {
      const int64_t chain = (depth - k) / (chains - j);
      tile_of<T, NV>(count, chain, {a.data + row * a.row + k * a.col, a.row, a.col}, b + k * b_row, b_row,
                     c + row * c_row, c_row, add || j > 0, prefetch);
      k += chain;
    }
    row += count;
  }
}

// Columns of one panel, and a width rounded up to whole panels.
template <class T>
SOFTDIMO_ALWAYS_INLINE int64_t panel_width(int64_t columns) {
  return columns > kLanes<T> ? 2 * kLanes<T> : kLanes<T>;
}
template <class T>
SOFTDIMO_ALWAYS_INLINE int64_t padded(int64_t columns) {
  const int64_t width = panel_width<T>(columns);
  return (columns + width - 1) / width * width;
}

// C[rows, columns] (+)= A B. Panel i of B starts at b + i * b_panel and has b_row between its rows. `columns` is
// padded<T>(...) of something: the last panel may hold zeros. `prefetch` is fetched meanwhile.
template <class T>
void gemm(int64_t rows, int64_t columns, int64_t depth, Matrix<const T> a, const T* b, int64_t b_panel,
          int64_t b_row, T* c, int64_t c_row, bool add, Prefetch* prefetch = nullptr) {
  const int64_t width = panel_width<T>(columns);
  if (prefetch != nullptr) prefetch->start(prefetch_steps(rows, columns / width, depth));
  for (int64_t column = 0; column < columns; column += width) {
    const T* right = b + column / width * b_panel;
    if (width > kLanes<T>) {
      panel<T, 2>(rows, depth, a, right, b_row, c + column, c_row, add, prefetch);
    } else {
      panel<T, 1>(rows, depth, a, right, b_row, c + column, c_row, add, prefetch);
    }
  }
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
