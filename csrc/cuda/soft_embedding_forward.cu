// soft_embedding, forward, for D <= 128: e[n] = sum_v p[n, v] E[v] with p = softmax(y / T), y = logits + noise.
//
//   formula   per row, over v: top = max y, w = exp((y - top) / T), sum w, sum w E; e = sum w E / sum w
//   bytes     b V per row, each logit (b bytes) once; the value, and 4 D of the float32 value kept beside a 16-bit
//             one; the codebook once from memory, then from L2: 2 W / 192 bytes for every logit (W: padded D)
//   FLOPs     2 V D per row (float32 codebook: 12 V D), V exponentials
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 rows of V = 8192, D = 64 in bfloat16 are
//             136 MB, so 76 / 45 / 32 us; 32768 rows 301 / 181 / 126 us. The instructions of bfloat16 in one term, some
//             12 a logit, need 166 / 104 / 104 us of those. With noise they bind, not memory
//   registers 162 of 168 for D <= 64 and 16-bit codebooks: one block of 12 warps on a multiprocessor, each with 2 to
//             4 KB of logits on the way, 24 to 48 KB together; D > 64 and float32 codebooks: 8 warps
//   shared    3 stages of the codebook and 4.9 or 9 KB a warp for sums: 106 KB for D <= 64 in one term, 143 KB at most
//   tiles     a warp has 16 rows, a block up to 12 warps, which share tiles of the codebook:
//
//             logits [16, unit]  --registers-->  w  --registers-->  left factor  --mma-->  sums [16, W]
//             codebook [tile, W] --cp.async, 3 stages--> shared memory --ldmatrix--> right factor
//
//             vocabulary  |    chunk of 1024     |    chunk of 1024     | ...       joined in this order
//             tile        |      |      |        |
//             unit        |   |  |   |  |                                           one look at the running maximum
//
// Logits never pass through shared memory. A lane asks for the next tile's 16 bytes as soon as it has used this tile's.
//
// Sums start anew in every chunk. With many rows a block walks over the chunks and joins them in shared memory; with
// few every chunk has a block of its own and a second kernel joins them. Rows, warps and blocks do not touch each other's
// arithmetic, so a row's bits depend on nothing but the row.
//
// A 16-bit codebook: w enters products rounded, in one or two terms, relative to the row's largest y so far, and the
// divisor is the sum of the rounded w: what is one-hot stays so. bfloat16 has float32's range; for float16 w is taken
// times 2^15, so that weights down to 2^-29 of the largest keep their 11 bits. row_sum is the sum of the unrounded w.
// A float32 codebook: both factors in three bfloat16 terms, see soft_embedding_tiles.cuh; never TF32.

#include <cuda_runtime.h>

#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/soft_embedding_rows.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kEnoughBlocks = 96;  // blocks that fill a device well enough

template <int kBytes, int kTerms, int kWidth, bool kNoise>
__global__ void __launch_bounds__(ForwardShape<kBytes, kTerms, kWidth, kNoise>::kThreads, 1)
    soft_embedding_forward_kernel(const ForwardArguments a) {
  using Shape = ForwardShape<kBytes, kTerms, kWidth, kNoise>;
  using Rows = WarpRows<Shape>;
  SOFTDIMO_DYNAMIC_SHARED(shared);
  const int entries = static_cast<int>(a.p.call.vocabulary), warp = threadIdx.x / 32;
  const bool alone = a.sums.rows != nullptr;
  const unsigned parts = alone ? a.chunks : 1, part = blockIdx.x % parts;
  const int64_t work = blockIdx.x / parts, group = work % a.p.call.groups;
  const int64_t position = (work / a.p.call.groups * (blockDim.x / 32) + warp) * kWarpRows;

  constexpr int kChunkTiles = kChunk / Shape::kTile;
  const int begin = static_cast<int>(part) * kChunkTiles, tile_count = (entries + Shape::kTile - 1) / Shape::kTile;
  const int end = alone ? min(begin + kChunkTiles, tile_count) : tile_count;
  const CodebookTiles<Shape> tiles(a.codebook, group, entries, shared);
  for (int tile = begin; tile < begin + Shape::kStages - 1; ++tile) {
    if (tile < end) tiles.start(tile);
    ptx::commit_copies();
  }
  Rows rows(a, group, position,
            reinterpret_cast<char*>(shared) + Shape::kStages * Shape::kStageBytes + warp * Rows::kSharedBytes);
  if (rows.works()) rows.ask(begin);
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    ptx::wait_copies<Shape::kStages - 2>();
    __syncthreads();  // the tile has come for all, and all are done with the stage that is filled next
    if (tile + Shape::kStages - 1 < end) tiles.start(tile + Shape::kStages - 1);
    ptx::commit_copies();
    if (rows.works()) rows.add(tiles, tile, tile + 1 < end ? tile + 1 : -1);
    if ((tile + 1) % kChunkTiles == 0 || tile + 1 == end) rows.end_chunk(tile / kChunkTiles);
  }
}

// Joins the sums of the chunks that had a block each: a thread per value.
__global__ void __launch_bounds__(256) soft_embedding_join_kernel(const ForwardArguments a) {
  const SoftEmbeddingParams& call = a.p.call;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= call.rows * call.width) return;
  const int64_t row = i / call.width;
  RowSums sums{};
  float products = 0.0f;
  if (!is_masked(call, row)) {
    const float scale = exponent_scale(call, row);
    sums = a.sums.rows[row];
    products = a.sums.products[i];
#pragma unroll 1
    for (int chunk = 1; chunk < a.chunks; ++chunk) {
      const Factors factor = join(sums, a.sums.rows[chunk * call.rows + row], scale);
      products = join(products, a.sums.products[chunk * call.rows * call.width + i], factor);
    }
  }
  write_result(a.p, row, static_cast<int>(i % call.width), products, sums);
}

