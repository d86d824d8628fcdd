// soft_embedding's backward for tiny vocabularies (V <= 256, D <= 16): gradients of the logits and of each row's
// temperature, all groups in one launch.
//
//   formula   p_v = 2^((y_v - m) log2(e) / T) / l from the saved m and l;  t_v = g . E[v];  delta = sum p t
//             dlogits_v = p_v (t_v - delta) / T;  where p_v > 1/2, minus the sum of the others
//             dT = -(1 / T) sum dlogits_v (y_v - mean y),  mean y under p
//   bytes     2 b V + b' D + 12 per row: each logit (b bytes) read and its gradient written once
//   FLOPs     2 V D per row and V exponentials; about D + 10 instructions per logit
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200). MaskBit, 2 x 16384 rows of V = 128, D = 7 in
//             bfloat16 is 17.6 MB: 9.8 / 5.9 / 4.1 us (float32: 34.9 MB, 19 / 12 / 8.1 us). Instructions take about
//             3.8 / 2.4 / 2.4 us and hide
//   tiles     see soft_embedding_tiny_rows.cuh. A thread takes two rows; with noise, or where the gradient of the
//             temperature is wanted, one, which keeps its distances y - m beside p and t
//
// delta comes from the same p and t as the rest, in float32, so that a row's gradients add up to zero as they should,
// and the saved value is not read.

#include "softdimo/cuda/soft_embedding_tiny_rows.cuh"

namespace softdimo::cuda {
namespace tiny {
namespace {

// Rows that a thread takes at a time: two, so that an entry of the codebook that it reads serves both.
template <bool kGeneral>
constexpr int kRowsOf = kGeneral ? 1 : 2;

// The upstream gradient of the block's rows, four columns at a time: [quad][row], zeros beyond D and in rows that are
// not soft.
template <int kTeam, int kRows, typename Upstream>
__device__ __forceinline__ void stage_upstream(const SoftEmbeddingBackwardParams& b, const Row (&row)[kRows],
                                               Upstream& upstream) {
  constexpr int kTeams = kBlock / kTeam;
  const SoftEmbeddingParams& p = b.call;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll 1
    for (int quad = threadIdx.x % kTeam; quad < quads(p); quad += kTeam) {
      upstream[(quad * kRows + r) * kTeams + threadIdx.x / kTeam] =
          load_quad(b.grad, p.codebook_type, row[r].n * p.width, 4 * quad, static_cast<int>(p.width), row[r].soft);
    }
  }
}

// Turns the slots' t = g . E into dlogits.
template <int kTeam>
__device__ __forceinline__ void finish_row(const float (&p)[kEntries], float inverse, float inverse_t,
                                           float (&t)[kEntries]) {
  float delta = 0.0f;
#pragma unroll
  for (int s = 0; s < kEntries; ++s) delta = fmaf(p[s], t[s], delta);
  delta = team_sum<kTeam>(delta);
#pragma unroll
  for (int s = 0; s < kEntries; ++s) t[s] = p[s] * (t[s] - delta) * inverse_t;
  // t - delta cancels for an entry that has nearly all of the mass. The sum of the others does not.
  const bool peaked = inverse > 0.5f;
  float others = 0.0f;
  if (peaked) {
#pragma unroll
    for (int s = 0; s < kEntries; ++s) others += p[s] > 0.5f ? 0.0f : t[s];
  }
  others = team_sum<kTeam>(others);
  if (peaked) {
#pragma unroll
    for (int s = 0; s < kEntries; ++s) t[s] = p[s] > 0.5f ? -others : t[s];
  }
}

// sum dlogits (y - mean y). An entry with no mass may be infinitely far away, and takes no part.
template <int kTeam>
__device__ __forceinline__ float slope_of(const float (&p)[kEntries], const float (&gradient)[kEntries],
                                          const float (&distance)[kEntries]) {
  float mean = 0.0f, slope = 0.0f;
#pragma unroll
  for (int s = 0; s < kEntries; ++s) mean = p[s] == 0.0f ? mean : fmaf(p[s], distance[s], mean);
  mean = team_sum<kTeam>(mean);
#pragma unroll
  for (int s = 0; s < kEntries; ++s) slope = p[s] == 0.0f ? slope : fmaf(gradient[s], distance[s] - mean, slope);
  return team_sum<kTeam>(slope);
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return std::is_same<T, __half>::value ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
}

// The thread's entries of a row; zeros in rows that are not soft.
template <typename T, int kTeam>
__device__ __forceinline__ void store_gradients(const SoftEmbeddingBackwardParams& b, bool whole, const Row& row,
                                                float (&gradient)[kEntries]) {
  constexpr int kChunk = RowReader<T>::kChunk;
  const int vocabulary = static_cast<int>(b.call.vocabulary), thread = threadIdx.x % kTeam;
  T* out = static_cast<T*>(b.dlogits) + row.n * vocabulary;
#pragma unroll
  for (int first = 0; first < kEntries; first += kChunk) {
    const int column = column_of<T, kTeam>(thread, first);
    float* value = gradient + first;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) value[k] = row.soft ? value[k] : 0.0f;
    if (!whole) {
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        if (column + k < vocabulary) store_as(out + column + k, value[k]);
      }
    } else if (column < vocabulary) {
      uint4 words;
      if constexpr (sizeof(T) == 4) {
        words = make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
                           __float_as_uint(value[3]));
      } else {
        words = make_uint4(pack<T>(value[0], value[1]), pack<T>(value[2], value[3]), pack<T>(value[4], value[5]),
                           pack<T>(value[6], value[7]));
      }
      *reinterpret_cast<uint4*>(out + column) = words;
    }
  }
}

