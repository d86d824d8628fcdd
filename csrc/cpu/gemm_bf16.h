// Products of bfloat16 matrices with float32 sums: C[M, N] (+)= A[M, K] B[K, N], where the instruction set has them.
//
// A and B are packed as pack_bf16.h says; C is float32, written up to padded_columns(N). A product over K entries from
// entry k of larger A and B, k a multiple of 32: A + k and B + 32 k, the panels as far apart as they are.
//
// Rounding: products of bfloat16 are exact in float32. The sum of one entry of C takes the K entries in order, rounded
// to float32: in one chain of multiply-adds (avx512_bf16), or in steps of 32 whose even and odd products are chains of
// their own (amx_bf16). So an entry's bits depend on its row of A, its column of B and the way K was cut into calls,
// never on its neighbours. Both instructions take subnormal numbers for zero, in and out.
#pragma once

#include "gemm.h"
#include "pack_bf16.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Where there are tile registers they are configured while one of these lives: one per range of tasks, on the thread
// that multiplies, around every call of gemm_bf16. Nothing else may use tile registers meanwhile.
class ProductScope {
 public:
  ProductScope();
  ~ProductScope();
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;
};

void gemm_bf16(int64_t rows, int64_t columns, int64_t depth, const Bfloat16* a, int64_t a_row, const Bfloat16* b,
               int64_t b_panel, float* c, int64_t c_row, bool add, Prefetch* prefetch = nullptr);

#ifdef __AMX_BF16__

// What ldtilecfg reads. Tiles 0-3: C, two by two; 4, 5: A, upper and lower rows; 6, 7: B, left and right columns.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

