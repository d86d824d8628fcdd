// Tiles of the codebook in shared memory, and products of p with them, for soft_embedding's forward.
//
// A warp multiplies 16 rows of p with 16 entries of the codebook at a time. The sum over entries may be taken in any
// order, so that the order is the one in which a lane has them when it loads 16 bytes of a row of logits:
//
//   a row of logits      |  lane 0: 16 bytes  |  lane 1: 16 bytes  |  lane 2  |  lane 3  |     the quad of a row
//   16-bit logits          0 1 2 3 4 5 6 7      8 9 ...                                        two steps of 16 entries
//   step 0, place k        0 1 8 9              2 3 10 11            4 5 ..     6 7 ..
//   step 1                         0 1 8 9              2 3 10 11
//   float32 logits         0 1 8 9              2 3 10 11 ...                                  one step
//
// Places k of the left factor are then registers that the lane has already; for the right factor every lane of ldmatrix
// names the row that it wants. Rows of a tile lie as they are, their 16-byte pieces swizzled by the row's place k % 8
// so that the eight rows of one matrix are in eight different banks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/soft_embedding.h"

namespace softdimo::cuda {

// The codebook as products take it: rows of 16-bit numbers, 16 bytes aligned.
struct CodebookRows {
  const uint16_t* data;
  int64_t term_stride, group_stride;
  int stride;
};

// kBytes: of a logit. kTerms: of p; 3 means that the codebook has three too. kWidth: padded columns of the codebook.
template <int kLogitBytes, int kProductTerms, int kColumns, bool kWithNoise>
struct ForwardShape {
  static constexpr int kBytes = kLogitBytes, kTerms = kProductTerms, kWidth = kColumns;
  static constexpr bool kNoise = kWithNoise;

  static constexpr int kWord = 16 / kBytes;  // logits of 16 bytes
  static constexpr int kWords = kNoise || kTerms == 3 || kWidth == 128 ? 1 : 2;  // a lane has of a row in a unit
  static constexpr int kUnit = 4 * kWords * kWord;  // columns that share one look at the running maximum
  static constexpr int kUnits = kNoise || (kTerms == 3 && kWidth == 128 && kBytes == 2) ? 1 : 2;
  static constexpr int kTile = kUnits * kUnit;  // entries of the codebook between two barriers
  static constexpr int kTileWords = kTile / kWord;
  static constexpr int kSteps = kUnit / 16;
  static constexpr bool kRolled = kTerms == 3 && kBytes == 2;  // a loop over steps, for want of registers

  static constexpr int kPlanes = kTerms == 3 ? 3 : 1;
  static constexpr int kPlaneBytes = 2 * kTile * kWidth;
  static constexpr int kStageBytes = kPlanes * kPlaneBytes;
  static constexpr int kStages = 3;
  // Threads of a block at most: registers and shared memory hold one such block.
  static constexpr int kThreads = kWidth == 128 || kTerms == 3 ? 256 : 384;
};

template <class Shape>
class CodebookTiles {
 public:
  __device__ __forceinline__ CodebookTiles(const CodebookRows& rows, int64_t group, int entries, unsigned char* shared)
      : rows_(rows), data_(rows.data + group * rows.group_stride), entries_(entries), shared_(shared) {
    const int lane = threadIdx.x % 32, place = lane % 8, half = lane / 8 % 2, right = lane / 16;
    const int entry = place / 2 * Shape::kWord + 2 * half + place % 2;
    lane_ = entry * kRowBytes + 16 * (right ^ place);
  }

  // Starts copying a tile into its stage; entries past the last are zeros.
  __device__ __forceinline__ void start(int tile) const {
    unsigned char* to = shared_ + tile % Shape::kStages * Shape::kStageBytes;
    const int piece = threadIdx.x % kPieces;
#pragma unroll 1
    for (int row = threadIdx.x / kPieces; row < Shape::kPlanes * Shape::kTile; row += blockDim.x / kPieces) {
      const int entry = tile * Shape::kTile + row % Shape::kTile;
      const bool exists = entry < entries_;
      const uint16_t* source = data_ + static_cast<int64_t>(exists ? entry : 0) * rows_.stride + piece * 8;
      if (Shape::kPlanes > 1) source += row / Shape::kTile * rows_.term_stride;
      const int place = row / Shape::kWord % 4 * 2 + row % 2;
      ptx::copy_async_16(to + row * kRowBytes + 16 * (piece ^ place), source, exists ? 16 : 0);
    }
  }

  __device__ __forceinline__ const unsigned char* stage(int tile) const {
    return shared_ + tile % Shape::kStages * Shape::kStageBytes;
  }

  // The right factors of 16 columns for a step of a unit: b[0], b[1] and b[2], b[3] are 8 columns each.
  __device__ __forceinline__ void load(const unsigned char* stage, int unit, int step, int plane, int column,
                                       uint32_t (&b)[4]) const {
    const int entry = unit * Shape::kUnit + (Shape::kBytes == 2 ? step / 2 * 32 + step % 2 * 4 : step * 16);
    const int piece = column / 8;
    ptx::load_matrix_x4_transposed(b, stage + plane * Shape::kPlaneBytes + entry * kRowBytes +
                                          piece / kSwizzled * kSwizzled * 16 + (lane_ ^ piece % kSwizzled * 16));
  }

