// soft_embedding, backward: the gradient of the codebook.
//
//   formula   dE[v] = sum_n p[n, v] g[n]    with p = 2^((y - top) log2(e) / T) / sum; masked rows take no part
//   bytes     b V per row: each logit (b bytes) once; the upstream gradient comes from L2, once per 128 entries of the
//             vocabulary; 8 V D per part of the rows, written and added up
//   FLOPs     2 V D per row by tensor cores (p in two terms: 4 V D; float32: 12 V D) and V exponentials
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 rows of V = 8192, D = 64 in bfloat16 are 134
//             MB, and 8 parts of 2.1 MB written and read, so 93 / 56 / 39 us. The products need 32 / 19 / 19 us; in
//             float32 (302 MB: 168 / 101 / 70 us) 191 / 115 / 115 us: there tensor cores bound
//   tiles     a block owns 128 entries of one group and a part of the rows; 4 warps have 32 entries each, and as many
//             again the same entries of other rows:
//
//             dE^T [D, 32]  +=  g^T [D, 16] from shared memory, 64 positions at a time, two tiles in turn
//                               x   p [16, 32] from logits in registers
//
//             With lane = 4 g + q, product i has entry 4 g + i as its column g, and positions 2 q, 2 q + 1, 2 q + 8,
//             2 q + 9 of 16 as its depth: a lane reads 4 neighbours of 4 rows, and makes its own operand of them.
//
// A sum of 16 positions is made by tensor cores, which cut off, and added in float32, which rounds. Parts, and the two
// warps of an entry, are added in index order.

#include <cuda_runtime.h>

#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/row_reduce.cuh"
#include "softdimo/cuda/soft_embedding_entries.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kEntries = 4;       // neighbours of a lane, of each of its 4 rows
constexpr int kWarpEntries = 32;
constexpr int kEntryWarps = kGradientEntries / kWarpEntries;
constexpr int kTilePositions = 64;  // in shared memory; a warp takes every second 16 of them
static_assert(kBlock == 2 * kEntryWarps * kWarp, "two warps for every 32 entries");

template <Product kProduct, int kWidth>
constexpr int kPitch = kTerms<kProduct> * kWidth + 8;  // elements between positions; an ldmatrix has no bank twice

// Positions in shared memory: what products take of g, and the records of their rows.
template <Product kProduct, int kWidth>
struct alignas(16) Tile {
  uint16_t g[kTilePositions][kPitch<kProduct, kWidth>];
  RowRecord record[kTilePositions];

  // `width`: of a term of the packed gradient, whose columns from `upstream` on are copied.
  __device__ __forceinline__ void start_copy(const uint16_t* upstream, int width, const RowRecord* records) {
    constexpr int kWords = kWidth / 8, kRows = kTilePositions * kTerms<kProduct>;  // a row: a term of a position
    constexpr int kRecordWords = kTilePositions * sizeof(RowRecord) / 16;
    static_assert(kRecordWords <= kBlock, "a thread copies at most one word of the records");
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kWords; i += kBlock) {
      const int row = i / kWords, word = i % kWords;
      uint16_t* to = &g[row / kTerms<kProduct>][row % kTerms<kProduct> * kWidth + word * 8];
      ptx::copy_async_16(to, upstream + row * width + word * 8, 16);
    }
    if (threadIdx.x < kRecordWords) {
      ptx::copy_async_16(reinterpret_cast<uint4*>(record) + threadIdx.x,
                         reinterpret_cast<const uint4*>(records) + threadIdx.x, 16);
    }
    ptx::commit_copies();
  }
};

// Four neighbouring logits of a row as they lie in memory.
template <typename T>
struct Quad {
  uint32_t word[sizeof(T)];

