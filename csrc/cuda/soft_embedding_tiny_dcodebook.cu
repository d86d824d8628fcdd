// soft_embedding's backward for tiny vocabularies (V <= 256, D <= 16): the codebook's gradient, in parts of the rows.
//
//   formula   dE[v] = sum over rows of p_v g,  p_v = 2^((y_v - m) log2(e) / T) / l from the saved m and l
//   bytes     b V + b' D + 12 per row, and 8 V D per part and group
//   FLOPs     2 V D per row and V exponentials; about D + 10 instructions per logit
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200). MaskBit, 2 x 16384 rows of V = 128, D = 7 in
//             bfloat16 is 11 MB: 6.0 / 3.6 / 2.5 us; its instructions take about 3.5 / 2.2 / 2.2 us. A tokenizer's
//             codebook is frozen as a rule, and then none of this runs
//   tiles     a block owns one group and a part of its positions, a thread one entry v and all of its columns:
//
//             V up to 64 / 128 / 256:  256 threads are 4 / 2 / 1 rows at a time
//             stage 32 positions: m, l, T, g -> shared memory | p g -> sums of the stage | -> sums of the part
//             then the 4 / 2 / 1 sums of an entry -> one, in order -> [part, G, V, D]
//
// Sums are short: a stage's are added to the part's, and parts are added up in double (sum_parts).

#include "softdimo/cuda/soft_embedding_tiny_rows.cuh"

namespace softdimo::cuda {
namespace tiny {
namespace {

constexpr int kGradientBlock = 256;
constexpr int kStage = 32;  // positions
constexpr int kInFlight = 4;

// What is needed of a row. inverse = 0 says that the row is masked or does not exist, and its logits are not read.
struct alignas(16) StagedRow {
  float max, max_low, scale, inverse;
};

__device__ __forceinline__ StagedRow stage_row(const SoftEmbeddingBackwardParams& b, int64_t position, int64_t last,
                                               int64_t group) {
  const SoftEmbeddingParams& p = b.call;
  const int64_t n = position * p.groups + group;
  if (position >= last || (p.mask != nullptr && __ldg(p.mask + n * p.mask_stride) != 0)) return {0, 0, 0, 0};
  const FloatPair max = saved_maximum(b, n);
  const float temperature =
      p.row_temperature != nullptr ? __ldg(p.row_temperature + n * p.row_temperature_stride) : p.temperature;
  return {max.high, max.low, exponent_scale(temperature), 1.0f / __ldg(b.row_sum + n)};
}

// z[i] of row i, where it is wanted.
template <typename T>
__device__ __forceinline__ void load_column(const SoftEmbeddingParams& p, int64_t row, int64_t step, int column,
                                            const bool (&wanted)[kInFlight], float (&z)[kInFlight]) {
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    z[i] = 0.0f;
    if (wanted[i]) z[i] = to_float(__ldg(static_cast<const T*>(p.logits) + (row + i * step) * p.row_stride + column));
  }
}

// The noise of one entry, whose neighbours draw the same words.
__device__ __forceinline__ FloatPair noise_of(const SoftEmbeddingParams& p, int64_t n, int column) {
  const int64_t id = p.row_ids != nullptr ? __ldg(p.row_ids + n * p.row_ids_stride) : n;
  const Words words = philox4x32(static_cast<uint64_t>(__ldg(p.seed)), static_cast<uint64_t>(id),
                                 static_cast<uint32_t>(column) / 4, static_cast<uint32_t>(__ldg(p.seed + 1)));
  const uint32_t low = column & 1 ? words.word[1] : words.word[0], high = column & 1 ? words.word[3] : words.word[2];
  return gumbel(open_uniform(column & 2 ? high : low));
}

template <int kThreads, int kQuads, typename Rows, typename Upstream>
__device__ __forceinline__ void add_stage(const SoftEmbeddingParams& p, int64_t first, Rows& rows, Upstream& upstream,
                                          float (&sum)[4 * kQuads]) {
  constexpr int kSlots = kGradientBlock / kThreads;
  const int column = threadIdx.x % kThreads;
  if (column >= p.vocabulary) return;
#pragma unroll 1
  for (int j = threadIdx.x / kThreads; j < kStage; j += kInFlight * kSlots) {
    const int64_t n = first + j * p.groups, step = kSlots * p.groups;
    StagedRow row[kInFlight];
    bool wanted[kInFlight];
    float z[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      row[i] = rows[j + i * kSlots];
      wanted[i] = row[i].inverse != 0.0f;
    }
    switch (p.logits_type) {
      case DType::bfloat16:
        load_column<__nv_bfloat16>(p, n, step, column, wanted, z);
        break;
      case DType::float16:
        load_column<__half>(p, n, step, column, wanted, z);
        break;
      default:
        load_column<float>(p, n, step, column, wanted, z);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!wanted[i]) continue;
      FloatPair y{z[i], 0.0f};
      if (p.seed != nullptr) y = sum_pair(z[i], noise_of(p, n + i * step, column));
      const float distance = (y.high - row[i].max) + (y.low - row[i].max_low);
      const float probability = ptx::exp2_approx(distance * row[i].scale) * row[i].inverse;
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const float4 g = upstream[quad * kStage + j + i * kSlots];
        sum[4 * quad] = fmaf(probability, g.x, sum[4 * quad]);
        sum[4 * quad + 1] = fmaf(probability, g.y, sum[4 * quad + 1]);
        sum[4 * quad + 2] = fmaf(probability, g.z, sum[4 * quad + 2]);
        sum[4 * quad + 3] = fmaf(probability, g.w, sum[4 * quad + 3]);
      }
    }
  }
}

