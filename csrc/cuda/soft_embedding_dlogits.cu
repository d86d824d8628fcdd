// soft_embedding, backward: the gradient of the logits.
//
//   formula   dlogits[n, v] = p (t - delta) / T    with p = 2^((y - top) log2(e) / T) / sum, t = g[n] . E[v],
//             delta = g[n] . e[n];  the entry of p > 1/2: minus the sum of the others
//   bytes     2 b V per row: each logit (b bytes) read once, each gradient written once; the codebook comes from L2
//   FLOPs     2 V D per row by tensor cores (float32: 12 V D), about 10 V others and V exponentials
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 rows of V = 8192 in bfloat16 are 268 MB, so
//             150 / 90 / 63 us. At D = 64 the products need 32 / 19 / 19 us in bfloat16, and in float32 (537 MB: 299 /
//             180 / 125 us) 191 / 115 / 115 us (270 and, for mma.sync on Hopper, 450 TFLOP/s): both hide.
//   tiles     a block has 128 positions of one group, 16 for each of 8 warps, and 1024 entries, 64 at a time:
//
//             g [16, D] in registers   x   E [64, D] in shared memory, two tiles in turn   =   t, 32 entries at a time
//
//             columns of t are permuted, so that a lane has 8 neighbours in each of 2 rows: with q = lane % 4, entry
//             8 q + 2 i + b is column 2 q + b of product i. Logits come and gradients go 16 bytes at a time, and what
//             a warp needs next of the logits is under way while it multiplies.

#include <cuda_runtime.h>

#include "softdimo/cuda/elements.cuh"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/soft_embedding_runs.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kTile = 64;  // entries of a tile of the codebook

// Columns and terms of a codebook in shared memory. Rows lie in the order in which products take them, 16 bytes further
// apart than they are long: then the 8 rows of an ldmatrix are in different banks.
template <Product kProduct, int kWidth>
struct Tile {
  static constexpr int kPitch = kTerms<kProduct> * kWidth + 8;  // in elements
  static constexpr int kElements = kTile * kPitch;

  // Where entry v of the tile lies: of 32 entries, column 2 q + b of product i is entry 8 q + 2 i + b.
  __device__ __forceinline__ static int slot(int v) { return (v & ~31) | (v & 6) << 2 | (v >> 3 & 3) << 1 | (v & 1); }
};

// A thread's part of copying tiles: 16 bytes of every 256 / (words of a row)th entry, of each term.
template <Product kProduct, int kWidth>
class TileCopy {
 public:
  using Layout = Tile<kProduct, kWidth>;

  __device__ __forceinline__ TileCopy(const PackedCodebook& codebook, int64_t group, int entries)
      : codebook_(codebook), entry_(threadIdx.x / kWords), entries_(entries) {
    const int word = threadIdx.x % kWords;
    inside_ = word * 8 < codebook.width;
    from_ = codebook.data + group * codebook.group_stride + entry_ * codebook.stride + word * 8;
    to_ = Layout::slot(entry_) * Layout::kPitch + word * 8;
  }

  // Starts to copy the tile whose first entry is `first`; zeros past the codebook's end.
  __device__ __forceinline__ void start(int first, uint16_t* tile) const {
    const uint16_t* from = from_ + first * codebook_.stride;
    uint16_t* to = tile + to_;
#pragma unroll 1
    for (int term = 0; term < kTerms<kProduct>; ++term) {
#pragma unroll 1
      for (int i = 0; i < kTile / kStep; ++i) {
        const bool inside = inside_ && first + entry_ + i * kStep < entries_;
        ptx::copy_async_16(to + Layout::slot(i * kStep) * Layout::kPitch,
                           inside ? from + i * kStep * codebook_.stride : codebook_.data, inside ? 16 : 0);
      }
      from += codebook_.term_stride;
      to += kWidth;
    }
    ptx::commit_copies();
  }

 private:
  static constexpr int kWords = kWidth / 8, kStep = kBlock / kWords;
  static_assert(kStep % 16 == 0, "slot(a + b) = slot(a) + slot(b) for multiples b of the step");
  const PackedCodebook& codebook_;
  const uint16_t* from_;
  int entry_, entries_, to_;
  bool inside_;
};

