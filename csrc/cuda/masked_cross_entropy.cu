// masked_cross_entropy, forward and backward, over every counted row z of [N, V], with target y and label smoothing e.
//
//   forward   loss = log(1 + rest) - (1 - e) s_y - (e / V) sum_v s_v       s = z - max z, rest = sum of exp(s) over all
//             entries but one maximum
//   backward  dz_v = (exp(s_v) / (1 + rest) - [v = y] (1 - e) - e / V) g   g: the upstream gradient
//
//   bytes     forward b V per row (b per logit), backward 2 b V, and about 30. Rows that are not counted: forward 13,
//             backward b V of zeros
//   FLOPs     7 V forward, 5 V backward, with 9/8 V and V exponentials (float32: 5/4 V); 10 and 8 instructions a logit
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 rows of V = 8192 in bfloat16 are 134 MB
//             forward, 75 / 45 / 31 us, and 268 MB backward, 149 / 90 / 62 us. The exponentials need 31 / 20 / 20 us
//             (2.44 and 3.87 Texp/s), the forward's instructions 34 / 22 / 22 us: both hide
//   tiles     a block of 128 threads holds 16 rows or 2, by V alone:
//
//             chunks of 16 bytes   threads per row    row:  chunk 0  | chunk 1  | ... | chunk k  | chunk k+1 | ...
//             up to 256            k = 8                    thread 0   thread 1         thread 0   thread 1
//             more                 k = 64                   a thread has four chunks in flight
//
// Forward, chunks start at the row's first column wherever it lies, so that sums do not depend on that; backward, at
// the 16-byte boundaries of dz, so that stores are whole. Reductions to the sum or mean are row_sum's.
//
// The largest logit is kept out of `rest`, and the backward takes both as the forward left them. So where the target
// holds the maximum, its gradient exp(0) / (1 + rest) - 1 is -rest / (1 + rest): minus the sum of the other entries,
// and nothing cancels in a row near one-hot.

#include "softdimo/cuda/masked_cross_entropy.h"

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/cuda/row_reduce.cuh"
#include "softdimo/cuda/row_writer.cuh"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 128;
constexpr float kLog2E = 1.44269504088896340736f;

// exp(z - max) for z <= max, both finite or z = -inf.
__device__ __forceinline__ float exp_below(float z, float max) { return ptx::exp2_approx((z - max) * kLog2E); }

// What the target and the other entries have of a row, from V and the smoothing e.
struct Shares {
  float smoothing;  // e
  float hit;        // 1 - e
  float each;       // e / V
  float own;        // 1 - e + e / V
  float others;     // e - e / V

  explicit Shares(const CrossEntropy& c) {
    const double e = c.smoothing, share = e / static_cast<double>(c.vocabulary);
    smoothing = static_cast<float>(e);
    hit = static_cast<float>(1 - e);
    each = static_cast<float>(share);
    own = static_cast<float>(1 - e + share);
    others = static_cast<float>(e - share);
  }
};

// The row of a thread. Threads without a row, or with one that is not counted, read neither logits nor target.
struct Row {
  int64_t n;
  bool exists, counted, has_target;
  int target;  // 0 where there is none
};

template <int kThreads>
__device__ __forceinline__ Row find_row(const CrossEntropy& c) {
  Row row{static_cast<int64_t>(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads, false, false, false, 0};
  row.exists = row.n < c.rows;
  row.counted = row.exists && (c.mask == nullptr || c.mask[row.n * c.mask_stride] != 0);
  if (!row.counted) return row;
  const int64_t target = c.targets[row.n * c.target_stride];
  row.has_target = target >= 0 && target < c.vocabulary;
  row.target = row.has_target ? static_cast<int>(target) : 0;
  return row;
}

// ---------------------------------------------------------------------------------------------------
// forward

struct Partial {
  float max;       // NaN once a logit was
  float rest;      // sum of exp(z - max) over all but one entry equal to max
  float distance;  // sum of z - z_y
};

__device__ __forceinline__ Partial nothing() { return {-INFINITY, 0.0f, 0.0f}; }

// What to subtract: never -inf, so that -inf - max is -inf. Where max is infinite or NaN the row is NaN whatever comes
// of the difference.
__device__ __forceinline__ float base_of(float max) { return fmaxf(max, -FLT_MAX); }

// The first `valid` entries of a chunk, which is -inf behind them. A maximum that is displaced joins the others.
template <int kCount>
__device__ __forceinline__ void add(Partial& partial, float (&z)[kCount], int valid, float at_target) {
  const float before = partial.max;
  float distance = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < valid) distance += z[i] - at_target;
    const float smaller = fminf(partial.max, z[i]);
    partial.max = ptx::max_or_nan(partial.max, z[i]);
    z[i] = smaller;
  }
  const float base = base_of(partial.max);
  float rest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) rest += exp_below(z[i], base);
  partial.rest = fmaf(exp_below(before, base), partial.rest, rest);
  partial.distance += distance;
}