// For blocks of `rows` rows, at most 32.
SOFTDIMO_ALWAYS_INLINE void configure_tiles(int64_t rows) {
  TileConfiguration tiles;
  const uint8_t upper = static_cast<uint8_t>(smaller(rows, 16));
  const uint8_t lower = static_cast<uint8_t>(rows > 16 ? rows - 16 : 16);  // unused: any
  const uint8_t counts[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  std::memcpy(tiles.rows, counts, sizeof counts);
  asm volatile("" : : "r"(&tiles) : "memory");  // the intrinsic says that it reads eight bytes: there are 64
  _tile_loadconfig(&tiles);
}

inline ProductScope::ProductScope() { configure_tiles(2 * 16); }
inline ProductScope::~ProductScope() { _tile_release(); }

// Memory that follows, fetched into the second-level cache: `lines` lines with each step.
struct Following {
  const char* at;
  int64_t lines;
};

// A block of MT x NT tiles of C: sums over `steps` steps of K in the tile registers.
template <int MT, int NT>
__attribute__((noinline)) void tile_block(int64_t steps, const Bfloat16* a, int64_t a_row, const Bfloat16* b, float* c,
                                          int64_t c_row, bool add, Following following, Prefetch* prefetch) {
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  const int64_t a_bytes = a_row * 2, b_bytes = kPanel * 4, c_bytes = c_row * 4;
  float* const c_low = c + 16 * c_row;
  const Bfloat16* const a_low = a + 16 * a_row;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (NT == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (MT == 2) _tile_loadd(2, c_low, c_bytes);
    if constexpr (MT == 2 && NT == 2) _tile_loadd(3, c_low + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (NT == 2) _tile_zero(1);
    if constexpr (MT == 2) _tile_zero(2);
    if constexpr (MT == 2 && NT == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    if (prefetch != nullptr) prefetch->step();
    for (int64_t i = 0; i < following.lines; ++i, following.at += 64) __builtin_prefetch(following.at, 0, 2);
    const Bfloat16* right = b + k * kDepthStep * kPanel;
    _tile_loadd(4, a + k * kDepthStep, a_bytes);
    _tile_loadd(6, right, b_bytes);
    if constexpr (MT == 2) _tile_loadd(5, a_low + k * kDepthStep, a_bytes);
    if constexpr (NT == 2) _tile_loadd(7, right + 32, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (MT == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (NT == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (MT == 2 && NT == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (NT == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (MT == 2) _tile_stored(2, c_low, c_bytes);
  if constexpr (MT == 2 && NT == 2) _tile_stored(3, c_low + 16, c_bytes);
  asm volatile("" ::: "memory");
}

// All columns of blocks of `height` rows, at most 32, which the tiles are configured for; at least one row. K is split
// evenly into chunks of about kResidentSteps, so that a chunk of a panel of B stays in the first-level cache; C is exact
// in between. The next panel is fetched meanwhile: B as a whole may be larger than the second-level cache.
constexpr int64_t kResidentSteps = 8;

SOFTDIMO_ALWAYS_INLINE void row_blocks(int64_t rows, int64_t height, int64_t columns, int64_t steps, const Bfloat16* a,
                                       int64_t a_row, const Bfloat16* b, int64_t b_panel, float* c, int64_t c_row,
                                       bool add, Prefetch* prefetch) {
  const int64_t chunks = steps < kResidentSteps ? 1 : (steps + kResidentSteps / 2) / kResidentSteps;
  const int64_t lines = (kPanel * height + rows - 1) / rows;
  for (int64_t chunk = 0, k = 0; chunk < chunks; ++chunk) {
    const int64_t count = (steps - k) / (chunks - chunk);
    for (int64_t n = 0; n < columns; n += kPanel) {
      const bool wide = columns - n > 16;
      const auto both = wide ? tile_block<2, 2> : tile_block<2, 1>, upper = wide ? tile_block<1, 2> : tile_block<1, 1>;
      const auto block = height > 16 ? both : upper;
      const Bfloat16* right = b + n / kPanel * b_panel + k * kDepthStep * kPanel;
      Following following{reinterpret_cast<const char*>(right + b_panel), n + kPanel < columns ? lines : 0};
      for (int64_t m = 0; m < rows; m += height, following.at += count * following.lines * 64) {
        block(count, a + m * a_row + k * kDepthStep, a_row, right, c + m * c_row + n, c_row, add || k > 0, following,
              prefetch);
      }
    }
    k += count;
  }
}

inline void gemm_bf16(int64_t rows, int64_t columns, int64_t depth, const Bfloat16* a, int64_t a_row, const Bfloat16* b,
                      int64_t b_panel, float* c, int64_t c_row, bool add, Prefetch* prefetch) {
  const int64_t steps = padded_depth(depth) / kDepthStep, whole = rows / 32 * 32, rest = rows - whole;
  if (prefetch != nullptr) prefetch->start((rows + 31) / 32 * ((columns + kPanel - 1) / kPanel) * steps);
  if (whole > 0) row_blocks(whole, 32, columns, steps, a, a_row, b, b_panel, c, c_row, add, prefetch);
  if (rest == 0) return;
  configure_tiles(rest);  // tiles of the shape that is left
  row_blocks(rest, rest, columns, steps, a + whole * a_row, a_row, b, b_panel, c + whole * c_row, c_row, add, prefetch);
  configure_tiles(2 * 16);
}

#elif defined(__AVX512BF16__)

inline ProductScope::ProductScope() {}
inline ProductScope::~ProductScope() {}

// MR rows of NV vectors of C in registers, as in gemm.h; one step of the loop takes a pair of entries of K.
template <int MR, int NV>
__attribute__((noinline)) void pair_tile(int64_t pairs, const Bfloat16* a, int64_t a_row, const Bfloat16* b, float* c,
                                         int64_t c_row, bool add, Prefetch* prefetch) {
  __m512 sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) sum[m][n] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs;) {
    if (prefetch != nullptr) prefetch->step();
    for (const int64_t end = smaller(pairs, k + kDepthStep / 2); k < end; ++k) {
      __m512bh right[NV];
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + (k * kPanel + n * 16) * 2);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        int32_t pair;
        std::memcpy(&pair, a + m * a_row + 2 * k, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      float* out = c + m * c_row + n * 16;
      _mm512_storeu_ps(out, add ? _mm512_add_ps(sum[m][n], _mm512_loadu_ps(out)) : sum[m][n]);
    }
  }
}

template <int NV, int MR = kTileRows>
SOFTDIMO_ALWAYS_INLINE void pair_tile_of(int rows, int64_t pairs, const Bfloat16* a, int64_t a_row, const Bfloat16* b,
                                         float* c, int64_t c_row, bool add, Prefetch* prefetch) {
  if constexpr (MR > 1) {
    if (rows < MR) return pair_tile_of<NV, MR - 1>(rows, pairs, a, a_row, b, c, c_row, add, prefetch);
  }
  pair_tile<MR, NV>(pairs, a, a_row, b, c, c_row, add, prefetch);
}

inline void gemm_bf16(int64_t rows, int64_t columns, int64_t depth, const Bfloat16* a, int64_t a_row, const Bfloat16* b,
                      int64_t b_panel, float* c, int64_t c_row, bool add, Prefetch* prefetch) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, pairs = (depth + 1) / 2;
  const int64_t steps = padded_depth(depth) / kDepthStep;
  if (prefetch != nullptr) prefetch->start(tiles * ((columns + kPanel - 1) / kPanel) * steps);
  for (int64_t n = 0; n < columns; n += kPanel) {
    const Bfloat16* right = b + n / kPanel * b_panel;
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int count = static_cast<int>((rows - m) / (tiles - i));
      const Bfloat16* left = a + m * a_row;
      float* out = c + m * c_row + n;
      if (columns - n > 16) {
        pair_tile_of<2>(count, pairs, left, a_row, right, out, c_row, add, prefetch);
      } else {
        pair_tile_of<1>(count, pairs, left, a_row, right, out, c_row, add, prefetch);
      }
      m += count;
    }
  }
}

#endif

}  // namespace softdimo::cpu::SOFTDIMO_ISA