// g of a warp's 16 positions as products take it; [step][term].
template <Product kProduct, int kWidth>
struct Upstream {
  static constexpr int kSteps = kWidth / 16;
  uint32_t a[kSteps][kTerms<kProduct>][4];

  // `rows`: of the packed upstream gradient, at the warp's first position.
  __device__ __forceinline__ void load(const uint16_t* rows) {
    constexpr int kPitch = kTerms<kProduct> * kWidth;
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int term = 0; term < kTerms<kProduct>; ++term) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = g + i % 2 * 8, column = term * kWidth + step * 16 + i / 2 * 8 + 2 * q;
          // No __ldg, which the compiler would take out of loops: where it is in one, there are no registers for that.
          a[step][term][i] = *reinterpret_cast<const uint32_t*>(rows + row * kPitch + column);
        }
      }
    }
  }

  // t of 8 entries, whose rows of the tile start at `rows`: d[0], d[1] are entries of the lane's first row.
  __device__ __forceinline__ void multiply_tile(const uint16_t* rows, float (&d)[4]) const {
    constexpr int kPitch = Tile<kProduct, kWidth>::kPitch;
    const int lane = threadIdx.x % 32;
    const uint16_t* row = rows + lane % 8 * kPitch + lane / 8 * 8;
    float rest[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // products of later terms: summed apart, their roundings are small
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
#pragma unroll
      for (int term = 0; term < kTerms<kProduct>; ++term) {
        uint32_t both[4];
        ptx::load_matrix_x4(both, row + term * kWidth + pair * 32);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t b[2] = {both[2 * half], both[2 * half + 1]};
#pragma unroll
          for (int other = 0; other + term < kTerms<kProduct>; ++other) {
            multiply<kProduct>(term + other == 0 ? d : rest, a[2 * pair + half][other], b);
          }
        }
      }
    }
    if constexpr (kTerms<kProduct> > 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += rest[i];
    }
  }

  // t of 32 entries: t[i][b], t[i][2 + b] is entry 8 q + 2 i + b of the lane's first, second row.
  __device__ __forceinline__ void multiply_group(const uint16_t* rows, float (&t)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      t[i][0] = t[i][1] = t[i][2] = t[i][3] = 0.0f;
      multiply_tile(rows + i * 8 * Tile<kProduct, kWidth>::kPitch, t[i]);
    }
  }
};

// ---------------------------------------------------------------------------------------------------
// kernels

