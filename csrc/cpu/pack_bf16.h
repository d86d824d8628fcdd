// Operands of bfloat16 products, packed. Rounded to nearest even by an instruction that, like the products, takes
// subnormal numbers for zero.
//
//   A   rows of bfloat16, K contiguous, zeros from K up to padded_depth(K). Strides between rows that are powers of
//       two share cache sets: add kLeftPad elements.
//   B   panels of 32 columns, rows of K in pairs (2k, 2k + 1): [panel][padded_depth(K) / 2][32][2], zeros beyond K
//       and N.
#pragma once

#include "simd.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Callers branch on it with `if constexpr`: elsewhere these functions are declared, not defined.
#ifdef __AVX512BF16__
constexpr bool kHasBfloat16Product = true;
#else
constexpr bool kHasBfloat16Product = false;
#endif

using Bfloat16 = uint16_t;

constexpr int64_t kPanel = 32;      // columns of a panel of B
constexpr int64_t kDepthStep = 32;  // K is a multiple of it, once padded
constexpr int64_t kLeftPad = 32;    // elements between rows of A: one cache line

SOFTDIMO_ALWAYS_INLINE int64_t padded_depth(int64_t depth) {
  return (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
}
SOFTDIMO_ALWAYS_INLINE int64_t padded_columns(int64_t columns) { return (columns + 15) / 16 * 16; }

// Elements of a panel, and of all of B.
SOFTDIMO_ALWAYS_INLINE int64_t right_panel(int64_t depth) { return padded_depth(depth) * kPanel; }
SOFTDIMO_ALWAYS_INLINE int64_t right_size(int64_t depth, int64_t columns) {
  return (columns + kPanel - 1) / kPanel * right_panel(depth);
}

// A matrix anywhere: entry (i, j) is element first + i * row + j * col of a tensor.
struct Table {
  const void* data;
  DType dtype;
  int64_t first, row, col;
};

// B from a table [depth, columns], whole or the entries of K in [32 begin, 32 end). Fast where one of the strides is 1.
void pack_right(const Table& table, int64_t depth, int64_t columns, int64_t begin, int64_t end, Bfloat16* b);
// Entries 2 * pair and 2 * pair + 1 of K of B, from a row of `columns` floats each; `odd` may be nullptr: zeros.
// Pairs from depth / 2 up to padded_depth(depth) / 2 must be written too: clear_pairs.
void pack_right_pair(const float* even, const float* odd, int64_t columns, int64_t depth, int64_t pair, Bfloat16* b);
void clear_pairs(int64_t columns, int64_t depth, Bfloat16* b);

// A from a table [rows, depth]. Fast where one of the strides is 1.
void pack_left(const Table& table, int64_t rows, int64_t depth, Bfloat16* a, int64_t a_row);
// One row of A from `depth` floats, zeros up to padded_depth. Returns the sum of what was written, as it was rounded.
float pack_left_row(const float* row, int64_t depth, Bfloat16* a);

#ifdef __AVX512BF16__

// ---------------------------------------------------------------------------------------------------
// vectors, for kernels that pack what they compute

// 16 values rounded to bfloat16, as floats.
SOFTDIMO_ALWAYS_INLINE Vec<float> rounded(Vec<float> v) {
  const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
  return (Vec<float>)_mm512_slli_epi32(wide, 16);
}
// 32 consecutive elements of a row of A.
SOFTDIMO_ALWAYS_INLINE void store_left(Vec<float> first, Vec<float> second, Bfloat16* out) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
// 16 columns of two consecutive entries of K of B, one in each half of a lane.
SOFTDIMO_ALWAYS_INLINE __m512i interleaved(Vec<float> even, Vec<float> odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}
SOFTDIMO_ALWAYS_INLINE void store_right(Vec<float> even, Vec<float> odd, Bfloat16* out) {
  _mm512_storeu_si512(out, interleaved(even, odd));
}

SOFTDIMO_ALWAYS_INLINE uint32_t first_lanes(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// `count` consecutive elements from `first` of a tensor, at most 16, then zeros.
SOFTDIMO_ALWAYS_INLINE __m512 read_some(const void* data, DType dtype, int64_t first, int64_t count) {
  const __mmask16 some = static_cast<__mmask16>(first_lanes(count));
  switch (dtype) {
    case DType::float64: {
      const double* p = static_cast<const double*>(data) + first;
      const __m256 low = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(some), p));
      const __m256 high = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(some >> 8), p + 8));
      return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
    case DType::float32:
      return _mm512_maskz_loadu_ps(some, static_cast<const float*>(data) + first);
    case DType::bfloat16: {
      const __m256i half = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(data) + first);
      return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    }
    default:
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(data) + first));
  }
}