  // The first column is a multiple of 4, which is inside the row.
  __device__ __forceinline__ void load(const T* row, int column, int columns, bool aligned) {
    if (aligned && column + kEntries <= columns) {
      if constexpr (sizeof(T) == 4) {
        const uint4 all = __ldg(reinterpret_cast<const uint4*>(row + column));
        word[0] = all.x, word[1] = all.y, word[2] = all.z, word[3] = all.w;
      } else {
        const uint2 all = __ldg(reinterpret_cast<const uint2*>(row + column));
        word[0] = all.x, word[1] = all.y;
      }
      return;
    }
    float value[kEntries];
#pragma unroll
    for (int i = 0; i < kEntries; ++i) value[i] = column + i < columns ? to_float(__ldg(row + column + i)) : -INFINITY;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)); ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(value[i]);
      } else {
        word[i] = pack_pair<T>(value[2 * i], value[2 * i + 1]);
      }
    }
  }

  __device__ __forceinline__ void unpack(float (&z)[kEntries]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kEntries; ++i) z[i] = __uint_as_float(word[i]);
    } else {
      const float2 low = unpack_pair<T>(word[0]), high = unpack_pair<T>(word[1]);
      z[0] = low.x, z[1] = low.y, z[2] = high.x, z[3] = high.y;
    }
  }
};

// Operands of the products with 16 positions: [term][product], p of positions 2 q, 2 q + 1 and of 2 q + 8, 2 q + 9.
template <Product kProduct>
struct Probabilities {
  static constexpr int kMost = kProduct == Product::float32 ? 3 : 2;
  uint32_t b[kMost][kEntries][2];

  // Sets half `half` from the p of its two positions; `terms` of them are made.
  __device__ __forceinline__ void set(int half, float (&low)[kEntries], float (&high)[kEntries], int terms) {
#pragma unroll
    for (int term = 0; term < kMost; ++term) {
      if (kProduct != Product::float32 && term >= terms) break;
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        uint32_t& pair = b[term][i][half];
        if constexpr (kProduct == Product::float16) {
          pair = ptx::pack_f16(low[i], high[i]);
          const float2 taken = unpack_pair<__half>(pair);
          low[i] -= taken.x, high[i] -= taken.y;
        } else {
          pair = ptx::pack_bf16(low[i], high[i]);
          const float2 taken = unpack_pair<__nv_bfloat16>(pair);
          low[i] -= taken.x, high[i] -= taken.y;
        }
      }
    }
  }
};

// One lane's part of dE^T: of 16 columns m and product i, columns 16 m + g (and + 8) of entries 4 (2 q + b) + i.
template <Product kProduct, int kWidth>
struct Sums {
  static constexpr int kTiles = kWidth / 16;
  float sum[kTiles][kEntries][4] = {};

  // `positions`: the tile's 16 positions.
  __device__ __forceinline__ void add(const uint16_t* positions, const Probabilities<kProduct>& p, int terms) {
    const int lane = threadIdx.x % kWarp;
    const uint16_t* row = positions + (lane % 8 + lane / 16 * 8) * kPitch<kProduct, kWidth> + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t a[kTerms<kProduct>][4];
#pragma unroll
      for (int term = 0; term < kTerms<kProduct>; ++term) {
        ptx::load_matrix_x4_transposed(a[term], row + term * kWidth + 16 * m);
      }
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        if constexpr (kProduct == Product::float32) {
          float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int order = 2; order >= 0; --order) {  // the smallest products first
#pragma unroll
            for (int term = 0; term <= order; ++term) multiply<kProduct>(d, a[order - term], p.b[term][i]);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[m][i][j] += d[j];
        } else {
          if (terms > 1) multiply<kProduct>(sum[m][i], a[0], p.b[1][i]);
          multiply<kProduct>(sum[m][i], a[0], p.b[0][i]);
        }
      }
    }
  }

  // Adds the sums of the second warps to those of the first, by way of shared memory; every thread of the block.
  __device__ __forceinline__ void merge(float* shared, bool second) {
    const int slot = threadIdx.x % (kBlock / 2);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        if (second) shared[k * (kBlock / 2) + slot] = sum[m][k / 4][k % 4];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        if (!second) sum[m][k / 4][k % 4] += shared[k * (kBlock / 2) + slot];
      }
    }
  }

  // `out`: [V, D] of a part and a group; `entry`, `column`: the warp's first.
  __device__ __forceinline__ void write(float* out, int entry, int column, const SoftEmbeddingParams& call) const {
    const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const int d = column + 16 * m + g + k / 2 % 2 * 8, v = entry + 4 * (2 * q + k % 2) + k / 4;
        if (v < call.vocabulary && d < call.width) out[v * call.width + d] = sum[m][k / 4][k % 4];
      }
    }
  }
};