// The sums of an entry's slots, in order, to memory.
template <int kThreads, int kQuads>
__device__ __forceinline__ void write_part(const SoftEmbeddingBackwardParams& b, const float (&total)[4 * kQuads]) {
  constexpr int kSlots = kGradientBlock / kThreads, kColumns = 4 * kQuads;
  const int slot = threadIdx.x / kThreads, v = threadIdx.x % kThreads;
  SOFTDIMO_SHARED(float, others, kSlots > 1 ? (kSlots - 1) * kColumns * kThreads : 1);
  if constexpr (kSlots > 1) {
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      if (slot > 0) others[((slot - 1) * kColumns + d) * kThreads + v] = total[d];
    }
    __syncthreads();
  }
  if (slot > 0 || v >= b.call.vocabulary) return;
  float* out = b.dcodebook + (static_cast<int64_t>(blockIdx.x) * b.call.vocabulary + v) * b.call.width;
#pragma unroll
  for (int d = 0; d < kColumns; ++d) {
    float sum = total[d];
#pragma unroll
    for (int other = 0; other + 1 < kSlots; ++other) sum += others[(other * kColumns + d) * kThreads + v];
    if (d < b.call.width) out[d] = sum;
  }
}

// Block `split * groups + group`.
template <int kThreads, int kQuads>
__global__ void __launch_bounds__(kGradientBlock, 2)
    soft_embedding_tiny_dcodebook_kernel(const SoftEmbeddingBackwardParams b) {
  SOFTDIMO_SHARED(StagedRow, rows, kStage);
  SOFTDIMO_SHARED(float4, upstream, kQuads * kStage);
  const SoftEmbeddingParams& p = b.call;
  const unsigned groups = static_cast<unsigned>(p.groups);
  const int64_t group = blockIdx.x % groups, split = blockIdx.x / groups, positions = p.rows / p.groups;
  const int64_t part = (positions + b.splits - 1) / b.splits, begin = split * part;
  const int64_t last = begin + part < positions ? begin + part : positions;
  float total[4 * kQuads] = {};
  for (int64_t first = begin; first < last; first += kStage) {
    if (threadIdx.x < kStage) rows[threadIdx.x] = stage_row(b, first + threadIdx.x, last, group);
    __syncthreads();
    for (int i = threadIdx.x; i < kQuads * kStage; i += kGradientBlock) {
      const int quad = i / kStage, j = i % kStage;
      const int64_t n = (first + j) * p.groups + group;
      upstream[i] = load_quad(b.grad, p.codebook_type, n * p.width, 4 * quad, static_cast<int>(p.width),
                              rows[j].inverse != 0.0f);
    }
    __syncthreads();
    float sum[4 * kQuads] = {};
    add_stage<kThreads, kQuads>(p, first * p.groups + group, rows, upstream, sum);
#pragma unroll
    for (int d = 0; d < 4 * kQuads; ++d) total[d] += sum[d];
    __syncthreads();
  }
  write_part<kThreads, kQuads>(b, total);
}

template <int kThreads>
void launch(const SoftEmbeddingBackwardParams& b, unsigned blocks, cudaStream_t stream) {
  if (b.call.width <= 8) {
    SOFTDIMO_LAUNCH((soft_embedding_tiny_dcodebook_kernel<kThreads, 2>), blocks, kGradientBlock, 0, stream, b);
  } else {
    SOFTDIMO_LAUNCH((soft_embedding_tiny_dcodebook_kernel<kThreads, 4>), blocks, kGradientBlock, 0, stream, b);
  }
}

}  // namespace
}  // namespace tiny

extern "C" int softdimo_soft_embedding_tiny_dcodebook(const SoftEmbeddingBackwardParams* params, void* stream) {
  const SoftEmbeddingParams& p = params->call;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (!tiny::is_valid(p) || params->splits < 1) return cudaErrorInvalidValue;
  if (p.groups > INT32_MAX / params->splits) return cudaErrorInvalidConfiguration;
  const unsigned blocks = static_cast<unsigned>(p.groups * params->splits);
  if (p.vocabulary <= 64) {
    tiny::launch<64>(*params, blocks, queue);
  } else if (p.vocabulary <= 128) {
    tiny::launch<128>(*params, blocks, queue);
  } else {
    tiny::launch<256>(*params, blocks, queue);
  }
  return cudaGetLastError();
}

}  // namespace softdimo::cuda
