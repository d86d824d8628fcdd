// The products of attention, in the operands of one kind. What differs between kinds: how rows are read, how a block
// of rows becomes an operand, and how weights are kept.
//
// A block of rows [count, width] can be either operand of a product, as it is or transposed ("across"):
//   left [count, width], left_across [width, count]: read by rows;
//   right [count, width], right_across [width, count]: read by panels of columns.
#pragma once

#include "attention_rows.h"
#include "gemm.h"
#include "transpose.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Operands are of the compute type: the rows themselves, but for right_across.
template <class T>
struct Plain {
  using Number = T;
  using Entry = T;
  using Left = Matrix<const T>;
  struct Scope {
    Scope() {}  // nothing to set up
  };
  struct Right {
    const T* data;
    int64_t panel;
    int64_t row;
  };
  static constexpr bool kScalesQueries = true;  // the scale goes into the queries
  static constexpr bool kCopiesWeights = false;
  static constexpr int64_t kForwardRows = 48;

  static int64_t row_stride(int64_t width) { return padded<T>(width) + kPad; }
  static int64_t block_size(int64_t count, int64_t width) { return padded<T>(count) * row_stride(width); }
  static int64_t across_size(int64_t count, int64_t width) { return padded<T>(count) * rounded_up(width, kLanes<T>); }

  static int64_t right_size(int64_t, int64_t) { return 0; }
  static int64_t weights_size(int64_t, int64_t) { return 0; }

  SOFTDIMO_ALWAYS_INLINE static Vec<T> scaled(Vec<T> score, T) { return score; }
  SOFTDIMO_ALWAYS_INLINE static Vec<T> weight(Vec<T> score, T, Vec<T> top) { return exp_nonpositive(score - top); }

  static void read(const Heads& tensor, int64_t first, int64_t width, T scale, T* out) {
    widen(tensor.data, tensor.type, first, width, out);
    for (int64_t i = 0; i < width && scale != T(1); ++i) out[i] *= scale;
    for (int64_t i = width; i < padded<T>(width); ++i) out[i] = T(0);
  }
  static void finish(const Block<T>& block) {  // zeros, for right_across
    for (int64_t i = block.count; i < padded<T>(block.count); ++i) {
      for (int64_t j = 0; j < padded<T>(block.width); ++j) block.data[i * block.row + j] = T(0);
    }
  }

  static Left left(const Block<T>& block) { return {block.data, block.row, 1}; }
  static Left left_across(const Block<T>& block, T*) { return {block.data, 1, block.row}; }
  static Right right(const Block<T>& block, T*) { return {block.data, panel_width<T>(block.width), block.row}; }
  static Right right_across(const Block<T>& block, T* scratch) {
    const int64_t columns = panel_width<T>(block.count), panel = columns * rounded_up(block.width, kLanes<T>);
    for (int64_t i = 0; i < padded<T>(block.count); i += kLanes<T>) {
      T* out = scratch + i / columns * panel + i % columns;
      for (int64_t j = 0; j < block.width; j += kLanes<T>) {
        Vec<T> lines[kLanes<T>];
        for (int m = 0; m < kLanes<T>; ++m) lines[m] = load(block.data + (i + m) * block.row + j);
        transpose<T>(lines);
        for (int m = 0; m < kLanes<T>; ++m) store(out + (j + m) * columns, lines[m]);
      }
    }
    return {scratch, panel, columns};
  }

  // A matrix like the scores, [keys, queries], written by columns: where the scores were.
  struct Weights {
    T* data;
    int64_t row;

    // Keys j and j + 1 (which is not there unless `both`) of a vector of queries; returns what was kept.
    template <bool kLeft, bool kRight>
    SOFTDIMO_ALWAYS_INLINE Vec<T> put(int64_t j, int64_t query, Vec<T> even, Vec<T> odd, bool both) const {
      store(data + j * row + query, even);
      if (both) store(data + (j + 1) * row + query, odd);
      return even + odd;
    }
    Left left(int64_t /*queries*/, int64_t /*keys*/) const { return {data, row, 1}; }
    Right right(int64_t queries, int64_t /*keys*/) const { return {data, panel_width<T>(queries), row}; }
  };

  static Weights weights(T* scores, int64_t row, int64_t, int64_t, T*) { return {scores, row}; }

  // A matrix like the scores of [queries, keys]: where the scores were.
  static int64_t weight_rows_size(int64_t, int64_t) { return 0; }
  static Block<T> weight_rows(T* scores, int64_t row, int64_t queries, int64_t keys, T*) {
    return {scores, row, queries, keys};
  }
  // A row of scores becomes weights exp(s - top); their sums by lanes.
  SOFTDIMO_ALWAYS_INLINE static Vec<T> weigh_row(const T* scores, int64_t keys, T, T top, T* out) {
    Vec<T> total{};
    for (int64_t j = 0; j < keys;) {
      Vec<T> part{};
      const int64_t last = smaller(keys, j + kKeysPerSum * kLanes<T>);
      for (; j + kLanes<T> <= last; j += kLanes<T>) {
        const Vec<T> p = exp_nonpositive(load(scores + j) - top);
        store(out + j, p);
        part += p;
      }
      if (j < last) {
        const Vec<T> p = exp_nonpositive(load(scores + j) - top);
        store(out + j, p);
        part += first_lanes_or<T>(p, last - j, Vec<T>{});
        j = last;
      }
      total += part;
    }
    return total;
  }

  // A row of the output from a row of [queries, width] times a factor.
  static void write_row(T* from, int64_t width, T factor, void* out, DType type, int64_t first) {
    for (int64_t d = 0; d < width; ++d) from[d] *= factor;
    narrow(from, width, out, type, first);
  }

  // Rows `numbers` of a head, of which the first is row `first_row` of the tensor, from columns of [width, queries]
  // times a factor each.
  static void write_columns(const T* from, int64_t from_row, int64_t width, const int64_t* numbers, int64_t count,
                            const T* factors, T* lines, void* out, DType type, int64_t first_row) {
    const int64_t wide = rounded_up(width, kLanes<T>);
    for (int64_t m = 0; m < count; m += kLanes<T>) {
      const Vec<T> factor = load(factors + m);
      for (int64_t d = 0; d < wide; d += kLanes<T>) {
        Vec<T> part[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) part[i] = load(from + (d + i) * from_row + m) * factor;
        transpose<T>(part);
        for (int i = 0; i < kLanes<T>; ++i) store(lines + i * wide + d, part[i]);
      }
      for (int64_t i = 0; i < smaller(kLanes<T>, count - m); ++i) {
        narrow(lines + i * wide, width, out, type, (first_row + numbers[m + i]) * width);
      }
    }
  }

  static void multiply(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, T* c, int64_t c_row,
                       bool add, Prefetch ahead) {
    gemm<T>(rows, padded<T>(columns), depth, left, right.data, right.panel, right.row, c, c_row, add, &ahead);
  }
};

}  // namespace softdimo::cpu::SOFTDIMO_ISA