// A warp's logits: 4 entries of each of 4 positions of 16.
template <typename T>
struct Step {
  Quad<T> quad[4];

  __device__ __forceinline__ static int position(int i) { return 2 * (threadIdx.x % 4) + i / 2 * 8 + i % 2; }

  // Rows that are not counted are not read, and neither are entries past the row's end.
  __device__ __forceinline__ void load(const SoftEmbeddingParams& call, int64_t group, int64_t first, int column,
                                       bool aligned) {
    const int columns = static_cast<int>(call.vocabulary);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = (first + position(i)) * call.groups + group;
      if (row >= call.rows || column >= columns || is_masked(call, row)) continue;
      quad[i].load(static_cast<const T*>(call.logits) + row * call.row_stride, column, columns, aligned);
    }
  }
};

template <bool kPlain, Product kProduct, typename T>
__device__ __forceinline__ void set_probabilities(const Step<T>& step, const RowRecord* records, int column,
                                                  const Noise<kPlain>& noise, int terms,
                                                  Probabilities<kProduct>& probabilities) {
  constexpr float kScale = kProduct == Product::float16 ? kHalfScale : 1.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float p[2][kEntries];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const RowRecord r = records[Step<T>::position(2 * half + b)];
      step.quad[2 * half + b].unpack(p[b]);
      if (noise.any()) {
        noise.subtract_top(p[b], column, r);
      } else {
#pragma unroll
        for (int i = 0; i < kEntries; ++i) p[b][i] -= r.top;
      }
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        p[b][i] = r.inverse != 0.0f ? weight(p[b][i], r.scale) * (r.inverse * kScale) : 0.0f;
      }
    }
    probabilities.set(half, p[0], p[1], terms);
  }
}

// Blocks of a multiprocessor, as many as registers allow.
template <typename T, Product kProduct, int kWidth, bool kPlain>
constexpr int kBlocks = kPlain && kProduct != Product::float32 && kWidth == 64 && sizeof(T) == 2 ? 2 : 1;

template <typename T, Product kProduct, int kWidth, bool kPlain>
__global__ void __launch_bounds__(kBlock, kBlocks<T, kProduct, kWidth, kPlain>)
    soft_embedding_dcodebook_kernel(const SoftEmbeddingBackwardParams p, int64_t padded, int entry_tiles,
                                    int64_t part_positions, int width) {
  SOFTDIMO_DYNAMIC_SHARED(shared);
  auto* tiles = reinterpret_cast<Tile<kProduct, kWidth>*>(shared);
  const SoftEmbeddingParams& call = p.call;
  const int warp = threadIdx.x / kWarp, half = warp / kEntryWarps;
  const int pieces = width / kWidth, first_column = blockIdx.x % pieces * kWidth;
  const unsigned work = blockIdx.x / pieces / entry_tiles;
  const int64_t group = work % call.groups, part = work / call.groups;
  const int tile = blockIdx.x / pieces % entry_tiles;
  const int entry = tile * kGradientEntries + warp % kEntryWarps * kWarpEntries;  // the warp's first
  const int column = entry + threadIdx.x % kWarp / 4 * kEntries;
  const int64_t begin = part * part_positions, end = begin + part_positions < padded ? begin + part_positions : padded;
  const uint16_t* upstream = p.upstream + (group * padded + begin) * (kTerms<kProduct> * width) + first_column;
  const RowRecord* records = p.records + group * padded + begin;
  const bool aligned = rows_aligned<T>(call.logits, call.row_stride);
  const int terms = call.high_precision ? 2 : 1;
  const Noise<kPlain> noise(call.seed);

  Sums<kProduct, kWidth> sums;
  Step<T> step{};
  if (begin < end) {
    tiles[0].start_copy(upstream, width, records);
    step.load(call, group, begin + 16 * half, column, aligned);
  }
  int turn = 0;
  for (int64_t first = begin; first < end; first += kTilePositions, turn ^= 1) {
    ptx::wait_copies<0>();
    __syncthreads();
    upstream += kTilePositions * kTerms<kProduct> * width;
    records += kTilePositions;
    if (first + kTilePositions < end) tiles[turn ^ 1].start_copy(upstream, width, records);
#pragma unroll 1
    for (int own = 16 * half; own < kTilePositions; own += 32) {
      Probabilities<kProduct> probabilities;
      set_probabilities<kPlain>(step, tiles[turn].record + own, column, noise, terms, probabilities);
      if (first + own + 32 < end) step.load(call, group, first + own + 32, column, aligned);
      sums.add(tiles[turn].g[own], probabilities, terms);
    }
  }
  sums.merge(reinterpret_cast<float*>(shared), half == 1);
  if (half == 1) return;
  sums.write(p.dcodebook + (part * call.groups + group) * call.vocabulary * call.width, entry, first_column, call);
}