struct Merge {
  __device__ __forceinline__ Partial operator()(const Partial& first, const Partial& second) const {
    const bool swap = second.max > first.max;
    const float factor = exp_below(swap ? first.max : second.max, base_of(swap ? second.max : first.max));
    const float count = 1.0f + (swap ? first.rest : second.rest);  // with the lower side's largest entry
    return {ptx::max_or_nan(first.max, second.max), fmaf(factor, count, swap ? second.rest : first.rest),
            first.distance + second.distance};
  }
};

template <bool kAligned, int kThreads, typename T>
__device__ __forceinline__ Partial accumulate(const RowReader<T>& row, int thread, int columns, float at_target) {
  constexpr int kChunk = RowReader<T>::kChunk;
  Partial partial = nothing();
  each_chunk<kAligned, kThreads>(row, thread, row.chunks(), -INFINITY, [&](int j, float(&z)[kChunk], bool whole) {
    add(partial, z, whole ? kChunk : columns - j * kChunk, at_target);
  });
  return partial;
}

__device__ __forceinline__ void finish(const CrossEntropyForwardParams& p, const Shares& shares, const Row& row,
                                       const Partial& partial, float at_target) {
  float max = partial.max, rest = partial.rest;
  float loss = fmaf(shares.hit, max - at_target, log1pf(rest));
  if (shares.smoothing != 0.0f && at_target > -INFINITY) {
    float mean = partial.distance / static_cast<float>(p.call.vocabulary) - (max - at_target);
    if (!(mean < INFINITY)) mean = -INFINITY;  // distances that overflow
    loss = fmaf(-shares.smoothing, mean, loss);
  }
  // A NaN, +inf or nothing but -inf in the row; no target.
  if (!(fabsf(max) < INFINITY && row.has_target)) loss = max = rest = NAN;
  p.loss[row.n] = loss;
  p.row_max[row.n] = max;
  p.row_rest[row.n] = rest;
}

// kThreads neighbouring threads work on a row.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock, 8) masked_cross_entropy_kernel(const CrossEntropyForwardParams p,
                                                                         const Shares shares) {
  const CrossEntropy& c = p.call;
  const int thread = threadIdx.x % kThreads;
  const Row row = find_row<kThreads>(c);
  Partial partial = nothing();
  float at_target = 0.0f;
  if (row.has_target) {
    const T* const logits = static_cast<const T*>(c.logits) + row.n * c.row_stride;
    const int columns = static_cast<int>(c.vocabulary);
    const RowReader<T> reader(logits, columns);
    at_target = to_float(__ldg(logits + row.target));
    partial = reader.aligned() ? accumulate<true, kThreads>(reader, thread, columns, at_target)
                               : accumulate<false, kThreads>(reader, thread, columns, at_target);
  }
  partial = reduce_row<kThreads, kBlock>(partial, Merge{});
  if (thread != 0 || !row.exists) return;
  if (row.counted) {
    finish(p, shares, row, partial, at_target);
  } else {
    p.loss[row.n] = p.row_max[row.n] = p.row_rest[row.n] = 0.0f;
  }
}

// ---------------------------------------------------------------------------------------------------
// backward

struct RowGradient {
  float max, rest, inverse, upstream;  // inverse: 1 / (1 + rest)

  // Of an entry that is not the target.
  __device__ __forceinline__ float other(float z, const Shares& shares) const {
    return fmaf(exp_below(z, max), inverse, -shares.each) * upstream;
  }
  __device__ __forceinline__ float target(float z, const Shares& shares) const {
    const float g = z == max ? fmaf(-rest, inverse, shares.others) : fmaf(exp_below(z, max), inverse, -shares.own);
    return g * upstream;
  }
};