// Turns a row's logits into p, and keeps the distances y - m where kGeneral.
template <typename T, int kTeam, bool kGeneral>
__device__ __forceinline__ void exponentiate(const SoftEmbeddingBackwardParams& b, const Row& row, float inverse,
                                             float (&p)[kEntries], float (&distance)[kEntries]) {
  const FloatPair max = row.soft ? saved_maximum(b, row.n) : FloatPair{0.0f, 0.0f};
  const float scale = exponent_scale(row.temperature);
  float low[kEntries] = {};
  if constexpr (kGeneral) {
    if (b.call.seed != nullptr) add_noise<T, kTeam>(b.call, row.n, p, low);
  }
#pragma unroll
  for (int s = 0; s < kEntries; ++s) {
    float d = p[s] - max.high;
    if constexpr (kGeneral) {
      d += low[s] - max.low;
      distance[s] = d;
    }
    p[s] = ptx::exp2_approx(d * scale) * inverse;
  }
}

// t = g . E of the thread's entries.
template <int kTeam, int kRows, typename Upstream, typename Table>
__device__ __forceinline__ void multiply_codebook(const SoftEmbeddingParams& p, Upstream& upstream, Table& table,
                                                  float (&t)[kRows][kEntries]) {
  constexpr int kTeams = kBlock / kTeam;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int s = 0; s < kEntries; ++s) t[r][s] = 0.0f;
  }
#pragma unroll 1
  for (int quad = 0; quad < quads(p); ++quad) {
    float4 g[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) g[r] = upstream[(quad * kRows + r) * kTeams + threadIdx.x / kTeam];
#pragma unroll
    for (int s = 0; s < kEntries; ++s) {
      const float4 e = table[(quad * kEntries + s) * kTeam + threadIdx.x % kTeam];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        t[r][s] = fmaf(g[r].x, e.x, fmaf(g[r].y, e.y, fmaf(g[r].z, e.z, fmaf(g[r].w, e.w, t[r][s]))));
      }
    }
  }
}

template <typename T, int kTeam, bool kGeneral>
__global__ void __launch_bounds__(kBlock, kTeam < 16 ? 4 : 3)
    soft_embedding_tiny_dlogits_kernel(const SoftEmbeddingBackwardParams b, int steps, bool whole_logits,
                                       bool whole_gradients) {
  constexpr int kRows = kRowsOf<kGeneral>;
  SOFTDIMO_SHARED(float4, table, kMaxQuads * kEntries * kTeam);
  SOFTDIMO_SHARED(float4, upstream, kMaxQuads * kRows * (kBlock / kTeam));
  Row row[kRows];
  float inverse[kRows];  // 1 / sum: the probability of the maximum
  float p[kRows][kEntries], t[kRows][kEntries], distance[kEntries];
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = row_of<kTeam, kRows>(b.call, steps, step, r);
    load_logits<T, kTeam>(b.call, whole_logits, row, p);
#pragma unroll
    for (int r = 0; r < kRows; ++r) inverse[r] = row[r].soft ? 1.0f / __ldg(b.row_sum + row[r].n) : 0.0f;
    __syncwarp();  // a team's upstream gradients are read by the team alone
    stage_upstream<kTeam>(b, row, upstream);
    if (step == 0) {
      stage_codebook<T, kTeam>(b.call, table);
      __syncthreads();
    } else {
      __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) exponentiate<T, kTeam, kGeneral>(b, row[r], inverse[r], p[r], distance);
    multiply_codebook<kTeam>(b.call, upstream, table, t);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inverse_t = inverse_of(row[r].temperature);
      finish_row<kTeam>(p[r], inverse[r], inverse_t, t[r]);
      if constexpr (kGeneral) {
        if (b.dtemperature != nullptr) {
          const float slope = slope_of<kTeam>(p[r], t[r], distance);
          const bool writes = threadIdx.x % kTeam == 0 && row[r].exists;
          if (writes) b.dtemperature[row[r].n] = row[r].soft ? -slope * inverse_t : 0.0f;
        }
      }
      if (b.dlogits != nullptr && row[r].exists) store_gradients<T, kTeam>(b, whole_gradients, row[r], t[r]);
    }
  }
}

template <typename T, int kTeam, bool kGeneral>
cudaError_t launch(const SoftEmbeddingBackwardParams& b, cudaStream_t stream) {
  const SoftEmbeddingParams& p = b.call;
  const Grid grid = grid_of<kTeam, kRowsOf<kGeneral>>(p);
  if (grid.blocks == 0) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH((soft_embedding_tiny_dlogits_kernel<T, kTeam, kGeneral>), grid.blocks, kBlock, 0, stream, b,
                  grid.steps, whole_chunks<T>(p.logits, p.row_stride, p.vocabulary),
                  whole_chunks<T>(b.dlogits, p.vocabulary, p.vocabulary));
  return cudaGetLastError();
}

}  // namespace
}  // namespace tiny

extern "C" int softdimo_soft_embedding_tiny_dlogits(const SoftEmbeddingBackwardParams* params, void* stream) {
  return tiny::dispatch(params->call, params->dtemperature != nullptr, [&](auto shape) {
    using Shape = decltype(shape);
    return tiny::launch<typename Shape::Type, Shape::kTeam, Shape::kGeneral>(*params,
                                                                             static_cast<cudaStream_t>(stream));
  });
}

}  // namespace softdimo::cuda