template <typename T, Product kProduct, int kWidth, bool kPlain>
cudaError_t launch(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  constexpr int kTileBytes = 2 * sizeof(Tile<kProduct, kWidth>);
  constexpr int kMergeBytes = 16 * kBlock / 2 * sizeof(float);
  constexpr int kShared = kTileBytes > kMergeBytes ? kTileBytes : kMergeBytes;
  const int64_t padded = padded_positions(p.call);
  const int64_t tiles = (p.call.vocabulary + kGradientEntries - 1) / kGradientEntries;
  const int64_t width = product_width(p.call.width), blocks = tiles * (width / kWidth) * p.call.groups * p.splits;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t row_tiles = padded / kTilePositions, part_tiles = (row_tiles + p.splits - 1) / p.splits;
  const auto kernel = soft_embedding_dcodebook_kernel<T, kProduct, kWidth, kPlain>;
  if (const cudaError_t error = allow_shared(kernel, kShared); error != cudaSuccess) return error;
  SOFTDIMO_LAUNCH(kernel, static_cast<unsigned>(blocks), kBlock, kShared, stream, p, padded, static_cast<int>(tiles),
                  part_tiles * kTilePositions, static_cast<int>(width));
  return cudaGetLastError();
}

template <typename T, Product kProduct, bool kPlain>
cudaError_t launch_for_width(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  // Three terms of 128 columns do not fit in registers: two blocks have 64 columns each.
  if constexpr (kProduct != Product::float32) {
    if (product_width(p.call.width) == 128) return launch<T, kProduct, 128, kPlain>(p, stream);
  }
  return launch<T, kProduct, 64, kPlain>(p, stream);
}

template <typename T, Product kProduct>
cudaError_t launch_for_noise(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  return p.call.seed == nullptr ? launch_for_width<T, kProduct, true>(p, stream)
                                : launch_for_width<T, kProduct, false>(p, stream);
}

template <typename T>
cudaError_t launch_for_product(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  switch (p.call.codebook_type) {
    case DType::bfloat16:
      return launch_for_noise<T, Product::bfloat16>(p, stream);
    case DType::float16:
      return launch_for_noise<T, Product::float16>(p, stream);
    case DType::float32:
      return launch_for_noise<T, Product::float32>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" int softdimo_soft_embedding_dcodebook(const SoftEmbeddingBackwardParams* params, void* stream) {
  const SoftEmbeddingParams& call = params->call;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (call.vocabulary < 1 || call.vocabulary > kMaxVocabulary || call.width < 1 ||
      call.width > kMaxSoftEmbeddingWidth || params->splits < 1) {
    return cudaErrorInvalidValue;
  }
  switch (call.logits_type) {
    case DType::float32:
      return launch_for_product<float>(*params, queue);
    case DType::bfloat16:
      return launch_for_product<__nv_bfloat16>(*params, queue);
    case DType::float16:
      return launch_for_product<__half>(*params, queue);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace softdimo::cuda
