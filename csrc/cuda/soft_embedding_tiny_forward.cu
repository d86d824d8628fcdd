// soft_embedding's forward for tiny vocabularies (V <= 256, D <= 16), all groups in one launch.
//
//   formula   m = max y, p~_v = 2^((y_v - m) log2(e) / T), l = sum p~, e_d = sum p~_v E[v, d] / l;  y = z + noise
//   bytes     b V + b' D + 12 per row: each logit (b bytes) once, the value, two statistics; 4 D more where the value
//             is kept in float32 beside it. The codebook comes from caches
//   FLOPs     2 V D per row and V exponentials; about D + 6 instructions per logit
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200). MaskBit, 2 x 16384 rows of V = 128, D = 7 in
//             bfloat16 is 10.2 MB: 5.7 / 3.4 / 2.4 us (float32: 18.3 MB, 10 / 6.1 / 4.3 us). The instructions take
//             longer: about 140 a row and warp, 4 per clock and multiprocessor, so 7.5 / 4.8 / 4.8 us. The launch is
//             as much again
//   tiles     a block of 128 threads in one group, two rows per thread, 16 entries each (soft_embedding_tiny_rows.cuh)
//
//             logits -> registers: y - m -> p~  |  for each quad of columns: sum over the slots of p~ E, four sums per
//                                               |  row and thread -> scatter-sum over the team -> one store
//
// A codebook of signs (MaskBit's) would do with a tree: the bit sums of 16 entries take about 41 additions instead of
// 128 multiply-adds, a third of the instructions. It would serve that one table alone, on which what is launched before
// and after decides more; so there is no such path.

#include "softdimo/cuda/soft_embedding_tiny_rows.cuh"

namespace softdimo::cuda {
namespace tiny {
namespace {

// Rows that a thread takes at a time: two, so that an entry of the codebook that it reads serves both.
template <bool kNoise>
constexpr int kRowsOf = kNoise ? 1 : 2;

// What is known of a row once its entries are exponentials.
struct Statistics {
  float max, max_low;
  float sum;
  int top;  // the lowest column of the maximum; only where the hard value is wanted
};

template <typename T, int kTeam, bool kNoise>
__device__ __forceinline__ Statistics exponentiate(const SoftEmbeddingForwardParams& f, const Row& row,
                                                   float (&z)[kEntries]) {
  Statistics found{-INFINITY, 0.0f, 0.0f, INT32_MAX};
  float low[kEntries];
  if constexpr (kNoise) add_noise<T, kTeam>(f.call, row.n, z, low);
#pragma unroll
  for (int s = 0; s < kEntries; ++s) found.max = fmaxf(found.max, z[s]);  // passes over NaN: the sum tells of it
  found.max = team_max<kTeam>(found.max);
  if constexpr (kNoise) {
    float best = -INFINITY;
#pragma unroll
    for (int s = 0; s < kEntries; ++s) best = z[s] == found.max ? fmaxf(best, low[s]) : best;
    found.max_low = team_max<kTeam>(best);
  }
#pragma unroll
  for (int s = 0; s < kEntries; ++s) {
    z[s] -= found.max;
    if constexpr (kNoise) z[s] += low[s] - found.max_low;
  }
  if (f.hard) {
#pragma unroll
    for (int s = kEntries - 1; s >= 0; --s) {
      if (z[s] == 0.0f) found.top = column_of<T, kTeam>(threadIdx.x % kTeam, s);
    }
    found.top = team_min<kTeam>(found.top);
  }
  const float scale = exponent_scale(row.temperature);
#pragma unroll
  for (int s = 0; s < kEntries; ++s) {
    z[s] = ptx::exp2_approx(z[s] * scale);
    found.sum += z[s];
  }
  found.sum = team_sum<kTeam>(found.sum);
  return found;
}

__device__ __forceinline__ void write_statistics(const SoftEmbeddingForwardParams& f, const Row& row,
                                                 const Statistics& found) {
  f.row_max[row.n] = row.soft ? static_cast<double>(found.max) + static_cast<double>(found.max_low) : 0.0;
  f.row_sum[row.n] = row.soft ? found.sum : 1.0f;
}

// Column 4 quad + i of an entry in the table.
template <typename T, int kTeam, typename Table>
__device__ __forceinline__ float table_element(Table& table, int column, int quad, int i) {
  constexpr int kChunk = RowReader<T>::kChunk;
  const int chunk = column / kChunk, slot = chunk / kTeam * kChunk + column % kChunk;
  const float4 e = table[(quad * kEntries + slot) * kTeam + chunk % kTeam];
  return i == 0 ? e.x : i == 1 ? e.y : i == 2 ? e.z : e.w;
}

// Column d = 4 quad + i of a row's value.
template <typename T, int kTeam, typename Table>
__device__ __forceinline__ void write_value(const SoftEmbeddingForwardParams& f, const Row& row,
                                            const Statistics& found, float soft, Table& table, int quad, int i) {
  const SoftEmbeddingParams& p = f.call;
  const int d = 4 * quad + i;
  const int64_t at = row.n * p.width + d;
  float value = soft;
  if (!row.soft) {
    const int64_t group = blockIdx.x % static_cast<unsigned>(p.groups);
    value = load_element(p.mask_embedding, p.mask_embedding_type, group * p.width + d);
    soft = 0.0f;
  } else if (f.hard && found.sum > 0.0f) {  // not NaN: the row holds a distribution
    value = table_element<T, kTeam>(table, found.top, quad, i);
  }
  if (f.soft != nullptr) f.soft[at] = soft;
  store_element(f.output, p.codebook_type, at, value);
}

// Values of rows whose entries are exponentials.
template <typename T, int kTeam, int kRows, typename Table>
__device__ __forceinline__ void multiply_codebook(const SoftEmbeddingForwardParams& f, const Row (&row)[kRows],
                                                  const Statistics (&found)[kRows], const float (&z)[kRows][kEntries],
                                                  Table& table) {
  constexpr int kWriters = kTeam / 4;  // threads that hold the same column's sum
  const int thread = threadIdx.x % kTeam, i = thread / kWriters;
#pragma unroll 1
  for (int quad = 0; quad < quads(f.call); ++quad) {
    float sum[kRows][4] = {};
#pragma unroll
    for (int s = 0; s < kEntries; ++s) {
      const float4 e = table[(quad * kEntries + s) * kTeam + thread];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] = fmaf(z[r][s], e.x, sum[r][0]);
        sum[r][1] = fmaf(z[r][s], e.y, sum[r][1]);
        sum[r][2] = fmaf(z[r][s], e.z, sum[r][2]);
        sum[r][3] = fmaf(z[r][s], e.w, sum[r][3]);
      }
    }
    const bool writes = thread % kWriters == 0 && 4 * quad + i < f.call.width;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float soft = team_scatter_sum<kTeam>(sum[r]) / found[r].sum;
      if (writes && row[r].exists) write_value<T, kTeam>(f, row[r], found[r], soft, table, quad, i);
    }
  }
}

