// sample_tokens: a draw from softmax(z / T), truncated if asked, for every row of [N, V].
//
//   formula   token = argmax_v key[v],  key[v] = (z[v] - max z) / T - log(-log(1 - u[v])),  u from Philox
//   bytes     b V + 8 per row: each logit (b bytes) once. Rows above 32 KB are read again in every sweep: twice, and
//             once more for the log-probability; about 10 to 20 times more where they are truncated
//   work      per logit about 23 instructions (of them 4.5 wide products), one logarithm in hardware, no other; with
//             the log-probability 8 more and one exponential. top_k or top_p: 40 to 90 more, and a division if T is
//             not 1
//   floor     8192 rows of V = 8192 in bfloat16 are 134 MB: 75 / 45 / 31 us of memory at 1.8 / 3.0 / 4.3 TB/s (A100 /
//             H100 / H200). The instructions need 79 / 50 / 50 us at 4 warp instructions per clock and multiprocessor:
//             they are the wall, not memory. top_k or top_p: 230 / 140 / 140 us and more. Predictions, not measurements
//   tiles     a block of 128 threads holds 8 rows or 1, by V alone:
//
//             chunks of 16 bytes   threads per row    row:  chunk 0  | chunk 1  | ... | chunk k  | chunk k+1 | ...
//             up to 256            k = 16                   thread 0   thread 1         thread 0   thread 1
//             more                 k = 128                  read once into shared memory, if it is 2048 chunks or less
//
// No logarithm but one is needed for an entry that cannot win. -log(1 - u) >= u, so with u rounded down
//
//     key / log 2 <= (z - max z) log2(e) / T - log2 u         the score
//
// A thread keeps the best score of its chunks, where that was, and the best of its other chunks. Then the best score
// of the row gets its exact key, and after it whatever scores no less than that key, which is seldom anything: for an
// entry that could win in a large vocabulary u is small and the score as good as the key. The winner is that of the
// exact keys, and of equal keys the lowest index.
//
// Noise lies between -2.81 and 22.88. A chunk whose largest logit cannot win with the most of it gets no random words:
// most chunks of a row that is peaked, cold or truncated. That is exact too.

#include "softdimo/cuda/sample_tokens.h"

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "softdimo/cuda/gumbel.cuh"
#include "softdimo/cuda/held_row.cuh"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/philox_words.cuh"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_group.cuh"
#include "softdimo/cuda/truncation.cuh"
#include "softdimo/philox.h"

namespace softdimo::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kManyChunks = 256;       // more have the block to themselves
constexpr int kResidentChunks = 2048;  // 32 KB: more are read again in every sweep
constexpr float kLog2E = 1.44269504088896340736f;

// In units of log 2. Noise is at most kMostNoise; an entry's key lies at most kMostGap below its score; all rounding
// in scores and keys of entries that could win stays below kSlack.
constexpr float kMostNoise = 33.0f, kMostGap = 4.06f, kSlack = 2.5e-4f;

// What the threads of a row know about its noise and its keys.
struct Draw {
  const uint4* keys;  // of Philox's rounds
  uint64_t row;
  uint32_t offset;
  float top, temperature;
  float slope;  // log2(e) / T, finite
  Cut cut;  // where truncated
};

// The best key that was computed.
struct Winner {
  float key;
  int index;       // -1 for none
  float distance;  // (z - max z) / T, the key without its noise

  struct Better {
    __device__ __forceinline__ Winner operator()(const Winner& a, const Winner& b) const {
      return b.key > a.key || (b.key == a.key && b.index < a.index) ? b : a;
    }
  };
};

// The best scores of a thread's chunks.
struct Scores {
  float best;  // minus infinity for none
  int chunk;   // that has it
  float rest;  // the best of the other chunks'
};

// Not below the key in units of log 2: the uniform's 23 highest bits alone, and u for -log(1 - u).
__device__ __forceinline__ float score_of(float distance, float slope, uint32_t word) {
  const float u = __uint_as_float(__funnelshift_r(word, 0x7fu, 9)) - 1.0f;  // the float 1.bits
  return fmaf(distance, slope, -ptx::log2_approx(u));
}

// The logits of a chunk, minus infinity where they are dropped.
template <bool kTruncated, typename Row>
__device__ __forceinline__ void load_kept(const Row& row, const Draw& draw, int j, float (&z)[Row::kChunk]) {
  row.load(j, z);
  if constexpr (kTruncated) {
#pragma unroll
    for (int i = 0; i < Row::kChunk; ++i) z[i] = draw.cut.apply(z[i], j * Row::kChunk + i);
  }
}