// ---------------------------------------------------------------------------------------------------
// launch

int chunks_of(const SoftEmbeddingParams& p) { return static_cast<int>((p.vocabulary + kChunk - 1) / kChunk); }

int64_t blocks_of(const SoftEmbeddingParams& p, int warps) {
  const int64_t rows = warps * kWarpRows;
  return (p.rows / p.groups + rows - 1) / rows * p.groups;
}

// The warps of a full block.
int most_warps(const SoftEmbeddingParams& p) {
  return padded_width(p.width) == 128 || p.codebook_type == DType::float32 ? 8 : 12;
}

// Whether chunks get blocks of their own. That writes and reads 4 D bytes more for 1024 logits.
bool splits(const SoftEmbeddingParams& p) {
  return chunks_of(p) > 1 && blocks_of(p, most_warps(p)) < kEnoughBlocks;
}

int64_t sums_bytes(const SoftEmbeddingParams& p) {
  return (chunks_of(p) * p.rows * static_cast<int64_t>(sizeof(RowSums)) + 15) / 16 * 16;
}

template <int kBytes, int kTerms, int kWidth, bool kNoise>
cudaError_t launch(const ForwardArguments& a, cudaStream_t stream) {
  using Shape = ForwardShape<kBytes, kTerms, kWidth, kNoise>;
  const int parts = a.sums.rows != nullptr ? a.chunks : 1;
  int warps = Shape::kThreads / 32;
  while (warps > 4 && blocks_of(a.p.call, warps) * parts < kEnoughBlocks) warps -= 4;
  const int64_t blocks = blocks_of(a.p.call, warps) * parts;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto shared_by = [](int count) {
    return Shape::kStages * Shape::kStageBytes + count * WarpRows<Shape>::kSharedBytes;
  };
  const auto kernel = soft_embedding_forward_kernel<kBytes, kTerms, kWidth, kNoise>;
  // Always of a full block: another thread of the host may launch the same kernel for more rows.
  const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   shared_by(Shape::kThreads / 32));
  if (allowed != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // else the next launch would find it
    return allowed;
  }
  SOFTDIMO_LAUNCH(kernel, static_cast<unsigned>(blocks), 32 * warps, shared_by(warps), stream, a);
  return cudaGetLastError();
}

// Where memory does not bind, as with noise or float32 logits, the second term is free.
template <int kBytes, int kTerms>
cudaError_t launch_for_width(const ForwardArguments& a, cudaStream_t stream) {
  constexpr int kNoisyTerms = kTerms < 3 ? 2 : 3;
  const SoftEmbeddingParams& call = a.p.call;
  if (padded_width(call.width) == 64) {
    return call.seed == nullptr ? launch<kBytes, kTerms, 64, false>(a, stream)
                                : launch<kBytes, kNoisyTerms, 64, true>(a, stream);
  }
  return call.seed == nullptr ? launch<kBytes, kTerms, 128, false>(a, stream)
                              : launch<kBytes, kNoisyTerms, 128, true>(a, stream);
}

cudaError_t launch_forward(const ForwardArguments& a, cudaStream_t stream) {
  const SoftEmbeddingParams& call = a.p.call;
  const bool wide = call.codebook_type == DType::float32;
  if (call.logits_type == DType::float32) {
    return wide ? launch_for_width<4, 3>(a, stream) : launch_for_width<4, 2>(a, stream);
  }
  if (wide) return launch_for_width<2, 3>(a, stream);
  return call.high_precision ? launch_for_width<2, 2>(a, stream) : launch_for_width<2, 1>(a, stream);
}

bool is_number(DType type) { return type == DType::float32 || type == DType::bfloat16 || type == DType::float16; }

}  // namespace

extern "C" int64_t softdimo_soft_embedding_workspace_bytes(const SoftEmbeddingParams* params) {
  if (!splits(*params)) return 0;
  return sums_bytes(*params) + chunks_of(*params) * params->rows * params->width * int64_t{4};
}

extern "C" int softdimo_soft_embedding_forward(const SoftEmbeddingForwardParams* params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const SoftEmbeddingParams& call = params->call;
  if (call.vocabulary < 1 || call.vocabulary > kMaxVocabulary || call.width < 1 ||
      call.width > kMaxSoftEmbeddingWidth || !is_number(call.logits_type) || !is_number(call.codebook_type)) {
    return cudaErrorInvalidValue;
  }
  if (call.rows <= 0) return cudaSuccess;
  ForwardArguments a{*params, {}, {}, chunks_of(call)};
  if (is_packed(call)) {
    a.codebook = {static_cast<const uint16_t*>(call.codebook), 0, call.codebook_stride[0],
                  static_cast<int>(call.codebook_stride[1])};
  } else {
    const int error = softdimo_soft_embedding_pack(&call, params->packed, stream);
    if (error != cudaSuccess) return error;
    const int64_t width = padded_width(call.width), group = call.vocabulary * width;
    a.codebook = {static_cast<const uint16_t*>(params->packed), call.groups * group, group, static_cast<int>(width)};
  }
  if (splits(call)) {
    char* workspace = static_cast<char*>(params->workspace);
    a.sums = {reinterpret_cast<RowSums*>(workspace), reinterpret_cast<float*>(workspace + sums_bytes(call))};
  }
  const cudaError_t error = launch_forward(a, queue);
  if (error != cudaSuccess || a.sums.rows == nullptr) return error;
  const int64_t blocks = (call.rows * call.width + 255) / 256;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH(soft_embedding_join_kernel, static_cast<unsigned>(blocks), 256, 0, queue, a);
  return cudaGetLastError();
}

}  // namespace softdimo::cuda
