// soft_embedding's backward: its two products, dp = G E^T and dE = p^T G, in the types a call may ask for.
#pragma once

#include "gemm_bf16.h"
#include "scratch.h"
#include "soft_embedding_rows.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// One block of rows: those of its positions that are not masked.
struct Block {
  int64_t begin, end, count;
  int64_t rows[kBlockRows];

  // Block `index` of a split of a group.
  Block(const Backward& b, int64_t group, int64_t split, int64_t index) {
    const int64_t positions = b.call.rows / b.call.groups, part = split_rows(b);
    const int64_t last = smaller((split + 1) * part, positions);
    begin = smaller(split * part + index * b.block_rows, last);
    end = smaller(begin + b.block_rows, last);
    count = soft_rows(b.call, group, begin, end, rows);
  }
};

// A slice of the vocabulary: entries [first, first + count), the index-th of the row's slices.
struct Slice {
  int64_t group, split, index, first, count;
};

SOFTDIMO_ALWAYS_INLINE int64_t whole_panels(int64_t count, int64_t panel) { return (count + panel - 1) / panel * panel; }

// ---------------------------------------------------------------------------------------------------
// products

// dp = G E^T in T, dE = p^T G in S. The codebook is packed as [G, panels of V, D, panel width] with zeros beyond V.
template <class Compute, class Sums>
class WideProduct {
 public:
  using T = Compute;
  using S = Sums;

  explicit WideProduct(const Backward& b)
      : b_(b), g_row_(upstream_row(b)), p_row_(whole_panels(b.tile, kPair<T>) + kPad), dp_(b.block_rows * p_row_),
        p_(b.block_rows * p_row_), de_(b.tile * g_row_) {
    std::memset(dp_.get(), 0, static_cast<size_t>(b.block_rows * p_row_) * sizeof(T));  // beyond the panels: finite
  }

  static int64_t packed_bytes(const SoftEmbedding& s) {
    return s.groups * padded<T>(s.vocabulary) * s.width * static_cast<int64_t>(sizeof(T));
  }
  static void pack(const SoftEmbedding& s, void* packed, int64_t begin, int64_t end) {
    const int64_t panel = panel_width<T>(s.vocabulary), wide = padded<T>(s.vocabulary);
    const Scratch<T> rows(panel * s.width);
    for (int64_t i = begin; i < end; ++i) {  // a range of G * V rows packs the panels that begin in it
      const int64_t group = i / s.vocabulary, v = i % s.vocabulary;
      if (v % panel != 0) continue;
      const int64_t count = smaller(panel, s.vocabulary - v);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t source = group * s.codebook_stride[0] + (v + j) * s.codebook_stride[1];
        read_codebook(s, source, 0, s.width, rows.get() + j * s.width);
      }
      T* out = static_cast<T*>(packed) + (group * wide + v) * s.width;
      for (int64_t d = 0; d < s.width; ++d) {
        for (int64_t j = 0; j < count; ++j) out[d * panel + j] = rows[j * s.width + d];
        for (int64_t j = count; j < panel; ++j) out[d * panel + j] = T(0);
      }
    }
  }

  // G as [blocks, block rows, padded D + kPad] in T, and each block once more in S where that differs.
  static int64_t upstream_bytes(const Backward& b) {
    return b.call.groups * b.splits * split_blocks(b) * block_bytes(b);
  }
  // Row m of a block is g, padded with zeros.
  static void pack_row(const Backward& b, int64_t index, int64_t m, const T* g) {
    const int64_t row = upstream_row(b);
    T* out = in_t(b, index) + m * row;
    std::memcpy(out, g, static_cast<size_t>(b.call.width) * sizeof(T));
    for (int64_t d = b.call.width; d < row; ++d) out[d] = T(0);
    if constexpr (sizeof(S) != sizeof(T)) copy_as(out, row, in_s(b, index) + m * row);
  }
  static void pack_block(const Backward&, int64_t, int64_t) {}
  static const char* upstream_at(const Backward& b, int64_t index) {
    return static_cast<const char*>(b.upstream) + index * block_bytes(b);
  }
  static int64_t block_bytes(const Backward& b) {
    return block_size(b) * static_cast<int64_t>(sizeof(S) == sizeof(T) ? sizeof(T) : sizeof(T) + sizeof(S));
  }

  void multiply_codebook(const Slice& slice, int64_t index, int64_t rows, Prefetch* ahead) {
    const SoftEmbedding& s = b_.call;
    const int64_t panel = panel_width<T>(s.vocabulary);
    const T* table = static_cast<const T*>(s.packed_codebook) +
                     (slice.group * padded<T>(s.vocabulary) + slice.first) * s.width;
    gemm<T>(rows, whole_panels(slice.count, panel), s.width, {in_t(b_, index), g_row_, 1}, table, panel * s.width,
            panel, dp_.get(), p_row_, false, ahead);
  }
  const T* dp(int64_t m) const { return dp_.get() + m * p_row_; }

  SOFTDIMO_ALWAYS_INLINE void put(int64_t m, int64_t v, Vec<T> first, Vec<T> second) {
    store_as<S, T>(p_.get() + m * p_row_ + v, first);
    store_as<S, T>(p_.get() + m * p_row_ + v + kLanes<T>, second);
  }

  void multiply_rows(const Slice& slice, int64_t index, int64_t rows, bool add, Prefetch* ahead) {
    const int64_t width = b_.call.width;
    gemm<S>(slice.count, padded<S>(width), rows, {p_.get(), 1, p_row_}, in_s(b_, index), panel_width<S>(width), g_row_,
            de_.get(), g_row_, add, ahead);
  }
  // dE of the slice, [count, D].
  void write(const Slice& slice, S* out) const {
    for (int64_t v = 0; v < slice.count; ++v) {
      std::memcpy(out + v * b_.call.width, de_.get() + v * g_row_, static_cast<size_t>(b_.call.width) * sizeof(S));
    }
  }

 private:
  static int64_t upstream_row(const Backward& b) { return padded<T>(b.call.width) + kPad; }
  static int64_t block_size(const Backward& b) { return b.block_rows * upstream_row(b); }
  static T* in_t(const Backward& b, int64_t index) {
    return reinterpret_cast<T*>(static_cast<char*>(b.upstream) + index * block_bytes(b));
  }
  static S* in_s(const Backward& b, int64_t index) {
    if constexpr (sizeof(S) == sizeof(T)) return in_t(b, index);
    return reinterpret_cast<S*>(in_t(b, index) + block_size(b));
  }

  const Backward& b_;
  const int64_t g_row_, p_row_;
  const Scratch<T> dp_;
  const Scratch<S> p_, de_;
};

