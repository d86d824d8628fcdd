// token_statistics: log normalizer, entropy and largest probability of p = softmax(z / T), for every row of [N, V].
//
//   formula   with m = max z, t_v = (z_v - m) / T, l = sum e^t:
//             log_normalizer = m / T + log l      entropy = log l - sum e^t t / l      max_prob = 1 / l
//   bytes     b V + 13 per row: each logit (b bytes) once, one mask byte, three floats
//   FLOPs     8 V per row and 9/8 V exponentials (float32: 5/4 V); about 12 instructions per logit
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 rows of V = 8192 in bfloat16 are 134 MB, so
//             75 / 45 / 31 us. The exponentials need 31 / 20 / 20 us (2.44 and 3.87 Texp/s) and the instructions
//             41 / 26 / 26 us (4 warp instructions per clock and multiprocessor): both hide, narrowly on the H200
//   tiles     a block of 128 threads holds 16 rows or 2, by V alone:
//
//             chunks of 16 bytes   threads per row    row:  chunk 0  | chunk 1  | ... | chunk k  | chunk k+1 | ...
//             up to 256            k = 8                    thread 0   thread 1         thread 0   thread 1
//             more                 k = 64                   a thread has four chunks in flight
//                                                           then merge: shuffles, and for k = 64 shared memory
//
// What a thread knows of a row is its largest logit and two sums over the other ones. Keeping the largest out of the
// sums is what keeps a row near one-hot precise: there l = 1 + rest with a tiny rest, log l = log1p(rest), and no two
// numbers cancel. The sums are rescaled when a larger logit comes; the one it displaces joins the others.

#include "softdimo/cuda/token_statistics.h"

#include <cuda_runtime.h>

#include <cmath>

#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/row_reduce.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 128;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

struct Partial {
  float max;     // NaN once a logit was
  float rest;    // sum of 2^u over all but one entry equal to max, u = (z - max) log2(e) / T
  float moment;  // sum of 2^u u over the same entries
};

__device__ __forceinline__ Partial nothing() { return {-INFINITY, 0.0f, 0.0f}; }

// u of a logit z <= max. The bound stands for minus infinity: 2^-256 is zero, and 0 * -256 is not NaN. Where
// max is infinite or NaN the result is of no use, and finite.
__device__ __forceinline__ float exponent(float z, float max, float scale) {
  return fmaxf((z - max) * scale, -256.0f);
}

template <int kCount>
__device__ __forceinline__ void add(Partial& partial, float (&z)[kCount], float scale) {
  const float before = partial.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float smaller = fminf(partial.max, z[i]);
    partial.max = ptx::max_or_nan(partial.max, z[i]);
    z[i] = smaller;
  }
  float rest = 0.0f, moment = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float u = exponent(z[i], partial.max, scale);
    const float weight = ptx::exp2_approx(u);
    rest += weight;
    moment = fmaf(weight, u, moment);
  }
  const float shift = exponent(before, partial.max, scale);
  const float factor = ptx::exp2_approx(shift);
  partial.moment = fmaf(factor, fmaf(partial.rest, shift, partial.moment), moment);
  partial.rest = fmaf(factor, partial.rest, rest);
}

struct Merge {
  float scale;

  __device__ __forceinline__ Partial operator()(const Partial& first, const Partial& second) const {
    const bool swap = second.max > first.max;
    const float shift = exponent(swap ? first.max : second.max, swap ? second.max : first.max, scale);
    const float factor = ptx::exp2_approx(shift);
    const float count = 1.0f + (swap ? first.rest : second.rest);  // with the lower side's largest entry
    return {ptx::max_or_nan(first.max, second.max), fmaf(factor, count, swap ? second.rest : first.rest),
            fmaf(factor, fmaf(shift, count, swap ? first.moment : second.moment),
                 swap ? second.moment : first.moment)};
  }
};

template <bool kAligned, int kThreads, typename T>
__device__ __forceinline__ Partial accumulate(const RowReader<T>& row, int thread, float scale) {
  constexpr int kChunk = RowReader<T>::kChunk;
  Partial partial = nothing();
  each_chunk<kAligned, kThreads>(row, thread, row.chunks(), -INFINITY,
                                 [&](int, float(&z)[kChunk], bool) { add(partial, z, scale); });
  return partial;
}

__device__ __forceinline__ void finish(const TokenStatisticsParams& p, int64_t n, const Partial& partial,
                                       float temperature, float scale) {
  const float total = 1.0f + partial.rest;
  const float log_total = log1pf(partial.rest);
  float log_normalizer = partial.max / temperature + log_total;
  float entropy = fmaf(-kLn2, partial.moment / total, log_total);
  float max_prob = 1.0f / total;
  // A NaN, +inf or nothing but -inf in the row; a temperature that is not positive, or whose inverse overflows.
  if (!(fabsf(partial.max) < INFINITY && temperature > 0.0f && scale < INFINITY)) {
    log_normalizer = entropy = max_prob = NAN;
  }
  p.log_normalizer[n] = log_normalizer;
  p.entropy[n] = entropy;
  p.max_prob[n] = max_prob;
}

// kThreads neighbouring threads work on a row. Threads without a row, or with one that is not counted, read nothing
// and take part in the reduction.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock, 8) token_statistics_kernel(const TokenStatisticsParams p) {
  const int thread = threadIdx.x % kThreads;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  const bool exists = n < p.rows;
  const bool counted = exists && (p.mask == nullptr || p.mask[n * p.mask_stride] != 0);
  float temperature = p.temperature;
  if (counted && p.row_temperature != nullptr) temperature = p.row_temperature[n * p.row_temperature_stride];
  const float scale = kLog2E / temperature;

  Partial partial = nothing();
  if (counted) {
    const RowReader<T> row(static_cast<const T*>(p.logits) + n * p.row_stride, static_cast<int>(p.vocabulary));
    partial = row.aligned() ? accumulate<true, kThreads>(row, thread, scale)
                            : accumulate<false, kThreads>(row, thread, scale);
  }
  partial = reduce_row<kThreads, kBlock>(partial, Merge{scale});
  if (thread != 0 || !exists) return;
  if (counted) {
    finish(p, n, partial, temperature, scale);
  } else {
    p.log_normalizer[n] = p.entropy[n] = p.max_prob[n] = 0.0f;
  }
}

template <typename T, int kThreads>
cudaError_t launch(const TokenStatisticsParams& p, cudaStream_t stream) {
  constexpr int64_t kRows = kBlock / kThreads;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH((token_statistics_kernel<T, kThreads>), static_cast<unsigned>(blocks), kBlock, 0, stream, p);
  return cudaGetLastError();
}

// By the vocabulary alone, so that a row's bits do not depend on how many rows there are.
template <typename T>
cudaError_t launch_for_vocabulary(const TokenStatisticsParams& p, cudaStream_t stream) {
  const int64_t chunks = (p.vocabulary + RowReader<T>::kChunk - 1) / RowReader<T>::kChunk;
  return chunks <= 256 ? launch<T, 8>(p, stream) : launch<T, 64>(p, stream);
}

}  // namespace

extern "C" int softdimo_token_statistics(const TokenStatisticsParams* params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (params->vocabulary < 1 || params->vocabulary > kMaxVocabulary) return cudaErrorInvalidValue;
  if (params->rows <= 0) return cudaSuccess;
  switch (params->dtype) {
    case DType::float32:
      return launch_for_vocabulary<float>(*params, queue);
    case DType::bfloat16:
      return launch_for_vocabulary<__nv_bfloat16>(*params, queue);
    case DType::float16:
      return launch_for_vocabulary<__half>(*params, queue);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace softdimo::cuda
