// How a warp of soft_embedding's forward takes its 16 rows through the vocabulary.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/soft_embedding_logits.cuh"
#include "softdimo/cuda/soft_embedding_sums.cuh"
#include "softdimo/cuda/soft_embedding_tiles.cuh"
#include "softdimo/cuda/soft_embedding_units.cuh"
#include "softdimo/philox.h"

namespace softdimo::cuda {

constexpr int kChunk = 1024;   // entries whose sums start from zero
constexpr int kWarpRows = 16;  // rows of a warp

struct ForwardArguments {
  SoftEmbeddingForwardParams p;
  CodebookRows codebook;
  ChunkSums sums;  // null: a block walks over all chunks
  int chunks;      // of the vocabulary
};

// A warp's 16 rows on their way through the vocabulary. A lane has rows lane / 4 and 8 below, and of those the words
// lane % 4 of every four.
template <class Shape>
class WarpRows {
 public:
  // `totals`: the warp's part of shared memory, for sums of the chunks so far.
  __device__ __forceinline__ WarpRows(const ForwardArguments& a, int64_t group, int64_t first_position, char* totals)
      : a_(a),
        words_{words(lane_row(group, first_position, 0)), words(lane_row(group, first_position, 1))},
        totals_(reinterpret_cast<float*>(totals)),
        half_(a.p.call.codebook_type == DType::float16) {
    if constexpr (Shape::kNoise) {
      key_ = static_cast<uint64_t>(__ldg(a.p.call.seed));
      offset_ = static_cast<uint32_t>(__ldg(a.p.call.seed + 1));
    }
    if (threadIdx.x % 32 == 0) *place() = {group, first_position};
    plain_end_ = min(words_[0].plain_end(), words_[1].plain_end());
#pragma unroll
    for (int i = 1; i < 32; i *= 2) plain_end_ = min(plain_end_, __shfl_xor_sync(kAll, plain_end_, i));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const SoftEmbeddingParams& call = a.p.call;
      const int64_t row = lane_row(group, first_position, r);
      scale_[r] = words_[r].exists() ? exponent_scale(call, row) : 1.0f;
      id_[r] = row;
      if (call.row_ids != nullptr && words_[r].exists()) id_[r] = __ldg(call.row_ids + id_[r] * call.row_ids_stride);
      const uint32_t fill = minus_infinity_bits(call.logits_type);
      for (auto& unit : asked_) {
        for (uint4& word : unit[r]) word = make_uint4(fill, fill, fill, fill);
      }
    }
    clear();
  }

  // Whether there is anything to read; the same in all lanes.
  __device__ __forceinline__ bool works() const { return plain_end_ != INT32_MAX; }

  __device__ __forceinline__ void ask(int tile) {
#pragma unroll
    for (int u = 0; u < Shape::kUnits; ++u) ask(tile, u);
  }

  // Adds a tile, and asks for `next` where that is one.
  __device__ __forceinline__ void add(const CodebookTiles<Shape>& tiles, int tile, int next) {
    const unsigned char* stage = tiles.stage(tile);
#pragma unroll
    for (int u = 0; u < Shape::kUnits; ++u) {
      get(tile, u);
      auto unit = entries(tile, u);
      if constexpr (Shape::kNoise) ask(next, u);
      raise(unit, word(tile, u, 0));
      float sum[2] = {0.0f, 0.0f};
      if constexpr (Shape::kRolled) {
#pragma unroll 1
        for (int step = 0; step < Shape::kSteps; ++step) {  // entries move up to those of step 0
          add_step(tiles, stage, u, unit, 0, step, sum);
          unit.move_up();
        }
      } else {
#pragma unroll
        for (int step = 0; step < Shape::kSteps; ++step) {
          add_step(tiles, stage, u, unit, step, step, sum);
          constexpr int kWordSteps = Shape::kSteps / Shape::kWords;
          if (!Shape::kNoise && step % kWordSteps == kWordSteps - 1) ask(next, u, step / kWordSteps);
        }
      }
      if constexpr (Shape::kRolled && !Shape::kNoise) ask(next, u);
#pragma unroll
      for (int r = 0; r < 2; ++r) sum_[r] += sum[r];
    }
  }