template <typename T, int kTeam, bool kNoise>
__global__ void __launch_bounds__(kBlock, kNoise ? 4 : 5)
    soft_embedding_tiny_forward_kernel(const SoftEmbeddingForwardParams f, int steps, bool whole) {
  constexpr int kRows = kRowsOf<kNoise>;
  SOFTDIMO_SHARED(float4, table, kMaxQuads * kEntries * kTeam);
  Row row[kRows];
  Statistics found[kRows];
  float z[kRows][kEntries];
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = row_of<kTeam, kRows>(f.call, steps, step, r);
    load_logits<T, kTeam>(f.call, whole, row, z);
    if (step == 0) {  // the first logits are under way meanwhile
      stage_codebook<T, kTeam>(f.call, table);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      found[r] = exponentiate<T, kTeam, kNoise>(f, row[r], z[r]);
      if (threadIdx.x % kTeam == 0 && row[r].exists) write_statistics(f, row[r], found[r]);
    }
    multiply_codebook<T, kTeam>(f, row, found, z, table);
  }
}

template <typename T, int kTeam, bool kNoise>
cudaError_t launch(const SoftEmbeddingForwardParams& f, cudaStream_t stream) {
  const SoftEmbeddingParams& p = f.call;
  const Grid grid = grid_of<kTeam, kRowsOf<kNoise>>(p);
  if (grid.blocks == 0) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH((soft_embedding_tiny_forward_kernel<T, kTeam, kNoise>), grid.blocks, kBlock, 0, stream, f,
                  grid.steps, whole_chunks<T>(p.logits, p.row_stride, p.vocabulary));
  return cudaGetLastError();
}

}  // namespace
}  // namespace tiny

extern "C" int softdimo_soft_embedding_tiny_forward(const SoftEmbeddingForwardParams* params, void* stream) {
  return tiny::dispatch(params->call, false, [&](auto shape) {
    using Shape = decltype(shape);
    return tiny::launch<typename Shape::Type, Shape::kTeam, Shape::kGeneral>(*params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace softdimo::cuda