// floor: no entry whose key is below it can win.
template <bool kTruncated, typename Row>
__device__ __forceinline__ Scores score_chunks(const Row& row, const Draw& draw, int thread, int threads, float floor) {
  constexpr int kChunk = Row::kChunk;
  Scores scores{-INFINITY, -1, -INFINITY};
  float z[kChunk];
  uint32_t word[kChunk];
#pragma unroll 1
  for (int j = thread; j < row.chunks(); j += threads) {
    load_kept<kTruncated>(row, draw, j, z);
    float top = z[0];
#pragma unroll
    for (int i = 1; i < kChunk; ++i) top = fmaxf(top, z[i]);
    const float reach = fmaf(top - draw.top, draw.slope, kMostNoise + kSlack);
    const float least = scores.best < INFINITY ? fmaxf(scores.best - kMostGap, floor) : floor;
    if (reach < least) continue;
    philox_words(draw.keys, draw.row, draw.offset, j, word);
    float best = -INFINITY;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) best = fmaxf(best, score_of(z[i] - draw.top, draw.slope, word[i]));
    scores.rest = fmaxf(scores.rest, fminf(scores.best, best));
    if (best > scores.best) {
      scores.best = best;
      scores.chunk = j;
    }
  }
  return scores;
}

// Gives exact keys to the entries of a chunk whose score is not below `least`; `rest` becomes at least the best score
// of the others. One copy of the logarithms: entries are taken one after the other.
template <bool kTruncated, typename Row>
__device__ __forceinline__ Winner try_chunk(const Row& row, const Draw& draw, int j, float least, Winner winner,
                                            float& rest) {
  constexpr int kChunk = Row::kChunk;
  float z[kChunk], score[kChunk];
  uint32_t word[kChunk];
  load_kept<kTruncated>(row, draw, j, z);
  philox_words(draw.keys, draw.row, draw.offset, j, word);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) score[i] = score_of(z[i] - draw.top, draw.slope, word[i]);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) rest = score[i] < least ? fmaxf(rest, score[i]) : rest;
  while (true) {
    int at = -1;
    float logit = 0.0f;
    uint32_t bits = 0;
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      if (!(score[i] >= least)) continue;
      at = i;
      logit = z[i];
      bits = word[i];
    }
    if (at < 0) return winner;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) score[i] = i == at ? NAN : score[i];
    const float distance = (logit - draw.top) / draw.temperature;
    const Winner entry{distance + gumbel(open_uniform(bits)).high, j * kChunk + at, distance};
    winner = Winner::Better{}(winner, entry);
  }
}

// The entry with the best key. The best score has its exact key first; entries whose scores it does not beat follow,
// which are few: the score of an entry that could win is close to its key.
template <bool kTruncated, typename Row, typename Group>
__device__ __forceinline__ Winner best_entry(const Row& row, const Group& group, const Draw& draw, int threads,
                                             float floor) {
  Scores scores = score_chunks<kTruncated>(row, draw, group.thread(), threads, floor);
  const float most = group.all(scores.best, Larger{});
  const Winner none{-INFINITY, -1, 0.0f};
  Winner winner = none;
  float rest = fmaxf(scores.rest, scores.best);
  if (scores.best == most && scores.chunk >= 0) {
    rest = scores.rest;
    winner = try_chunk<kTruncated>(row, draw, scores.chunk, most, none, rest);
  }
  const float least = fmaf(group.all(winner.key, Larger{}), kLog2E, -kSlack);
  if (rest >= least) {
#pragma unroll 1
    for (int j = group.thread(); j < row.chunks(); j += threads) winner = try_chunk<kTruncated>(row, draw, j, least, winner, rest);
  }
  return group.all(winner, Winner::Better{});
}

// log(p[token]) = -log(1 + sum over the others of p / p[token]): exact for p near 1.
template <bool kTruncated, typename Row, typename Group>
__device__ __forceinline__ float log_probability(const Row& row, const Group& group, const Draw& draw, int threads,
                                                 const Winner& token) {
  constexpr int kChunk = Row::kChunk;
  float others = 0.0f;
  float z[kChunk];
#pragma unroll 1
  for (int j = group.thread(); j < row.chunks(); j += threads) {
    load_kept<kTruncated>(row, draw, j, z);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float weight = ptx::exp2_approx((z[i] - draw.top) * draw.slope);
      others += j * kChunk + i == token.index ? 0.0f : weight;
    }
  }
  others = group.all(others, Sum{});
  return token.index >= 0 ? -log1pf(others * expf(-token.distance)) : NAN;
}

