// The products of attention in bfloat16, where the instruction set has them; see attention_products.h.
#pragma once

#include "attention_rows.h"
#include "gemm_bf16.h"

#ifdef __AVX512BF16__

namespace softdimo::cpu::SOFTDIMO_ISA {

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
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr int64_t kForwardRows = 32;

  static int64_t row_stride(int64_t width) { return padded_depth(width) + kLeftPad; }
  static int64_t block_size(int64_t count, int64_t width) { return count * row_stride(width); }
  static int64_t across_size(int64_t count, int64_t width) { return rounded_up(width, kPanel) * row_stride(count); }
  static int64_t right_size(int64_t count, int64_t width) { return SOFTDIMO_ISA::right_size(count, width); }
  static int64_t weights_size(int64_t keys, int64_t queries) {
    return right_size(keys, queries) + keys * row_stride(queries);
  }

  SOFTDIMO_ALWAYS_INLINE static Vec<float> scaled(Vec<float> score, float scale) { return score * scale; }
  SOFTDIMO_ALWAYS_INLINE static Vec<float> weight(Vec<float> score, float scale, Vec<float> top) {
    return power(score * (scale * kLog2e) - top * kLog2e);
  }
  // 2^y within 9e-5 of its size, less than what rounding changes: 2^floor(y) times a cubic, exact for integers.
  SOFTDIMO_ALWAYS_INLINE static Vec<float> power(Vec<float> y) {
    const Vec<float> r = (Vec<float>)_mm512_reduce_ps((__m512)y, 0x09);  // y - floor(y)
    const Vec<float> poly = ((r * 7.706716e-2f + 2.2764486e-1f) * r + 6.9511682e-1f) * r + 1.0f;
    return (Vec<float>)_mm512_scalef_ps((__m512)poly, (__m512)y);
  }

