// What the kernels of soft_embedding for tiny vocabularies share: rows in registers, the codebook in shared memory.
//
// A block works in one group. A team of kTeam neighbouring threads holds a row, 16 entries per thread, in chunks of 16
// bytes, and takes one or two rows at a time; where there are many, a block does so several times.
//
//   row         chunk 0 | chunk 1 | ... | chunk kTeam-1 | chunk kTeam | ...            kTeam: 4, 8, 16 for V up to
//   thread      0         1               kTeam-1         0                                   64, 128, 256
//   slots       0 ..      0 ..            0 ..            kChunk ..
//
//   table       [quad of columns][slot][thread of the team], each four floats: the threads of a team read 16 bytes
//               each from consecutive addresses, and teams of a warp the same ones
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "softdimo/cuda/elements.cuh"
#include "softdimo/cuda/gumbel.cuh"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/soft_embedding_tiny.h"
#include "softdimo/philox.h"

namespace softdimo::cuda::tiny {

constexpr int kBlock = 128;
constexpr int kEntries = 16;  // of a row, per thread
constexpr int kMaxQuads = kMaxTinyWidth / 4;

// ---------------------------------------------------------------------------------------------------
// who holds what

template <typename T, int kTeam>
__device__ __forceinline__ int column_of(int thread, int slot) {
  constexpr int kChunk = RowReader<T>::kChunk;
  return (slot / kChunk * kTeam + thread) * kChunk + slot % kChunk;
}

__device__ __forceinline__ int quads(const SoftEmbeddingParams& p) { return static_cast<int>(p.width + 3) / 4; }

struct Row {
  int64_t n;
  bool exists;
  bool soft;  // exists and is not masked
  float temperature;
};

// Row r of the thread's team in step `step` of this block's `steps`.
template <int kTeam, int kRows>
__device__ __forceinline__ Row row_of(const SoftEmbeddingParams& p, int steps, int step, int r) {
  constexpr int kTeams = kBlock / kTeam;
  const unsigned groups = static_cast<unsigned>(p.groups), tile = blockIdx.x / groups;
  const int64_t position = ((static_cast<int64_t>(tile) * steps + step) * kRows + r) * kTeams + threadIdx.x / kTeam;
  Row row{position * p.groups + blockIdx.x % groups, false, false, p.temperature};
  row.exists = row.n < p.rows;
  row.soft = row.exists && (p.mask == nullptr || __ldg(p.mask + row.n * p.mask_stride) == 0);
  if (row.soft && p.row_temperature != nullptr) {
    row.temperature = __ldg(p.row_temperature + row.n * p.row_temperature_stride);
  }
  return row;
}

// log2(e) / T and 1 / T, kept finite and not zero, so that a distance of 0 or -inf stays what it is.
__device__ __forceinline__ float exponent_scale(float temperature) {
  constexpr float kLog2E = 1.44269504088896340736f, kLeast = 1.40129846e-45f;
  return temperature > 0.0f ? fmaxf(fminf(kLog2E / temperature, FLT_MAX), kLeast) : NAN;
}
__device__ __forceinline__ float inverse_of(float temperature) { return fminf(1.0f / temperature, FLT_MAX); }

// The saved maximum of a row as the sum of two floats.
__device__ __forceinline__ FloatPair saved_maximum(const SoftEmbeddingBackwardParams& b, int64_t n) {
  const double max = __ldg(b.row_max + n);
  const float high = static_cast<float>(max);
  return {high, fabsf(high) < INFINITY ? static_cast<float>(max - static_cast<double>(high)) : 0.0f};
}

// Columns [d, d + 4) of a row of a matrix that starts `row` elements into it; zeros beyond its width, and where it is
// not wanted.
__device__ __forceinline__ float4 load_quad(const void* data, DType type, int64_t row, int d, int width, bool wanted,
                                            int64_t step = 1) {
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[i] = wanted && d + i < width ? load_element(data, type, row + (d + i) * step) : 0.0f;
  }
  return make_float4(value[0], value[1], value[2], value[3]);
}