// Entries [j, j + count) of row i, at most 16, then zeros; count <= 0: zeros.
SOFTDIMO_ALWAYS_INLINE __m512 read_entries(const Table& t, int64_t i, int64_t j, int64_t count) {
  const int64_t first = t.first + i * t.row + j * t.col;
  if (count <= 0) return __m512{};
  if (t.col == 1) return read_some(t.data, t.dtype, first, smaller(count, 16));
  alignas(64) float wide[16] = {};
  for (int64_t k = 0; k < count && k < 16; ++k) widen(t.data, t.dtype, first + k * t.col, 1, wide + k);
  return _mm512_load_ps(wide);
}

// 16 x 16 lanes of 32 bits: row i becomes column i.
SOFTDIMO_ALWAYS_INLINE void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// 16 rows from row i of a table, entries [j, j + 32), as pairs: lane p of r[m] holds entries j + 2p and j + 2p + 1 of
// row i + m. Zeros beyond the table.
SOFTDIMO_ALWAYS_INLINE void read_pairs(const Table& t, int64_t i, int64_t rows, int64_t j, int64_t columns,
                                       __m512i* r) {
  for (int64_t m = 0; m < 16; ++m) {
    const int64_t count = i + m < rows ? columns - j : 0;
    const __m512 first = read_entries(t, i + m, j, count), second = read_entries(t, i + m, j + 16, count - 16);
    r[m] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  }
}

// 16 columns from column i of a table, rows [j, j + 32), as pairs: lane c of r[p] holds rows j + 2p and j + 2p + 1 of
// column i + c. Zeros beyond the table.
SOFTDIMO_ALWAYS_INLINE void read_pairs_across(const Table& t, int64_t i, int64_t columns, int64_t j, int64_t rows,
                                              __m512i* r) {
  for (int64_t p = 0; p < 16; ++p) {
    const int64_t k = j + 2 * p;
    const __m512 even = read_entries(t, k, i, k < rows ? columns - i : 0);
    const __m512 odd = read_entries(t, k + 1, i, k + 1 < rows ? columns - i : 0);
    r[p] = interleaved((Vec<float>)even, (Vec<float>)odd);
  }
}