  static void read(const Heads& tensor, int64_t first, int64_t width, float, Bfloat16* out) {
    const Bfloat16* row = static_cast<const Bfloat16*>(tensor.data) + first;
    for (int64_t i = 0; i < width; i += 32) {
      const __mmask32 some = width - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (width - i)) - 1;
      _mm512_storeu_si512(out + i, _mm512_maskz_loadu_epi16(some, row + i));
    }
  }
  static void finish(const Block<Bfloat16>&) {}

  static Left left(const Block<Bfloat16>& block) { return {block.data, block.row}; }
  static Left left_across(const Block<Bfloat16>& block, Bfloat16* scratch) {
    const int64_t row = row_stride(block.count);
    for (int64_t k = 0; k < block.count; k += kDepthStep) {
      for (int64_t i = 0; i < block.width; i += 16) {
        __m512i pairs[16];
        for (int64_t p = 0; p < 16; ++p) pairs[p] = row_pair(block, k + 2 * p, i);
        transpose(pairs);
        const int64_t rows = smaller(16, block.width - i);
        for (int64_t m = 0; m < rows; ++m) _mm512_storeu_si512(scratch + (i + m) * row + k, pairs[m]);
      }
    }
    return {scratch, row};
  }
  static Right right(const Block<Bfloat16>& block, Bfloat16* scratch) {
    const int64_t panel = right_panel(block.count);
    for (int64_t k = 0; k < padded_depth(block.count); k += 2) {
      for (int64_t i = 0; i < block.width; i += 16) {
        _mm512_storeu_si512(scratch + i / kPanel * panel + (k / 2 * kPanel + i % kPanel) * 2, row_pair(block, k, i));
      }
    }
    return {scratch, panel};
  }
  static Right right_across(const Block<Bfloat16>& block, Bfloat16* scratch) {
    const int64_t panel = right_panel(block.width);
    for (int64_t i = 0; i < block.count; i += 16) {
      for (int64_t k = 0; k < block.width; k += kDepthStep) {
        __m512i pairs[16];
        for (int64_t m = 0; m < 16; ++m) {
          pairs[m] = i + m < block.count ? _mm512_loadu_si512(block.data + (i + m) * block.row + k) : _mm512_setzero_si512();
        }
        transpose(pairs);
        Bfloat16* out = scratch + i / kPanel * panel + (k / 2 * kPanel + i % kPanel) * 2;
        for (int64_t p = 0; p < 16; ++p) _mm512_storeu_si512(out + p * kPanel * 2, pairs[p]);
      }
    }
    return {scratch, panel};
  }
  // 16 columns of rows k and k + 1, one in each half of a lane; zeros beyond the block.
  SOFTDIMO_ALWAYS_INLINE static __m512i row_pair(const Block<Bfloat16>& block, int64_t k, int64_t column) {
    const Bfloat16* row = block.data + k * block.row + column;
    const __m512i even = k < block.count ? widened(row) : _mm512_setzero_si512();
    const __m512i odd = k + 1 < block.count ? widened(row + block.row) : _mm512_setzero_si512();
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  }
  SOFTDIMO_ALWAYS_INLINE static __m512i widened(const Bfloat16* row) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
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

  static int64_t weight_rows_size(int64_t queries, int64_t keys) { return queries * row_stride(keys); }
  static Block<Bfloat16> weight_rows(float*, int64_t, int64_t queries, int64_t keys, Bfloat16* scratch) {
    return {scratch, row_stride(keys), queries, keys};
  }
  SOFTDIMO_ALWAYS_INLINE static Vec<float> weigh_row(const float* scores, int64_t keys, float scale, float top,
                                                     Bfloat16* out) {
    const Vec<float> factor = splat(scale * kLog2e), shift = splat(top * kLog2e);
    Vec<float> sum{};
    int64_t j = 0;
    for (; j + 32 <= keys; j += 32) {
      const Vec<float> first = power(load(scores + j) * factor - shift);
      const Vec<float> second = power(load(scores + j + 16) * factor - shift);
      sum += store_weights(first, second, out + j);
    }
    if (j < keys) {
      const Vec<float> first = power(load(scores + j) * factor - shift);
      const Vec<float> second = keys - j > 16 ? power(load(scores + j + 16) * factor - shift) : Vec<float>{};
      sum += store_weights(first_lanes_or<float>(first, keys - j, Vec<float>{}),
                           first_lanes_or<float>(second, keys - j - 16, Vec<float>{}), out + j);
    }
    return sum;
  }
  // Keeps 32 weights, rounded, and adds those.
  SOFTDIMO_ALWAYS_INLINE static Vec<float> store_weights(Vec<float> first, Vec<float> second, Bfloat16* out) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(out, both);
    return (Vec<float>)_mm512_slli_epi32(both, 16) + (Vec<float>)((UintVec)both & 0xFFFF0000u);
  }

  static void write_row(float* from, int64_t width, float factor, void* out, DType, int64_t first) {
    Bfloat16* const row = static_cast<Bfloat16*>(out) + first;
    for (int64_t d = 0; d < width; d += 32) {
      const __mmask32 some = width - d >= 32 ? ~__mmask32{0} : (__mmask32{1} << (width - d)) - 1;
      const __m512 low = (__m512)(load(from + d) * factor), high = (__m512)(load(from + d + 16) * factor);
      _mm512_mask_storeu_epi16(row + d, some, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

  // Rows `numbers` of a head, of which the first is row `first_row` of the tensor, from columns of [width, queries].
  static void write_columns(const float* from, int64_t from_row, int64_t width, const int64_t* numbers, int64_t count,
                            const float* factors, float*, void* out, DType, int64_t first_row) {
    for (int64_t m = 0; m < count; m += 16) {
      const Vec<float> factor = load(factors + m);
      for (int64_t d = 0; d < width; d += 32) {
        const __mmask32 some = width - d >= 32 ? ~__mmask32{0} : (__mmask32{1} << (width - d)) - 1;
        __m512i pairs[16];
        for (int64_t p = 0; p < 16; ++p) {
          const float* even = from + (d + 2 * p) * from_row + m;
          pairs[p] = interleaved(load(even) * factor, load(even + from_row) * factor);
        }
        transpose(pairs);
        for (int64_t i = 0; i < smaller(16, count - m); ++i) {
          Bfloat16* row = static_cast<Bfloat16*>(out) + (first_row + numbers[m + i]) * width + d;
          _mm512_mask_storeu_epi16(row, some, pairs[i]);
        }
      }
    }
  }

  static void multiply(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, float* c, int64_t c_row,
                       bool add, Prefetch ahead) {
    gemm_bf16(rows, columns, depth, left.data, left.row, right.data, right.panel, c, c_row, add, &ahead);
  }
};

}  // namespace softdimo::cpu::SOFTDIMO_ISA

#endif  // __AVX512BF16__