// ---------------------------------------------------------------------------------------------------
// the codebook of the block's group in shared memory, zeros beyond V and D

template <typename T, int kTeam, typename Table>
__device__ __forceinline__ void stage_codebook(const SoftEmbeddingParams& p, Table& table) {
  const int64_t group = blockIdx.x % static_cast<unsigned>(p.groups);
#pragma unroll 1
  for (int i = threadIdx.x; i < quads(p) * kEntries * kTeam; i += kBlock) {
    const int v = column_of<T, kTeam>(i % kTeam, i / kTeam % kEntries), quad = i / (kTeam * kEntries);
    const int64_t entry = group * p.codebook_stride[0] + v * p.codebook_stride[1];
    table[i] = load_quad(p.codebook, p.codebook_type, entry, 4 * quad, static_cast<int>(p.width), v < p.vocabulary,
                         p.codebook_stride[2]);
  }
}

// ---------------------------------------------------------------------------------------------------
// logits

// Whether every row is made of whole chunks on 16-byte boundaries.
template <typename T>
inline bool whole_chunks(const void* data, int64_t row_stride, int64_t columns) {
  constexpr int64_t kChunk = RowReader<T>::kChunk;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % kChunk == 0 && columns % kChunk == 0;
}

template <typename T>
__device__ __forceinline__ uint4 minus_infinities() {
  const uint32_t word = sizeof(T) == 4 ? 0xff800000u : std::is_same<T, __half>::value ? 0xfc00fc00u : 0xff80ff80u;
  return make_uint4(word, word, word, word);
}

// The thread's entries of its rows; -inf beyond V and in rows that are not soft, whose logits are not read. All loads
// of the whole chunks are under way before the first is used.
template <typename T, int kTeam, int kRows>
__device__ __forceinline__ void load_logits(const SoftEmbeddingParams& p, bool whole, const Row (&row)[kRows],
                                            float (&z)[kRows][kEntries]) {
  constexpr int kChunk = RowReader<T>::kChunk, kChunks = kEntries / kChunk;
  const int thread = threadIdx.x % kTeam;
  float values[kChunk];
  if (whole) {
    uint4 loaded[kRows][kChunks];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto* words = reinterpret_cast<const uint4*>(static_cast<const T*>(p.logits) + row[r].n * p.row_stride);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int j = i * kTeam + thread;
        loaded[r][i] = minus_infinities<T>();
        if (row[r].soft && j * kChunk < p.vocabulary) loaded[r][i] = __ldg(words + j);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        RowReader<T>::unpack(loaded[r][i], values);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) z[r][i * kChunk + k] = values[k];
      }
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int columns = row[r].soft ? static_cast<int>(p.vocabulary) : 0;
    const RowReader<T> reader(static_cast<const T*>(p.logits) + row[r].n * p.row_stride, columns);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int j = i * kTeam + thread;
      if (reader.template inside<false>(j)) {
        RowReader<T>::unpack(reader.template load<false>(j), values);
      } else {
        reader.load_elements(j, -INFINITY, values);
      }
#pragma unroll
      for (int k = 0; k < kChunk; ++k) z[r][i * kChunk + k] = values[k];
    }
  }
}