template <typename T, Product kProduct, int kWidth, bool kPlain>
__global__ void __launch_bounds__(kBlock, kPlain && kProduct != Product::float32 && kWidth == 64 ? 2 : 1)
    soft_embedding_dlogits_kernel(const SoftEmbeddingBackwardParams p, const PackedCodebook codebook, int64_t padded,
                                  int chunks) {
  // Logits are asked for a group of entries ahead, or before the products, which in float32 take long enough. g stays
  // in registers where there is room beside everything else; otherwise logits come after the products.
  constexpr bool kStays = kProduct != Product::float32 || kWidth == 64 || kPlain;
  constexpr bool kAhead = kProduct != Product::float32, kEarly = !kAhead && kStays;
  constexpr int kRuns = kAhead && sizeof(T) == 2 ? 2 : 1;  // of each row, under way
  using Layout = Tile<kProduct, kWidth>;
  SOFTDIMO_DYNAMIC_SHARED(shared);
  SOFTDIMO_SHARED(RowRecord, records, kTileRows);  // neither this nor that in registers, which are scarce
  SOFTDIMO_SHARED(RowPartial, partials, 2 * kBlock);
  auto* tiles = reinterpret_cast<uint16_t*>(shared);
  const SoftEmbeddingParams& call = p.call;
  const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4, columns = static_cast<int>(call.vocabulary);
  const unsigned row_tiles = static_cast<unsigned>(padded / kTileRows), work = blockIdx.x / chunks;
  const int64_t group = work / row_tiles;
  const int64_t first_position = static_cast<int64_t>(work % row_tiles) * kTileRows;
  const int chunk = blockIdx.x % chunks, begin = chunk * kChunkEntries;
  const int end = columns - begin < kChunkEntries ? columns : begin + kChunkEntries;

  const TileCopy<kProduct, kWidth> copy(codebook, group, columns);
  copy.start(begin, tiles);
  const int local = threadIdx.x / kWarp * 16 + g;  // the lane's first row, in the block
  const Rows<T> rows(p, p.records + group * padded, group, first_position + local);
  static_assert(kTileRows * sizeof(RowRecord) == 16 * kBlock, "a thread copies one word of the records");
  reinterpret_cast<uint4*>(&records[0])[threadIdx.x] =
      __ldg(reinterpret_cast<const uint4*>(p.records + group * padded + first_position) + threadIdx.x);
  __syncthreads();
  const bool peaked = __any_sync(~0u, records[local].inverse > 0.5f || records[local + 8].inverse > 0.5f) != 0;
  const Settings<kPlain> settings{Noise<kPlain>(call.seed), rows_aligned<T>(call.logits, call.row_stride),
                                  rows_aligned<T>(p.dlogits, call.vocabulary), p.dtemperature != nullptr, peaked};
  InFlight<T, kRuns> in_flight;
#pragma unroll
  for (int i = 0; i < 2 * kRuns; ++i) {
    const int first = begin + i / 2 * kQuadEntries;
    if (kAhead && first < end) in_flight.load(i / 2, i % 2, rows, first + q * kRun, columns, settings.reads_aligned);
  }
  const uint16_t* g_rows = p.upstream + (group * padded + first_position + local - g) * (kTerms<kProduct> * kWidth);
  Upstream<kProduct, kWidth> upstream;
  if (kStays) upstream.load(g_rows);
  const auto partial = [&](int r) -> RowPartial& { return partials[r * kBlock + threadIdx.x]; };
  partial(0) = partial(1) = nothing();

  for (int tile = begin, turn = 0; tile < end; tile += kTile, turn ^= 1) {
    ptx::wait_copies<0>();
    __syncthreads();
    if (tile + kTile < end) copy.start(tile + kTile, tiles + (turn ^ 1) * Layout::kElements);
#pragma unroll(kRuns)
    for (int i = 0; i < kTile / kQuadEntries; ++i) {
      const int first = tile + i * kQuadEntries;
      if (first >= end) break;
      const int next = kAhead ? first + kRuns * kQuadEntries : first;
#pragma unroll
      for (int r = 0; kEarly && r < 2; ++r) {
        in_flight.load(i % kRuns, r, rows, next + q * kRun, columns, settings.reads_aligned);
      }
      if (!kStays) upstream.load(g_rows);
      float t[4][4];
      upstream.multiply_group(tiles + turn * Layout::kElements + i * kQuadEntries * Layout::kPitch, t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float z[kRun], gradient[kRun];
        if (!kAhead && !kEarly) {
          in_flight.load(i % kRuns, r, rows, next + q * kRun, columns, settings.reads_aligned);
        }
        in_flight.unpack(i % kRuns, r, z);
        if (kAhead && next < end) {
          in_flight.load(i % kRuns, r, rows, next + q * kRun, columns, settings.reads_aligned);
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) gradient[j] = t[j / 2][2 * r + j % 2];
        run_gradients(records[local + 8 * r], settings, first + q * kRun, z, gradient, partial(r));
        if (rows.dlogits == nullptr || !rows.exists[r]) continue;
#pragma unroll
        for (int j = 0; j < kRun; ++j) gradient[j] = rows.counted[r] ? gradient[j] : 0.0f;
        T* row = rows.dlogits + r * rows.dlogits_between;
        store_run(row, first + q * kRun, columns, settings.writes_aligned, gradient);
      }
    }
  }
  if (!settings.peaked && (kPlain || !settings.slopes)) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowPartial sum = reduce_row<4, kBlock>(partial(r), Merge{});
    if (q == 0) p.partials[static_cast<int64_t>(blockIdx.x) * kTileRows + local + 8 * r] = sum;
  }
}