// Both operands from bfloat16 whose rows are contiguous: the elements as they are.
inline void copy_right(const Table& t, int64_t depth, int64_t columns, int64_t begin, int64_t end, Bfloat16* b) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const Bfloat16* rows = static_cast<const Bfloat16*>(t.data) + t.first;
  for (int64_t step = begin * kDepthStep; step < end * kDepthStep; step += kDepthStep) {
    for (int64_t n = 0; n < columns; n += kPanel) {
      Bfloat16* out = b + n / kPanel * right_panel(depth) + step * kPanel;
      const __mmask32 some = first_lanes(columns - n);
      for (int64_t k = step; k < step + kDepthStep; k += 2, out += 2 * kPanel) {
        const Bfloat16* row = rows + k * t.row + n;
        const __m512i even = _mm512_maskz_loadu_epi16(k < depth ? some : 0, row);
        const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < depth ? some : 0, row + t.row);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(out + kPanel, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }
}

inline void copy_left(const Table& t, int64_t rows, int64_t depth, Bfloat16* a, int64_t a_row) {
  const Bfloat16* row = static_cast<const Bfloat16*>(t.data) + t.first;
  for (int64_t m = 0; m < rows; ++m, row += t.row) {
    for (int64_t k = 0; k < depth; k += kDepthStep) {
      _mm512_storeu_si512(a + m * a_row + k, _mm512_maskz_loadu_epi16(first_lanes(depth - k), row + k));
    }
  }
}

inline void pack_right(const Table& t, int64_t depth, int64_t columns, int64_t begin, int64_t end, Bfloat16* b) {
  if (t.dtype == DType::bfloat16 && t.col == 1) return copy_right(t, depth, columns, begin, end, b);
  const bool across = t.col == 1 || t.row != 1;
  for (int64_t step = begin; step < end; ++step) {
    for (int64_t n = 0; n < columns; n += kPanel) {
      Bfloat16* out = b + n / kPanel * right_panel(depth) + step * kDepthStep * kPanel;
      for (int64_t half = 0; half < kPanel; half += 16) {
        __m512i pairs[16];
        if (across) {
          read_pairs_across(t, n + half, columns, step * kDepthStep, depth, pairs);
        } else {
          read_pairs({t.data, t.dtype, t.first, t.col, t.row}, n + half, columns, step * kDepthStep, depth, pairs);
          transpose(pairs);
        }
        for (int64_t p = 0; p < 16; ++p) _mm512_storeu_si512(out + (p * kPanel + half) * 2, pairs[p]);
      }
    }
  }
}

inline void pack_right_pair(const float* even, const float* odd, int64_t columns, int64_t depth, int64_t pair,
                            Bfloat16* b) {
  for (int64_t n = 0; n < columns; n += kPanel) {
    Bfloat16* out = b + n / kPanel * right_panel(depth) + pair * kPanel * 2;
    if (n + kPanel <= columns) {
      for (int64_t i = 0; i < kPanel; i += 16) {
        store_right(load(even + n + i), odd != nullptr ? load(odd + n + i) : Vec<float>{}, out + 2 * i);
      }
      continue;
    }
    for (int64_t i = 0; i < kPanel; i += 16) {
      const int64_t count = columns - n - i;
      const __mmask16 some = static_cast<__mmask16>(count > 0 ? first_lanes(count) : 0);
      const __m512 first = _mm512_maskz_loadu_ps(some, even + n + i);
      const __m512 second = _mm512_maskz_loadu_ps(odd != nullptr ? some : 0, odd + n + i);
      store_right((Vec<float>)first, (Vec<float>)second, out + 2 * i);
    }
  }
}

inline void clear_pairs(int64_t columns, int64_t depth, Bfloat16* b) {
  const int64_t used = (depth + 1) / 2 * 2 * kPanel, panel = right_panel(depth);
  for (int64_t n = 0; n < columns; n += kPanel) {
    std::memset(b + n / kPanel * panel + used, 0, static_cast<size_t>(panel - used) * sizeof(Bfloat16));
  }
}

inline void pack_left(const Table& t, int64_t rows, int64_t depth, Bfloat16* a, int64_t a_row) {
  if (t.dtype == DType::bfloat16 && t.col == 1) return copy_left(t, rows, depth, a, a_row);
  const bool across = t.row == 1 && t.col != 1;
  for (int64_t m = 0; m < rows; m += 16) {
    for (int64_t k = 0; k < depth; k += kDepthStep) {
      __m512i pairs[16];
      if (across) {
        read_pairs_across({t.data, t.dtype, t.first, t.col, t.row}, m, rows, k, depth, pairs);
        transpose(pairs);
      } else {
        read_pairs(t, m, rows, k, depth, pairs);
      }
      const int64_t count = smaller(16, rows - m);
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(a + (m + i) * a_row + k, pairs[i]);
    }
  }
}

inline float pack_left_row(const float* row, int64_t depth, Bfloat16* a) {
  Vec<float> sum{};
  for (int64_t k = 0; k < depth; k += kDepthStep) {
    const __mmask32 some = first_lanes(depth - k);
    const Vec<float> first = (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(some), row + k);
    const Vec<float> second = (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(some >> 16), row + k + 16);
    store_left(first, second, a + k);
    sum += rounded(first) + rounded(second);
  }
  return lane_sum<float>(sum);
}

#endif  // __AVX512BF16__

}  // namespace softdimo::cpu::SOFTDIMO_ISA