// kThreads neighbouring threads work on a row.
template <typename T, int kThreads, bool kResident, bool kTruncated>
__global__ void __launch_bounds__(kBlock, kTruncated ? 5 : kResident ? 8 : 7) sample_tokens_kernel(const SampleTokensParams p) {
  using Row = HeldRow<T, kThreads, kResident>;
  using Truncator = Truncate<T, kThreads, kBlock, kResident>;
  SOFTDIMO_DYNAMIC_SHARED(shared);
  SOFTDIMO_SHARED(uint4, keys, kRoundKeyQuads);
  store_round_keys(static_cast<uint64_t>(p.seed[0]), &keys[0]);
  __syncthreads();
  const RowGroup<kThreads, kBlock> group;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kBlock / kThreads) + group.row();
  if (n >= p.rows) return;  // all threads of the row
  const int columns = static_cast<int>(p.vocabulary);
  const int held = kResident ? (columns + Row::kChunk - 1) / Row::kChunk * 16 : 0;
  const Row row(static_cast<const T*>(p.logits) + n * p.row_stride, columns,
                reinterpret_cast<uint4*>(shared + group.row() * held));
  const float top = group.all(row.fill(group.thread()), [](float a, float b) { return ptx::max_or_nan(a, b); });

  const float temperature = p.row_temperature != nullptr ? p.row_temperature[n * p.row_temperature_stride] : p.temperature;
  Winner token{-INFINITY, -1, 0.0f};
  float log_prob = NAN;
  if (fabsf(top) < INFINITY && temperature > 0.0f && temperature <= FLT_MAX) {
    Draw draw;
    draw.keys = &keys[0];
    draw.offset = static_cast<uint32_t>(p.seed[1]);
    draw.row = static_cast<uint64_t>(p.row_ids != nullptr ? p.row_ids[n * p.row_ids_stride] : n);
    draw.top = top;
    draw.temperature = temperature;
    draw.slope = fminf(kLog2E / temperature, 1e30f);  // 0 * slope is 0, and a bound stays a bound
    if constexpr (kTruncated) {
      unsigned char* table = shared + kBlock / kThreads * held + group.row() * Truncator::kSharedBytes;
      draw.cut = Truncator(group, row, temperature, table)(top, p.top_k, p.top_p).cut;
    }
    // The largest entry has at least this key; truncation may drop it where logits / temperature overflow.
    const float floor = fabsf(top / temperature) < INFINITY ? -kMostGap : -INFINITY;
    token = best_entry<kTruncated>(row, group, draw, kThreads, floor);
    if (p.log_prob != nullptr) log_prob = log_probability<kTruncated>(row, group, draw, kThreads, token);
  }
  if (group.thread() != 0) return;
  p.tokens[n] = token.index;
  if (p.log_prob != nullptr) p.log_prob[n] = log_prob;
}

template <typename T, int kThreads, bool kResident, bool kTruncated>
cudaError_t launch(const SampleTokensParams& p, int64_t chunks, cudaStream_t stream) {
  constexpr int64_t kRows = kBlock / kThreads;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t table = kTruncated ? Truncate<T, kThreads, kBlock, kResident>::kSharedBytes : 0;
  const int64_t bytes = kRows * ((kResident ? chunks * 16 : 0) + table);
  SOFTDIMO_LAUNCH((sample_tokens_kernel<T, kThreads, kResident, kTruncated>), static_cast<unsigned>(blocks), kBlock,
                  static_cast<size_t>(bytes), stream, p);
  return cudaGetLastError();
}

// By the vocabulary alone, so that a row's bits do not depend on how many rows there are.
template <typename T, bool kTruncated>
cudaError_t launch_for_vocabulary(const SampleTokensParams& p, cudaStream_t stream) {
  const int64_t chunks = (p.vocabulary + RowReader<T>::kChunk - 1) / RowReader<T>::kChunk;
  if (chunks <= kManyChunks) return launch<T, 16, true, kTruncated>(p, chunks, stream);
  return chunks <= kResidentChunks ? launch<T, kBlock, true, kTruncated>(p, chunks, stream)
                                   : launch<T, kBlock, false, kTruncated>(p, chunks, stream);
}

template <typename T>
cudaError_t launch_for_options(const SampleTokensParams& p, cudaStream_t stream) {
  const bool truncated = p.top_k > 0 || p.top_p < 1.0;
  return truncated ? launch_for_vocabulary<T, true>(p, stream) : launch_for_vocabulary<T, false>(p, stream);
}

}  // namespace

extern "C" int softdimo_sample_tokens(const SampleTokensParams* params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (params->vocabulary < 1 || params->vocabulary > kMaxVocabulary) return cudaErrorInvalidValue;
  if (params->top_k < 0 || !(params->top_p > 0.0)) return cudaErrorInvalidValue;
  if (params->rows <= 0) return cudaSuccess;
  switch (params->dtype) {
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

}  // namespace softdimo::cuda