#ifdef __AVX512BF16__

// Products in bfloat16: dp from operands that are exact in it, and the transpose of dE, G^T p with p in Terms terms, so
// that p is rounded and stored as the right operand, two rows at a time. The codebook is packed as [G, panels of V].
template <int Terms>
class Bfloat16Product {
 public:
  using T = float;
  using S = float;

  explicit Bfloat16Product(const Backward& b)
      : b_(b), p_row_(whole_panels(b.tile, kPanel) + kPad), p_size_(right_size(b.block_rows, b.tile)),
        dp_(b.block_rows * p_row_), even_(p_row_), p_(Terms * p_size_), de_(b.call.width * p_row_) {}

  static int64_t packed_bytes(const SoftEmbedding& s) {
    return s.groups * right_size(s.width, s.vocabulary) * static_cast<int64_t>(sizeof(Bfloat16));
  }
  static void pack(const SoftEmbedding& s, void* packed, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {  // a range of G * V rows packs the panels that begin in it
      const int64_t group = i / s.vocabulary, v = i % s.vocabulary;
      if (v % kPanel != 0) continue;
      const Table table = group_table(s, group);
      pack_right({table.data, table.dtype, table.first + v * table.row, table.col, table.row}, s.width,
                 smaller(kPanel, s.vocabulary - v), 0, padded_depth(s.width) / kDepthStep,
                 static_cast<Bfloat16*>(packed) + group * right_size(s.width, s.vocabulary) +
                     v / kPanel * right_panel(s.width));
    }
  }

  // G and G^T of every block, as left operands.
  static int64_t upstream_bytes(const Backward& b) {
    return b.call.groups * b.splits * split_blocks(b) * block_bytes(b);
  }
  static void pack_row(const Backward& b, int64_t index, int64_t m, const float* g) {
    pack_left_row(g, b.call.width, in_rows(b, index) + m * upstream_row(b));
  }
  static void pack_block(const Backward& b, int64_t index, int64_t rows) {
    Bfloat16* out = in_rows(b, index);
    pack_left({out, DType::bfloat16, 0, 1, upstream_row(b)}, b.call.width, rows, out + b.block_rows * upstream_row(b),
              transposed_row(b));
  }
  static const char* upstream_at(const Backward& b, int64_t index) {
    return static_cast<const char*>(b.upstream) + index * block_bytes(b);
  }
  static int64_t block_bytes(const Backward& b) { return block_size(b) * static_cast<int64_t>(sizeof(Bfloat16)); }

