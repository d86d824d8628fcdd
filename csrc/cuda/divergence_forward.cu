// Forward of token_divergence and distribution_matching_loss: weight x D and nine numbers for the backward, for every
// row of [N, V].
//
//   formula   p = softmax((u + s (c - u)) / S), q = softmax(z / T), D = wf KL(p || q) + wr KL(q || p): divergence_row.cuh
//   bytes     3 b V with guidance, 2 b V without (b bytes per logit, each read once up to V = 8192), 40 per row; of a
//             row that is not counted these 40 alone
//   FLOPs     about 33 instructions and 2 exponentials per entry with guidance in float32 or bfloat16; centred rows (p
//             and q nearly agree) 80 more and 2 exponentials
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 counted rows of V = 8192 in bfloat16 with
//             guidance are 403 MB, so 224 / 134 / 94 us. The instructions of direct rows need 113 / 72 / 72 us (4 warp
//             instructions per clock and multiprocessor) and hide; those of centred rows 390 / 250 / 250 us, and do not
//   tiles     the row's threads hold its guided teacher's and its model's logits in registers, two octets (of eight
//             entries) each, and look at them three times: for the tops, the sums, and once more in centred rows:
//
//             V        threads per row    row:  octet 0  | octet 1  | ... | octet k  | octet k+1 | ...
//             <= 128   k = 8                    thread 0   thread 1         thread 0   thread 1
//             <= 1024  k = 64
//             <= 4096  k = 256            after each look: shuffles and, for more than a warp, shared memory
//             <= 8192  k = 512
//             more     k = 256, the row read two or three times, from the second on out of L2

#include <cuda_runtime.h>

#include "softdimo/cuda/divergence.h"
#include "softdimo/cuda/divergence_row.cuh"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/row_totals.cuh"

namespace softdimo::cuda {
namespace {

// A thread's part of a row: in registers, or read anew for every look.
template <int kThreads, bool kInRegisters>
class RowPart {
 public:
  __device__ __forceinline__ RowPart(const LogitPairs& pairs, int thread) : pairs_(pairs), thread_(thread) {}

  // `look(a, b)` for each octet. `greatest`: that of the unconditional logits.
  template <typename Look>
  __device__ __forceinline__ void first_look(float& greatest, const Look& look) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i * kThreads >= pairs_.octets()) break;
        pairs_.read(thread_ + i * kThreads, a_[i], b_[i], greatest);
        look(a_[i], b_[i]);
      }
    } else {
      for (int j = thread_; j < pairs_.octets(); j += kThreads) {
        pairs_.read(j, a_[0], b_[0], greatest);
        look(a_[0], b_[0]);
      }
    }
  }

  template <typename Look>
  __device__ __forceinline__ void look_again(const Look& look) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (i * kThreads >= pairs_.octets()) break;
        look(a_[i], b_[i]);
      }
    } else {
      float ignored = 0.0f;
      first_look(ignored, look);
    }
  }

 private:
  static constexpr int kHeld = kInRegisters ? 2 : 1;
  const LogitPairs& pairs_;
  int thread_;
  float a_[kHeld][kOctet], b_[kHeld][kOctet];
};

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Greatest {
  __device__ __forceinline__ float operator()(float a, float b) const { return ptx::max_or_nan(a, b); }
};

// Sums over a row of p~ = 2^x, q~ = 2^y and d = x - y, for x and y scaled and about their tops.
struct Moments {
  float p, q, pd, qd, pp, qq, pq;
  float dd;  // of the squares of d
};
constexpr int kMoments = sizeof(Moments) / sizeof(float);

__device__ __forceinline__ Moments octet_moments(const Divergence& s, const DivergenceStatistics& row,
                                                 const float (&a)[kOctet], const float (&b)[kOctet]) {
  Moments m{};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float x = direct_exponent(a[i], row.teacher_top, s.teacher_temperature);
    const float y = direct_exponent(b[i], row.model_top, s.model_temperature);
    const float p = ptx::exp2_approx(x), q = ptx::exp2_approx(y), d = x - y;
    m.p += p;
    m.q += q;
    m.pd = fmaf(p, d, m.pd);
    m.qd = fmaf(q, d, m.qd);
    m.pp = fmaf(p, p, m.pp);
    m.qq = fmaf(q, q, m.qq);
    m.pq = fmaf(p, q, m.pq);
    m.dd = fmaf(d, d, m.dd);
  }
  return m;
}