template <bool kAligned, int kThreads, typename T>
__device__ __forceinline__ void write_gradient(const RowReader<T>& reader, const RowWriter<T>& writer, int thread,
                                               const RowGradient& gradient, const Shares& shares) {
  constexpr int kWord = RowWriter<T>::kWord;
  each_chunk<kAligned, kThreads>(reader, thread, writer.words(), 0.0f, [&](int j, float(&z)[kWord], bool whole) {
#pragma unroll
    for (int i = 0; i < kWord; ++i) z[i] = gradient.other(z[i], shares);
    if (whole) {
      writer.store_whole(j, z);
    } else {
      writer.store(j, z);
    }
  });
}

template <int kThreads, typename T>
__device__ __forceinline__ void write_zeros(const RowWriter<T>& writer, int thread) {
  const float zeros[RowWriter<T>::kWord] = {};
  for (int j = thread; j < writer.words(); j += kThreads) writer.store(j, zeros);
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock, 8) masked_cross_entropy_backward_kernel(const CrossEntropyBackwardParams p,
                                                                                  const Shares shares) {
  const CrossEntropy& c = p.call;
  const int thread = threadIdx.x % kThreads, columns = static_cast<int>(c.vocabulary);
  const Row row = find_row<kThreads>(c);
  if (!row.exists) return;
  const RowWriter<T> writer(static_cast<T*>(p.dlogits) + row.n * c.vocabulary, columns);
  if (!row.counted) {
    write_zeros<kThreads>(writer, thread);
    return;
  }
  const T* const logits = static_cast<const T*>(c.logits) + row.n * c.row_stride;
  const RowReader<T> reader(logits, columns, writer.offset());
  const float rest = p.row_rest[row.n];
  const RowGradient gradient{p.row_max[row.n], rest, 1.0f / (1.0f + rest), p.grad[row.n * p.grad_stride]};
  if (reader.aligned()) {
    write_gradient<true, kThreads>(reader, writer, thread, gradient, shares);
  } else {
    write_gradient<false, kThreads>(reader, writer, thread, gradient, shares);
  }
  // The target's entry once more, by the thread that has just written its word.
  if (row.has_target && writer.word_of(row.target) % kThreads == thread) {
    const float z = to_float(__ldg(logits + row.target));
    writer.store_entry(row.target, gradient.target(z, shares));
  }
}

// ---------------------------------------------------------------------------------------------------
// launch

template <typename T, int kThreads>
cudaError_t launch(const CrossEntropyForwardParams& p, unsigned blocks, cudaStream_t stream) {
  SOFTDIMO_LAUNCH((masked_cross_entropy_kernel<T, kThreads>), blocks, kBlock, 0, stream, p, Shares(p.call));
  return cudaGetLastError();
}

template <typename T, int kThreads>
cudaError_t launch(const CrossEntropyBackwardParams& p, unsigned blocks, cudaStream_t stream) {
  SOFTDIMO_LAUNCH((masked_cross_entropy_backward_kernel<T, kThreads>), blocks, kBlock, 0, stream, p, Shares(p.call));
  return cudaGetLastError();
}

// By the vocabulary alone, so that a row's bits do not depend on how many rows there are.
template <typename T, typename Params>
cudaError_t launch_for_vocabulary(const Params& p, cudaStream_t stream) {
  const int64_t chunks = (p.call.vocabulary + RowReader<T>::kChunk - 1) / RowReader<T>::kChunk;
  const int64_t rows = chunks <= 256 ? kBlock / 8 : kBlock / 64, blocks = (p.call.rows + rows - 1) / rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  return chunks <= 256 ? launch<T, 8>(p, grid, stream) : launch<T, 64>(p, grid, stream);
}

template <typename Params>
cudaError_t launch_for_type(const Params& p, cudaStream_t stream) {
  if (p.call.vocabulary < 1 || p.call.vocabulary > kMaxVocabulary) return cudaErrorInvalidValue;
  if (p.call.rows <= 0) return cudaSuccess;
  switch (p.call.dtype) {
    case DType::float32:
      return launch_for_vocabulary<float>(p, stream);
    case DType::bfloat16:
      return launch_for_vocabulary<__nv_bfloat16>(p, stream);
    case DType::float16:
      return launch_for_vocabulary<__half>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" int softdimo_masked_cross_entropy(const CrossEntropyForwardParams* params, void* stream) {
  return launch_for_type(*params, static_cast<cudaStream_t>(stream));
}

extern "C" int softdimo_masked_cross_entropy_backward(const CrossEntropyBackwardParams* params, void* stream) {
  return launch_for_type(*params, static_cast<cudaStream_t>(stream));
}

}  // namespace softdimo::cuda