// A thread finishes a row: merges its chunks in index order.
__global__ void __launch_bounds__(kBlock) soft_embedding_finish_kernel(const SoftEmbeddingBackwardParams p,
                                                                       int64_t padded, int chunks) {
  const SoftEmbeddingParams& call = p.call;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= call.rows) return;
  const int64_t position = row / call.groups, index = row % call.groups * padded + position;
  const RowRecord record = p.records[index];
  const bool peaked = record.inverse > 0.5f;
  RowPartial sum = nothing();
  if (peaked || (p.dtemperature != nullptr && record.inverse != 0.0f)) {
    const RowPartial* partial = p.partials + index / kTileRows * chunks * kTileRows + position % kTileRows;
    for (int i = 0; i < chunks; ++i) sum = Merge{}(sum, partial[i * kTileRows]);
  }
  if (p.dlogits != nullptr && peaked && sum.peak >= 0) {
    store_element(p.dlogits, call.logits_type, row * call.vocabulary + sum.peak, -sum.others);
  }
  if (p.dtemperature != nullptr) {
    p.dtemperature[row] = record.inverse != 0.0f ? -sum.slope * record.inverse_t : 0.0f;
  }
}

template <typename T, Product kProduct, int kWidth, bool kPlain>
cudaError_t launch(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  constexpr int kShared = 2 * Tile<kProduct, kWidth>::kElements * sizeof(uint16_t);  // two tiles
  const int64_t padded = padded_positions(p.call), chunks = row_chunks(p.call);
  const int64_t blocks = p.call.groups * (padded / kTileRows) * chunks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = soft_embedding_dlogits_kernel<T, kProduct, kWidth, kPlain>;
  if (const cudaError_t error = allow_shared(kernel, kShared); error != cudaSuccess) return error;
  SOFTDIMO_LAUNCH(kernel, static_cast<unsigned>(blocks), kBlock, kShared, stream, p, packed_codebook(p), padded,
                  static_cast<int>(chunks));
  return cudaGetLastError();
}

template <typename T, Product kProduct, bool kPlain>
cudaError_t launch_for_width(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  return product_width(p.call.width) == 64 ? launch<T, kProduct, 64, kPlain>(p, stream)
                                           : launch<T, kProduct, 128, kPlain>(p, stream);
}

template <typename T, bool kPlain>
cudaError_t launch_for_product(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  switch (p.call.codebook_type) {
    case DType::bfloat16:
      return launch_for_width<T, Product::bfloat16, kPlain>(p, stream);
    case DType::float16:
      return launch_for_width<T, Product::float16, kPlain>(p, stream);
    case DType::float32:
      return launch_for_width<T, Product::float32, kPlain>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t launch_for_options(const SoftEmbeddingBackwardParams& p, cudaStream_t stream) {
  const bool plain = p.call.seed == nullptr && p.dtemperature == nullptr;
  return plain ? launch_for_product<T, true>(p, stream) : launch_for_product<T, false>(p, stream);
}

}  // namespace

extern "C" int softdimo_soft_embedding_dlogits(const SoftEmbeddingBackwardParams* params, void* stream) {
  const SoftEmbeddingParams& call = params->call;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (call.vocabulary < 1 || call.vocabulary > kMaxVocabulary || call.width < 1 ||
      call.width > kMaxSoftEmbeddingWidth) {
    return cudaErrorInvalidValue;
  }
  if (call.rows <= 0) return cudaSuccess;
  switch (call.logits_type) {
    case DType::float32:
      return launch_for_options<float>(*params, queue);
    case DType::bfloat16:
      return launch_for_options<__nv_bfloat16>(*params, queue);
    case DType::float16:
      return launch_for_options<__half>(*params, queue);
    default:
      return cudaErrorInvalidValue;
  }
}

extern "C" int softdimo_soft_embedding_finish(const SoftEmbeddingBackwardParams* params, void* stream) {
  const SoftEmbeddingParams& call = params->call;
  const int64_t blocks = (call.rows + kBlock - 1) / kBlock;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH(soft_embedding_finish_kernel, static_cast<unsigned>(blocks), kBlock, 0,
                  static_cast<cudaStream_t>(stream), *params, padded_positions(call),
                  static_cast<int>(row_chunks(call)));
  return cudaGetLastError();
}

}  // namespace softdimo::cuda