// forward_weight * forward + reverse_weight * reverse; a zero weight leaves its part out: 0 * inf would be NaN.
__device__ __forceinline__ float weighted(const Divergence& s, float forward, float reverse) {
  const float first = s.forward_weight != 0.0f ? s.forward_weight * forward : 0.0f;
  return s.reverse_weight != 0.0f ? fmaf(s.reverse_weight, reverse, first) : first;
}

// log(p / q), precise for nearly equal sums too.
__device__ __forceinline__ float log_ratio(float p, float q) {
  const float more = (p - q) / q;
  return fabsf(more) < 0.5f ? log1pf(more) : logf(p / q);
}

// The divergence from the moments, where that costs no digits: p - q is not small beside p and q, and the divergences
// are not beside their parts. False where it does, or where an entry is (all but) -inf on one side alone.
__device__ __forceinline__ bool direct_value(const Divergence& s, const Moments& m, DivergenceStatistics& row,
                                             float& value) {
  const float p = 1.0f / m.p, q = 1.0f / m.q;
  const float pp = m.pp * p * p, qq = m.qq * q * q, apart = pp + qq - 2.0f * (m.pq * p * q);
  row.centre = log_ratio(m.p, m.q);
  row.teacher_mean = m.pd * p;
  row.model_mean = m.qd * q;
  const float centre = row.centre * kLog2E, size = fabsf(centre);
  const float forward = row.teacher_mean - centre, reverse = centre - row.model_mean;
  value = weighted(s, forward * kLn2, reverse * kLn2);
  return m.dd < 1e30f && apart >= 0.125f * (pp + qq) &&
         (s.forward_weight == 0.0f || 16.0f * forward >= fabsf(row.teacher_mean) + size) &&
         (s.reverse_weight == 0.0f || 16.0f * reverse >= fabsf(row.model_mean) + size);
}

// -d - log(1 - d), for |d| < 1: d^2 / 2 + ...
__device__ __forceinline__ float beyond_linear(float d) {
  if (fabsf(d) > 0.015625f) return -d - log1pf(-d);
  return d * d * fmaf(d, fmaf(d, fmaf(d, 0.2f, 0.25f), 1.0f / 3.0f), 0.5f);
}

// The divergence from centred terms. With r off by the excess e, which makes the sum of p exp(-r) one, the sums
// change by known amounts.
template <int kThreads, typename Part>
__device__ __forceinline__ float centred_value(const Divergence& s, Part& part, DivergenceStatistics& row) {
  const Centred c = centred_row(s, row);
  float sums[4] = {};  // of the differences, the forward and the reverse terms
  part.look_again([&](const float (&a)[kOctet], const float (&b)[kOctet]) {
    float octet[3] = {};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const CentredEntry e = centred_entry(c, a[i], b[i]);
      octet[0] += e.difference;
      octet[1] += b[i] == -INFINITY && a[i] != -INFINITY ? INFINITY : e.forward;
      octet[2] += a[i] == -INFINITY && b[i] != -INFINITY ? INFINITY : e.reverse;
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) sums[i] += octet[i];
  });
  row_totals<kThreads>(sums, Sum{});
  const float d = sums[0], curved = beyond_linear(d);
  const float forward = sums[1] - curved;
  const float reverse = (sums[2] + curved - d * (d + curved)) / (1.0f - d);
  row.excess = d + curved;  // -log(1 - d)
  row.teacher_mean = forward < 0.0f ? 0.0f : forward;
  row.model_mean = reverse < 0.0f ? 0.0f : reverse;
  return weighted(s, row.teacher_mean, row.model_mean);
}