 private:
  static constexpr int kRowBytes = 2 * Shape::kWidth;
  static constexpr int kPieces = Shape::kWidth / 8;  // 16 bytes each, of a row
  static constexpr int kSwizzled = 8;                // pieces among which they change places

  const CodebookRows& rows_;  // of the kernel's arguments
  const uint16_t* data_;
  int entries_;
  unsigned char* shared_;
  int lane_;  // bytes between a stage and what the lane reads of the first step's first columns
};

// ---------------------------------------------------------------------------------------------------
// products

// p of one step in a lane: row r, place as ordered above.
using StepWeights = float[2][4];

// The left factor of `count` 16-bit terms whose sum is p: each the rest of those before it, rounded to nearest.
template <int kCount, bool kHalf>
__device__ __forceinline__ void split_rounded(StepWeights& p, uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // register i: row i % 2, places 2 (i / 2) and the next
    float& x = p[i % 2][i / 2 * 2];
    float& y = p[i % 2][i / 2 * 2 + 1];
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      a[t][i] = kHalf ? ptx::pack_f16(x, y) : ptx::pack_bf16(x, y);
      if (t + 1 == kCount) continue;
      const float2 rounded = kHalf ? unpack_pair<__half>(a[t][i]) : unpack_pair<__nv_bfloat16>(a[t][i]);
      x -= rounded.x;
      y -= rounded.y;
    }
  }
}

// The left factor in three bfloat16 terms whose sum is p to the last bit: cut off, not rounded, since that is cheaper.
__device__ __forceinline__ void split_exact(StepWeights& p, uint32_t (&a)[3][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x = p[i % 2][i / 2 * 2], y = p[i % 2][i / 2 * 2 + 1];
#pragma unroll
    for (int t = 0; t < 3; ++t) {
      const uint32_t low = __float_as_uint(x), high = __float_as_uint(y);
      a[t][i] = low >> 16 | (high & 0xffff0000u);
      x -= __uint_as_float(low & 0xffff0000u);
      y -= __uint_as_float(high & 0xffff0000u);
    }
  }
}

// Sums over entries of p and of p E, for 16 rows of a warp. d[i][0], d[i][1]: row lane / 4, columns 8 i + 2 (lane % 4)
// and the next; d[i][2], d[i][3]: the row 8 below.
template <class Shape>
struct Accumulators {
  static constexpr int kBlocks = Shape::kWidth / 8;
  float d[kBlocks][4];
  float weight[4];  // of p as the products took it; with three terms that is p

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& block : d) block[0] = block[1] = block[2] = block[3] = 0.0f;
    weight[0] = weight[1] = weight[2] = weight[3] = 0.0f;
  }

  __device__ __forceinline__ void scale(float first, float second) {
    const auto by_row = [&](float(&block)[4]) {
      block[0] *= first;
      block[1] *= first;
      block[2] *= second;
      block[3] *= second;
    };
#pragma unroll
    for (auto& block : d) by_row(block);
    if constexpr (Shape::kTerms < 3) by_row(weight);
  }

  // A step with a 16-bit codebook. The sum of p comes from a product too, with ones.
  template <bool kHalf>
  __device__ __forceinline__ void add_narrow(const CodebookTiles<Shape>& tiles, const unsigned char* stage,
                                             int unit, int step, StepWeights& p) {
    constexpr uint32_t kOnes = kHalf ? 0x3c003c00u : 0x3f803f80u;
    const uint32_t ones[2] = {kOnes, kOnes};
    uint32_t a[Shape::kTerms][4];
    split_rounded<Shape::kTerms, kHalf>(p, a);
    const auto multiply = [&](float(&sum)[4], const uint32_t(&b)[2]) {
#pragma unroll
      for (int t = Shape::kTerms - 1; t >= 0; --t) kHalf ? ptx::mma_f16(sum, a[t], b) : ptx::mma_bf16(sum, a[t], b);
    };
    multiply(weight, ones);
#pragma unroll
    for (int i = 0; i < kBlocks; i += 2) {
      uint32_t b[4];
      tiles.load(stage, unit, step, 0, 8 * i, b);
      multiply(d[i], {b[0], b[1]});
      multiply(d[i + 1], {b[2], b[3]});
    }
  }

  // A step with a float32 codebook: six products of terms, down to 2^-24 of the largest. Tensor cores cut their sums
  // off, so a step's sum starts from zero, with the largest product last, and joins the others by an ordinary addition.
  __device__ __forceinline__ void add_wide(const CodebookTiles<Shape>& tiles, const unsigned char* stage,
                                           int unit, int step, StepWeights& p) {
    uint32_t a[3][4];
    split_exact(p, a);
#pragma unroll
    for (int i = 0; i < kBlocks; i += 2) {
      __syncwarp();  // bounds how many right factors the compiler loads ahead, into registers it lacks
      float sum[2][4] = {};
#pragma unroll
      for (int t = 2; t >= 0; --t) {
        uint32_t b[4];
        tiles.load(stage, unit, step, t, 8 * i, b);
#pragma unroll
        for (int term = 2 - t; term >= 0; --term) {
          ptx::mma_bf16(sum[0], a[term], {b[0], b[1]});
          ptx::mma_bf16(sum[1], a[term], {b[2], b[3]});
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        d[i][k] += sum[0][k];
        d[i + 1][k] += sum[1][k];
      }
    }
  }
};

}  // namespace softdimo::cuda
