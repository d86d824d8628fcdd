// Rows in soft_embedding's gradient of the logits: a lane has runs of 8 neighbouring entries of each of two rows.
#pragma once

#include "softdimo/cuda/row_reduce.cuh"
#include "softdimo/cuda/soft_embedding_entries.cuh"

namespace softdimo::cuda {

constexpr int kRun = 8;                 // neighbouring entries of a lane
constexpr int kQuadEntries = 4 * kRun;  // of the 4 lanes that share a row

// A lane's two rows, 8 positions apart.
template <typename T>
struct Rows {
  const T* logits;       // of the first
  T* dlogits;            // likewise; null where not wanted
  int64_t logits_between, dlogits_between;  // from the first to the second
  bool exists[2], counted[2];  // neither padding; nor masked

  __device__ __forceinline__ Rows(const SoftEmbeddingBackwardParams& p, const RowRecord* records, int64_t group,
                                  int64_t position) {
    const SoftEmbeddingParams& call = p.call;
    const int64_t number = position * call.groups + group, rows_between = 8 * call.groups;
    logits = static_cast<const T*>(call.logits) + number * call.row_stride;
    logits_between = rows_between * call.row_stride;
    dlogits = p.dlogits != nullptr ? static_cast<T*>(p.dlogits) + number * call.vocabulary : nullptr;
    dlogits_between = rows_between * call.vocabulary;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      exists[r] = number + r * rows_between < call.rows;
      counted[r] = __ldg(&records[position + 8 * r].inverse) != 0.0f;
    }
  }
};

// The partials of neighbouring entries, the first ones first.
struct Merge {
  __device__ __forceinline__ RowPartial operator()(const RowPartial& a, const RowPartial& b) const {
    RowPartial sum{a.others + b.others, a.peak > b.peak ? a.peak : b.peak, a.mass + b.mass, 0.0f, 0.0f,
                   a.residual + b.residual};
    if (sum.mass > 0.0f) sum.centre = fmaf(a.mass, a.centre, b.mass * b.centre) / sum.mass;
    // Each slope was taken about its own centre.
    sum.slope = fmaf(a.centre - sum.centre, a.residual, a.slope) + fmaf(b.centre - sum.centre, b.residual, b.slope);
    return sum;
  }
};

__device__ __forceinline__ RowPartial nothing() { return {0.0f, -1, 0.0f, 0.0f, 0.0f, 0.0f}; }

// The slope of a run, about the run's mean: about the maximum, terms several times as large would cancel, and an error
// that all of (t - delta) share would stay.
__device__ __forceinline__ void add_slope(const float (&distance)[kRun], const float (&share)[kRun],
                                          const float (&gradient)[kRun], RowPartial& partial) {
  RowPartial run = nothing();
  float moment = 0.0f;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    run.mass += share[i];
    if (share[i] > 0.0f) moment = fmaf(share[i], distance[i], moment);  // no mass: the distance may be infinite
  }
  if (run.mass > 0.0f) run.centre = moment / run.mass;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    run.residual += gradient[i];
    if (share[i] > 0.0f) run.slope = fmaf(gradient[i], distance[i] - run.centre, run.slope);
  }
  const RowPartial sum = Merge{}(partial, run);
  partial.mass = sum.mass;
  partial.centre = sum.centre;
  partial.slope = sum.slope;
  partial.residual = sum.residual;
}

// A run of gradients; those past the row's end are not written.
template <typename T>
__device__ __forceinline__ void store_run(T* row, int column, int columns, bool aligned, const float (&value)[kRun]) {
  constexpr int kChunk = RowReader<T>::kChunk;
  if (aligned && column + kRun <= columns) {
#pragma unroll
    for (int i = 0; i < kRun / kChunk; ++i) {
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          word[j] = __float_as_uint(value[i * kChunk + j]);
        } else {
          word[j] = pack_pair<T>(value[2 * j], value[2 * j + 1]);
        }
      }
      *reinterpret_cast<uint4*>(row + column + i * kChunk) = make_uint4(word[0], word[1], word[2], word[3]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (column + i < columns) store_as(row + column + i, value[i]);
  }
}

// What does not depend on the lane.
template <bool kPlain>  // neither noise nor slopes
struct Settings {
  Noise<kPlain> noise;
  bool reads_aligned, writes_aligned, slopes, peaked;
};

template <bool kPlain>
__device__ __forceinline__ void subtract_top(const RowRecord& r, const Noise<kPlain>& noise, int column,
                                             float (&z)[kRun]) {
  if (!noise.any()) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) z[i] -= r.top;
    return;
  }
#pragma unroll 1  // half of the registers, and half of the code
  for (int half = 0; half < 2; ++half) {
    float first[4] = {z[0], z[1], z[2], z[3]};
    noise.subtract_top(first, column + 4 * half, r);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      z[i] = z[4 + i];
      z[4 + i] = first[i];
    }
  }
}

// The gradients of a run from its logits z and its t; they replace t.
template <bool kPlain>
__device__ __forceinline__ void run_gradients(const RowRecord& r, const Settings<kPlain>& settings, int column,
                                              float (&z)[kRun], float (&t)[kRun], RowPartial& partial) {
  subtract_top(r, settings.noise, column, z);
  float share[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    share[i] = weight(z[i], r.scale) * r.inverse;
    t[i] = share[i] * (t[i] - r.delta) * r.inverse_t;
  }
  if (settings.peaked) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const bool peak = share[i] > 0.5f;
      partial.others += peak ? 0.0f : t[i];
      if (peak) partial.peak = column + i;
    }
  }
  if (!kPlain && settings.slopes) add_slope(z, share, t, partial);
}

// ---------------------------------------------------------------------------------------------------
// memory

// Logits under way: kRuns runs of each row.
template <typename T, int kRuns>
struct InFlight {
  static constexpr int kWords = kRun * sizeof(T) / 16;  // of a run
  uint4 word[kRuns][2][kWords] = {};

  __device__ __forceinline__ void load(int run, int r, const Rows<T>& rows, int column, int columns, bool aligned) {
    if (!rows.counted[r]) return;
    const T* row = rows.logits + r * rows.logits_between;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      word[run][r][i] = load_chunk(row, column + i * RowReader<T>::kChunk, columns, aligned);
    }
  }

  __device__ __forceinline__ void unpack(int run, int r, float (&z)[kRun]) const {
    constexpr int kChunk = RowReader<T>::kChunk;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float chunk[kChunk];
      RowReader<T>::unpack(word[run][r][i], chunk);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) z[i * kChunk + j] = chunk[j];
    }
  }
};

}  // namespace softdimo::cuda