// D of a row; every one of its threads returns it.
template <int kThreads, bool kInRegisters>
__device__ __forceinline__ float row_value(const Divergence& s, int64_t n, int thread, DivergenceStatistics& row) {
  const LogitPairs pairs(s, n);
  RowPart<kThreads, kInRegisters> part(pairs, thread);
  float tops[2] = {-INFINITY, -INFINITY}, greatest = -INFINITY;
  part.first_look(greatest, [&](const float (&a)[kOctet], const float (&b)[kOctet]) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      tops[0] = ptx::max_or_nan(tops[0], a[i]);
      tops[1] = ptx::max_or_nan(tops[1], b[i]);
    }
  });
  if (greatest == INFINITY) tops[0] = NAN;
  row_totals<kThreads>(tops, Greatest{});
  row.teacher_top = tops[0];
  row.model_top = tops[1];
  // NaN, +inf or nothing but -inf in the row, or a temperature that is not positive.
  if (!(fabsf(tops[0]) < INFINITY && fabsf(tops[1]) < INFINITY && s.teacher_temperature.inverse > 0.0f &&
        s.model_temperature.inverse > 0.0f)) {
    row.teacher_sum = row.model_sum = NAN;
    return NAN;
  }
  float sums[kMoments] = {};
  part.look_again([&](const float (&a)[kOctet], const float (&b)[kOctet]) {
    const Moments m = octet_moments(s, row, a, b);
    const float octet[kMoments] = {m.p, m.q, m.pd, m.qd, m.pp, m.qq, m.pq, m.dd};
#pragma unroll
    for (int i = 0; i < kMoments; ++i) sums[i] += octet[i];
  });
  row_totals<kThreads>(sums, Sum{});
  const Moments m{sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]};
  row.teacher_sum = m.p;
  row.model_sum = m.q;
  float value;
  const bool direct = direct_value(s, m, row, value);
  row.direct = direct ? 1.0f : 0.0f;
  return direct ? value : centred_value<kThreads>(s, part, row);
}

template <int kThreads>
constexpr int kBlock = kThreads <= kWarp ? 128 : kThreads;

// As many blocks as leave a thread 64 registers; 128 where rows are read again.
template <int kThreads, bool kInRegisters>
__global__ void __launch_bounds__(kBlock<kThreads>, (kInRegisters ? 1024 : 512) / kBlock<kThreads>)
    divergence_forward_kernel(const DivergenceForwardParams p) {
  constexpr int kRows = kBlock<kThreads> / kThreads;
  const int thread = threadIdx.x % kThreads;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
  if (n >= p.call.rows) return;  // with all threads of the row
  DivergenceStatistics row{};
  float value = 0.0f;
  if (is_counted(p.call.mask, n)) {
    value = row_value<kThreads, kInRegisters>(p.call, n, thread, row) * row_share(p.call, n);
  }
  if (thread != 0) return;
  p.value[n] = value;
  p.statistics[n] = row;
}

template <int kThreads, bool kInRegisters = true>
cudaError_t launch(const DivergenceForwardParams& p, cudaStream_t stream) {
  constexpr int64_t kRows = kBlock<kThreads> / kThreads;
  const int64_t blocks = (p.call.rows + kRows - 1) / kRows;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH((divergence_forward_kernel<kThreads, kInRegisters>), static_cast<unsigned>(blocks),
                  kBlock<kThreads>, 0, stream, p);
  return cudaGetLastError();
}

}  // namespace

extern "C" int softdimo_divergence_forward(const DivergenceForwardParams* params, void* stream) {
  const DivergenceForwardParams& p = *params;
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t columns = p.call.vocabulary;
  if (columns < 1 || columns > kMaxVocabulary) return cudaErrorInvalidValue;
  if (p.call.rows <= 0) return cudaSuccess;
  // By the vocabulary alone, so that a row's bits do not depend on how many rows there are.
  if (columns <= 128) return launch<8>(p, queue);
  if (columns <= 1024) return launch<64>(p, queue);
  if (columns <= 4096) return launch<256>(p, queue);
  if (columns <= 8192) return launch<512>(p, queue);
  return launch<256, false>(p, queue);
}

}  // namespace softdimo::cuda