  void multiply_codebook(const Slice& slice, int64_t index, int64_t rows, Prefetch* ahead) {
    const SoftEmbedding& s = b_.call;
    const Bfloat16* table = static_cast<const Bfloat16*>(s.packed_codebook) +
                            slice.group * right_size(s.width, s.vocabulary) + slice.first / kPanel * right_panel(s.width);
    gemm_bf16(rows, whole_panels(slice.count, kPanel), s.width, in_rows(b_, index), upstream_row(b_), table,
              right_panel(s.width), dp_.get(), p_row_, false, ahead);
  }
  const float* dp(int64_t m) const { return dp_.get() + m * p_row_; }

  SOFTDIMO_ALWAYS_INLINE void put(int64_t m, int64_t v, Vec<float> first, Vec<float> second) {
    if (m % 2 == 0) {
      store(even_.get() + v, first);
      store(even_.get() + v + kLanes<float>, second);
    } else {
      put_pair(m / 2, v, first, second);
    }
  }

  void multiply_rows(const Slice& slice, int64_t index, int64_t rows, bool add, Prefetch* ahead) {
    const int64_t panel = right_panel(b_.block_rows);
    for (int64_t v = 0; v < slice.count; v += kPanel) {
      if (rows % 2 != 0) put_pair(rows / 2, v, Vec<float>{}, Vec<float>{});
      for (int64_t pair = (rows + 1) / 2; pair < padded_depth(rows) / 2; ++pair) clear_pair(pair, v);
    }
    const Bfloat16* left = in_rows(b_, index) + b_.block_rows * upstream_row(b_);
    for (int term = 0; term < Terms; ++term) {
      gemm_bf16(b_.call.width, slice.count, rows, left, transposed_row(b_), p_.get() + term * p_size_, panel, de_.get(),
                p_row_, add || term > 0, term == 0 ? ahead : nullptr);
    }
  }
  // dE of the slice, [count, D].
  void write(const Slice& slice, float* out) const {
    const int64_t width = b_.call.width;
    for (int64_t d = 0; d < width; d += 16) {
      const int64_t columns = smaller(16, width - d);
      for (int64_t v = 0; v < slice.count; v += 16) {
        __m512i block[16];
        for (int64_t i = 0; i < 16; ++i) {
          block[i] = _mm512_loadu_si512(de_.get() + (d + smaller(i, columns - 1)) * p_row_ + v);
        }
        transpose(block);
        for (int64_t j = 0; j < smaller(16, slice.count - v); ++j) {
          float* entry = out + (v + j) * width + d;
          if (columns == 16) {
            _mm512_storeu_si512(entry, block[j]);
          } else {
            std::memcpy(entry, block + j, static_cast<size_t>(columns) * sizeof(float));
          }
        }
      }
    }
  }

 private:
  static int64_t upstream_row(const Backward& b) { return padded_depth(b.call.width) + kLeftPad; }
  static int64_t transposed_row(const Backward& b) { return padded_depth(b.block_rows) + kLeftPad; }
  static int64_t block_size(const Backward& b) {
    return b.block_rows * upstream_row(b) + b.call.width * transposed_row(b);
  }
  static Bfloat16* in_rows(const Backward& b, int64_t index) {
    return static_cast<Bfloat16*>(b.upstream) + index * block_size(b);
  }

  Bfloat16* pair_at(int64_t pair, int64_t v) const {
    return p_.get() + v / kPanel * right_panel(b_.block_rows) + pair * kPanel * 2;
  }
  SOFTDIMO_ALWAYS_INLINE void put_pair(int64_t pair, int64_t v, Vec<float> first, Vec<float> second) {
    Bfloat16* out = pair_at(pair, v);
    Vec<float> even_first = load(even_.get() + v), even_second = load(even_.get() + v + kLanes<float>);
    for (int term = 0; term < Terms; ++term) {
      store_right(even_first, first, out + term * p_size_);
      store_right(even_second, second, out + term * p_size_ + kPanel);
      even_first -= rounded(even_first);
      even_second -= rounded(even_second);
      first -= rounded(first);
      second -= rounded(second);
    }
  }
  void clear_pair(int64_t pair, int64_t v) {
    for (int term = 0; term < Terms; ++term) {
      std::memset(pair_at(pair, v) + term * p_size_, 0, kPanel * 2 * sizeof(Bfloat16));
    }
  }

  const Backward& b_;
  const int64_t p_row_, p_size_;
  const Scratch<float> dp_, even_;
  const Scratch<Bfloat16> p_;
  const Scratch<float> de_;
  const ProductScope scope_;
};

#endif

}  // namespace
}  // namespace softdimo::cpu::SOFTDIMO_ISA
