// The products of attention, in the operands of one kind. What differs between kinds: how rows are read, how a block
// of rows becomes an operand, and how weights are kept.
//
// A block of rows [count, width] can be either operand of a product, as it is or transposed ("across"):
//   left [count, width], left_across [width, count]: read by rows;
//   right [count, width], right_across [width, count]: read by panels of columns.
#pragma once

#include "attention_rows.h"
#include "gemm.h"
#include "gemm_bf16.h"
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

  static int64_t row_stride(int64_t width) { return padded<T>(width) + kPad; }
  static int64_t block_size(int64_t count, int64_t width) { return padded<T>(count) * row_stride(width); }
  static int64_t across_size(int64_t count, int64_t width) { return padded<T>(count) * rounded_up(width, kLanes<T>); }

  static int64_t right_size(int64_t, int64_t) { return 0; }
  static int64_t weights_size(int64_t, int64_t) { return 0; }

  SOFTDIMO_ALWAYS_INLINE static Vec<T> scaled(Vec<T> score, T) { return score; }

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
    const int64_t columns = panel_width<T>(block.count), panel = columns * block.width;
    for (int64_t i = 0; i < padded<T>(block.count); i += kLanes<T>) {
      T* out = scratch + i / columns * panel + i % columns;
      for (int64_t j = 0; j < block.width; j += kLanes<T>) {
        transpose(block.data + i * block.row + j, block.row, out + j * columns, columns, block.width - j);
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

  static void multiply(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, T* c, int64_t c_row,
                       bool add, Prefetch ahead) {
    gemm<T>(rows, padded<T>(columns), depth, left, right.data, right.panel, right.row, c, c_row, add, &ahead);
  }
};

#ifdef __AVX512BF16__

// Operands are bfloat16, as the inputs are, and so are weights, whose sum is that of the rounded ones.
struct Rounded {
  using Number = float;
  using Entry = Bfloat16;
  struct Left {
    const Bfloat16* data;
    int64_t row;
  };
  struct Right {
    const Bfloat16* data;
    int64_t panel;
  };
  using Scope = ProductScope;
  static constexpr bool kScalesQueries = false;
  static constexpr bool kCopiesWeights = true;

  static int64_t row_stride(int64_t width) { return padded_depth(width) + kLeftPad; }
  static int64_t block_size(int64_t count, int64_t width) { return count * row_stride(width); }
  static int64_t across_size(int64_t count, int64_t width) { return rounded_up(width, kPanel) * row_stride(count); }
  static int64_t right_size(int64_t count, int64_t width) { return SOFTDIMO_ISA::right_size(count, width); }
  static int64_t weights_size(int64_t keys, int64_t queries) {
    return right_size(keys, queries) + keys * row_stride(queries);
  }

  SOFTDIMO_ALWAYS_INLINE static Vec<float> scaled(Vec<float> score, float scale) { return score * scale; }

  static void read(const Heads& tensor, int64_t first, int64_t width, float, Bfloat16* out) {
    std::memcpy(out, static_cast<const Bfloat16*>(tensor.data) + first, static_cast<size_t>(width) * sizeof *out);
    for (int64_t i = width; i < padded_depth(width); ++i) out[i] = 0;
  }
  static void finish(const Block<Bfloat16>&) {}

  static Left left(const Block<Bfloat16>& block) { return {block.data, block.row}; }
  static Left left_across(const Block<Bfloat16>& block, Bfloat16* scratch) {
    pack_left({block.data, DType::bfloat16, 0, 1, block.row}, block.width, block.count, scratch, row_stride(block.count));
    return {scratch, row_stride(block.count)};
  }
  static Right right(const Block<Bfloat16>& block, Bfloat16* scratch) {
    pack_right({block.data, DType::bfloat16, 0, block.row, 1}, block.count, block.width, 0,
               padded_depth(block.count) / kDepthStep, scratch);
    return {scratch, right_panel(block.count)};
  }
  static Right right_across(const Block<Bfloat16>& block, Bfloat16* scratch) {
    pack_right({block.data, DType::bfloat16, 0, 1, block.row}, block.width, block.count, 0,
               padded_depth(block.width) / kDepthStep, scratch);
    return {scratch, right_panel(block.width)};
  }

  struct Weights {
    Bfloat16 *to_right, *to_left;
    int64_t panel, row;

    template <bool kLeft, bool kRight>
    SOFTDIMO_ALWAYS_INLINE Vec<float> put(int64_t j, int64_t query, Vec<float> even, Vec<float> odd, bool both) const {
      if constexpr (kRight) {
        store_right(even, odd, to_right + query / kPanel * panel + (j / 2 * kPanel + query % kPanel) * 2);
      }
      if constexpr (kLeft) {
        store_half(even, to_left + j * row + query);
        if (both) store_half(odd, to_left + (j + 1) * row + query);
      }
      return rounded(even) + rounded(odd);
    }
    SOFTDIMO_ALWAYS_INLINE static void store_half(Vec<float> v, Bfloat16* out) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh((__m512)v));
    }
    Left left(int64_t queries, int64_t keys) const {
      const size_t rest = static_cast<size_t>(padded_depth(queries) - queries) * sizeof(Bfloat16);
      for (int64_t j = 0; j < keys && rest > 0; ++j) std::memset(to_left + j * row + queries, 0, rest);
      return {to_left, row};
    }
    Right right(int64_t queries, int64_t keys) const {
      clear_pairs(queries, keys, to_right);
      return {to_right, panel};
    }
  };
  static Weights weights(float*, int64_t, int64_t keys, int64_t queries, Bfloat16* scratch) {
    return {scratch, scratch + right_size(keys, queries), right_panel(keys), row_stride(queries)};
  }

  static void multiply(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, float* c, int64_t c_row,
                       bool add, Prefetch ahead) {
    gemm_bf16(rows, columns, depth, left.data, left.row, right.data, right.panel, c, c_row, add, &ahead);
  }
};

#endif  // __AVX512BF16__

}  // namespace softdimo::cpu::SOFTDIMO_ISA