// Adds the noise: z + low is the value.
template <typename T, int kTeam>
__device__ __forceinline__ void add_noise(const SoftEmbeddingParams& p, int64_t n, float (&z)[kEntries],
                                          float (&low)[kEntries]) {
  const uint64_t key = static_cast<uint64_t>(__ldg(p.seed));
  const uint32_t offset = static_cast<uint32_t>(__ldg(p.seed + 1));
  const bool named = p.row_ids != nullptr && n < p.rows;  // a team may have no row, and calculates all the same
  const uint64_t id = static_cast<uint64_t>(named ? __ldg(p.row_ids + n * p.row_ids_stride) : n);
#pragma unroll
  for (int slot = 0; slot < kEntries; slot += 4) {
    const uint32_t block = static_cast<uint32_t>(column_of<T, kTeam>(threadIdx.x % kTeam, slot)) / 4;
    const Words words = philox4x32(key, id, block, offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const FloatPair noised = sum_pair(z[slot + i], gumbel(open_uniform(words.word[i])));
      z[slot + i] = noised.high;
      low[slot + i] = noised.low;
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// teams: every thread of a warp takes part, and all threads of a team get the result

template <int kTeam>
__device__ __forceinline__ float team_max(float value) {
#pragma unroll
  for (int distance = kTeam / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

template <int kTeam>
__device__ __forceinline__ int team_min(int value) {
#pragma unroll
  for (int distance = kTeam / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other < value ? other : value;
  }
  return value;
}

template <int kTeam>
__device__ __forceinline__ float team_sum(float value) {
#pragma unroll
  for (int distance = kTeam / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// Sums of four values: thread t gets number t / (kTeam / 4), by half the shuffles of four sums.
template <int kTeam>
__device__ __forceinline__ float team_scatter_sum(const float (&value)[4]) {
  const bool upper = threadIdx.x & kTeam / 2, odd = threadIdx.x & kTeam / 4;
  float pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, upper ? value[i] : value[i + 2], kTeam / 2);
    pair[i] = (upper ? value[i + 2] : value[i]) + other;
  }
  const float other = __shfl_xor_sync(0xffffffffu, odd ? pair[0] : pair[1], kTeam / 4);
  float sum = (odd ? pair[1] : pair[0]) + other;
#pragma unroll
  for (int distance = kTeam / 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// ---------------------------------------------------------------------------------------------------
// dispatch

template <typename T, int kThreads, bool kAnyOption>
struct Shape {
  using Type = T;
  static constexpr int kTeam = kThreads;
  static constexpr bool kGeneral = kAnyOption;  // noise, or what else a kernel treats so
};

template <typename T, bool kGeneral, typename Launch>
cudaError_t dispatch_team(int64_t vocabulary, const Launch& launch) {
  if (vocabulary <= 4 * kEntries) return launch(Shape<T, 4, kGeneral>{});
  if (vocabulary <= 8 * kEntries) return launch(Shape<T, 8, kGeneral>{});
  return launch(Shape<T, 16, kGeneral>{});
}

inline bool is_valid(const SoftEmbeddingParams& p) {
  const bool known =
      p.logits_type == DType::float32 || p.logits_type == DType::bfloat16 || p.logits_type == DType::float16;
  return known && p.vocabulary >= 1 && p.width >= 1 && p.groups >= 1 && is_tiny(p);
}

// How the rows of a call are spread over blocks. `blocks` is 0 where a grid cannot hold them.
struct Grid {
  unsigned blocks;
  int steps;
};

template <int kTeam, int kRows>
Grid grid_of(const SoftEmbeddingParams& p) {
  constexpr int64_t kPositions = kBlock / kTeam * kRows;  // of a block, in one step
  constexpr int64_t kBlocks = 512, kMostSteps = 16;
  const int64_t positions = p.rows / p.groups, tiles = (positions + kPositions - 1) / kPositions;
  const int64_t wanted = tiles / ((kBlocks + p.groups - 1) / p.groups);
  const int64_t steps = wanted < 1 ? 1 : wanted < kMostSteps ? wanted : kMostSteps;
  const int64_t blocks = (tiles + steps - 1) / steps;
  return {p.groups > INT32_MAX / blocks ? 0 : static_cast<unsigned>(blocks * p.groups), static_cast<int>(steps)};
}

// Calls `launch` with the Shape of a valid call. Never by the number of rows, on which no row's bits may depend.
template <typename Launch>
cudaError_t dispatch(const SoftEmbeddingParams& p, bool general, const Launch& launch) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  if (p.rows <= 0) return cudaSuccess;
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    return general || p.seed != nullptr ? dispatch_team<T, true>(p.vocabulary, launch)
                                        : dispatch_team<T, false>(p.vocabulary, launch);
  };
  switch (p.logits_type) {
    case DType::bfloat16:
      return of_type(__nv_bfloat16{});
    case DType::float16:
      return of_type(__half{});
    default:
      return of_type(float{});
  }
}

}  // namespace softdimo::cuda::tiny