  // Joins the chunk with those before it; the last one's sums become results.
  __device__ __forceinline__ void end_chunk(int chunk) {
    const bool alone = a_.sums.rows != nullptr;
    RowSums sums[2] = {chunk_sums(0), chunk_sums(1)};
    RowSums* before = row_sums() + threadIdx.x % 32 / 4;
    Factors factor[2];
    if (chunk > 0 && !alone) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        RowSums all = before[8 * r];
        factor[r] = join(all, sums[r], scale_[r]);
        sums[r] = all;
      }
      __syncwarp();
    }
    if (threadIdx.x % 4 == 0) {
      before[0] = sums[0];
      before[8] = sums[1];
    }
    float* total = totals_ + threadIdx.x % 32 / 4 * kPitch + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < Accumulators<Shape>::kBlocks; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& sum = total[k / 2 * 8 * kPitch + 8 * i + k % 2];
        sum = chunk > 0 && !alone ? join(sum, products_.d[i][k], factor[k / 2]) : products_.d[i][k];
      }
    }
    clear();
    __syncwarp();
    if (alone) {
      write_chunk(chunk);
    } else if (chunk + 1 == a_.chunks) {
      write_results();
    }
  }

  static constexpr int kPitch = Shape::kWidth + 8;  // floats of a row of the sums: no two lanes in one bank
  static constexpr int kSharedBytes = kWarpRows * (kPitch * 4 + static_cast<int>(sizeof(RowSums))) + 16;

 private:
  // Which rows the warp has. Kept in shared memory, since it is needed at the beginning and at the end.
  struct alignas(16) Place {
    int64_t group, position;
  };

  __device__ __forceinline__ RowSums* row_sums() const {
    return reinterpret_cast<RowSums*>(totals_ + kWarpRows * kPitch);
  }
  __device__ __forceinline__ Place* place() const { return reinterpret_cast<Place*>(row_sums() + kWarpRows); }

  __device__ __forceinline__ int64_t lane_row(int64_t group, int64_t first_position, int r) const {
    return (first_position + threadIdx.x % 32 / 4 + 8 * r) * a_.p.call.groups + group;
  }

  __device__ __forceinline__ RowWords<Shape::kBytes> words(int64_t row) const {
    const SoftEmbeddingParams& call = a_.p.call;
    const bool read = row < call.rows && !is_masked(call, row);
    const char* logits = static_cast<const char*>(call.logits) + row * call.row_stride * Shape::kBytes;
    return RowWords<Shape::kBytes>(call, read ? logits : nullptr);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top_[r] = {-INFINITY, 0.0f};
      sum_[r] = 0.0f;
      peak_[r] = 0;
    }
    products_.clear();
  }

  __device__ __forceinline__ int word(int tile, int u, int i) const {
    return tile * Shape::kTileWords + (u * Shape::kWords + i) * 4 + static_cast<int>(threadIdx.x % 4);
  }

  __device__ __forceinline__ void ask(int tile, int u) {
#pragma unroll
    for (int i = 0; i < Shape::kWords; ++i) ask(tile, u, i);
  }

  // Nothing where there is no such tile.
  __device__ __forceinline__ void ask(int tile, int u, int i) {
    if (tile < 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (is_plain(tile)) {
        words_[r].load(word(tile, u, i), asked_[u][r][i]);
      } else {
        words_[r].prefetch(word(tile, u, i));
      }
    }
  }

  __device__ __forceinline__ void get(int tile, int u) {
    if (is_plain(tile)) return;
#pragma unroll
    for (int i = 0; i < Shape::kWords; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) asked_[u][r][i] = words_[r].fetch(word(tile, u, i));
    }
  }

  __device__ __forceinline__ bool is_plain(int tile) const { return (tile + 1) * Shape::kTileWords <= plain_end_; }

  __device__ __forceinline__ auto entries(int tile, int u) {
    Unit<Shape> unit{asked_[u], a_.p.call.logits_type};
    if constexpr (!Shape::kNoise) {
      return unit;
    } else {
      NoisyUnit<Shape> noisy;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < Unit<Shape>::kCount; i += 4) {
          add_noise(r, word(tile, u, 0) * Shape::kWord + i, unit, i, noisy);
        }
      }
      return noisy;
    }
  }

  // Four neighbouring entries, the first in column `column`, a multiple of 4.
  __device__ __forceinline__ void add_noise(int r, int column, const Unit<Shape>& unit, int first,
                                            NoisyUnit<Shape>& noisy) const {
    const Words random =
        philox4x32(key_, static_cast<uint64_t>(id_[r]), static_cast<uint32_t>(column / 4), offset_);
#pragma unroll
    for (int i = first; i < first + 4; ++i) {
      noisy.y[r][i] = sum_pair(unit.at(r, i).high, gumbel(open_uniform(random.word[i - first])));
    }
  }

  // Raises the running maxima to those of the unit, and rescales the sums. `first`: the lane's first word.
  template <class AnyUnit>
  __device__ __forceinline__ void raise(const AnyUnit& unit, int first) {
    FloatPair top[2];
    bool raises[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = unit.greatest(r, top_[r]);
      raises[r] = is_greater(top[r], top_[r]);
    }
    if (!__any_sync(kAll, raises[0] || raises[1])) return;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (a_.p.hard) {
        const int place = first_equal(unit, r, top[r]);
        const int column = (first + place / Shape::kWord * 4) * Shape::kWord + place % Shape::kWord;
        const int least = least_of_quad(place < AnyUnit::kCount ? column : INT32_MAX);
        if (raises[r]) peak_[r] = least;
      }
      factor[r] = decay(top_[r], top[r], scale_[r]);
      sum_[r] *= factor[r];
      top_[r] = top[r];
    }
    products_.scale(factor[0], factor[1]);
  }

  // exp((y - top) / T) of the entries of one step; in float16 products, 2^15 times that.
  template <class AnyUnit>
  __device__ __forceinline__ void weights(const AnyUnit& unit, int step, StepWeights& w, float (&sum)[2]) const {
    constexpr int kWordSteps = Shape::kSteps / Shape::kWords;
    const float shift = Shape::kTerms < 3 && half_ ? 15.0f : 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Where nothing is above -inf yet, all weights are 0, and NaN stays NaN.
      const FloatPair top = top_[r].high == -INFINITY ? FloatPair{0.0f, 0.0f} : top_[r];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const FloatPair value = unit.at(r, step / kWordSteps * Shape::kWord + step % kWordSteps * 4 + k);
        float distance = value.high - top.high;
        if constexpr (Shape::kNoise) distance += value.low - top.low;
        w[r][k] = ptx::exp2_approx(fmaf(distance, scale_[r], shift));
        sum[r] += w[r][k];
      }
    }
  }

  // Step `step` of a unit, whose entries are in the places of step `from`.
  template <class AnyUnit>
  __device__ __forceinline__ void add_step(const CodebookTiles<Shape>& tiles, const unsigned char* stage, int u,
                                           const AnyUnit& unit, int from, int step, float (&sum)[2]) {
    StepWeights w;
    weights(unit, from, w, sum);
    if constexpr (Shape::kTerms == 3) {
      products_.add_wide(tiles, stage, u, step, w);
    } else if (half_) {
      products_.template add_narrow<true>(tiles, stage, u, step, w);
    } else {
      products_.template add_narrow<false>(tiles, stage, u, step, w);
    }
  }

  __device__ __forceinline__ RowSums chunk_sums(int r) const {
    const float sum = sum_of_quad(sum_[r]) * (Shape::kTerms < 3 && half_ ? 0x1p-15f : 1.0f);
    return {top_[r], sum, Shape::kTerms < 3 ? products_.weight[2 * r] : sum, peak_[r]};
  }

  // visit(row, column, sum, sums of the row), for what the warp has in shared memory; the lanes along columns.
  template <typename Visit>
  __device__ __forceinline__ void each_value(const Visit& visit) const {
    const SoftEmbeddingParams& call = a_.p.call;
    const int width = static_cast<int>(call.width), lane = threadIdx.x % 32;
    const Place place = *this->place();
#pragma unroll 1
    for (int i = lane; i < kWarpRows * width; i += 32) {
      const int m = i / width, d = i % width;
      const int64_t row = (place.position + m) * call.groups + place.group;
      if (row < call.rows) visit(row, d, totals_[m * kPitch + d], row_sums()[m]);
    }
  }

  __device__ __forceinline__ void write_results() const {
    each_value([&](int64_t row, int d, float products, const RowSums& sums) {
      write_result(a_.p, row, d, products, sums);
    });
  }

  __device__ __forceinline__ void write_chunk(int chunk) const {
    const int64_t first = chunk * a_.p.call.rows;
    each_value([&](int64_t row, int d, float products, const RowSums& sums) {
      a_.sums.products[(first + row) * a_.p.call.width + d] = products;
      if (d == 0) a_.sums.rows[first + row] = sums;
    });
  }

  const ForwardArguments& a_;
  const RowWords<Shape::kBytes> words_[2];
  float* const totals_;
  const bool half_;  // products of float16
  int plain_end_;    // words before this one are plain in every row of the warp
  int64_t id_[2];    // of the rows' noise
  uint64_t key_;
  uint32_t offset_;
  uint4 asked_[Shape::kUnits][2][Shape::kWords];
  float scale_[2];
  FloatPair top_[2];
  float sum_[2];  // the lane's part
  int peak_[2];
  Accumulators<Shape> products_;
};

}  // namespace softdimo::cuda
