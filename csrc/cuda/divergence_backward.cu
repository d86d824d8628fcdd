// Backward of token_divergence and distribution_matching_loss: the wanted gradients of sum_n upstream_n weight_n D_n /
// divisor_n to the teacher's, the model's and the unconditional logits.
//
//   formula   with k = upstream weight / divisor, to z:  k / T (wf (q - p) - wr q (r + KL(q || p)))
//             to the guided logits:  k / S (wf p (r - KL(p || q)) + wr (p - q)), of which c gets s and u gets 1 - s
//   bytes     3 b V read with guidance, 2 b V without, b V written for each gradient (8 V for the model's alone in
//             bfloat16 with guidance); rows that are not counted are zero-filled, their logits are not read
//   FLOPs     about 30 instructions and 2 exponentials per entry with guidance; centred rows about 95
//   floor     memory, at 1.8 / 3.0 / 4.3 TB/s (A100 / H100 / H200): 8192 counted rows of V = 8192 in bfloat16 with
//             guidance and the model's gradient are 537 MB, so 298 / 179 / 125 us. The instructions need 103 / 65 / 65
//             us in direct rows, and hide; 327 / 206 / 206 us in centred ones (4 warp instructions per clock and
//             multiprocessor), and do not. Rows that are not on a 16-byte boundary are written entry by entry
//   tiles     one look at the row, by octets of eight entries; p and q come from the saved tops and sums:
//
//             V        threads per row    row:  octet 0  | octet 1  | ... | octet k  | octet k+1 | ...
//             <= 128   k = 8                    thread 0   thread 1         thread 0   thread 1
//             <= 1024  k = 64
//             more     k = 128            then, in rows with an entry > 1/2, the gradient of that entry once more:
//                                         minus the sum of the others

#include <cuda_runtime.h>

#include "softdimo/cuda/divergence.h"
#include "softdimo/cuda/divergence_row.cuh"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/row_totals.cuh"

namespace softdimo::cuda {
namespace {

// The gradient to one side's logits, times k over the temperature. `own` and `other` are this side's and the other's
// probabilities (direct: before their normalisation), d and its mean in base 2 where direct.
//   direct    own (slope (d - mean) + constant) - other (rest + rest_low)
//   centred   (own slope) (r - mean) + (p - q) rest
struct Side {
  float constant, slope, mean, rest, rest_low;
  bool peaked;  // one entry holds more than 1/2
};

// own_weight: that of the divergence whose gradient is sign x own (ratio - mean). What rounding takes from `constant`
// of a direct row `rest` gives back: the gradients sum to zero.
__device__ __forceinline__ Side make_side(const DivergenceStatistics& row, float own_sum, float other_sum, float mean,
                                          float own_weight, float other_weight, float factor, float sign) {
  Side side{};
  side.peaked = own_sum < 2.0f;
  side.mean = mean;
  if (row.direct != 0.0f) {
    side.slope = sign * own_weight * factor * kLn2 / own_sum;
    side.constant = other_weight * factor / own_sum;
    const float whole = side.constant * own_sum, whole_low = fmaf(side.constant, own_sum, -whole);
    side.rest = whole / other_sum;
    side.rest_low = (fmaf(-side.rest, other_sum, whole) + whole_low) / other_sum;
    return side;
  }
  side.mean *= sign;
  // An infinite divergence has no such gradient: inf - inf, over the whole row.
  if (own_weight == 0.0f) side.mean = 0.0f;
  if (mean == INFINITY && own_weight != 0.0f) side.mean = NAN;
  side.slope = sign * own_weight * factor;
  side.rest = sign * other_weight * factor;
  return side;
}

__device__ __forceinline__ float direct_gradient(const Side& side, float own, float other, float d) {
  const float first = own * fmaf(side.slope, d - side.mean, side.constant);
  return fmaf(-other, side.rest, fmaf(-other, side.rest_low, first));
}
__device__ __forceinline__ float centred_gradient(const Side& side, float own, float ratio, float difference) {
  return fmaf(own * side.slope, ratio - side.mean, difference * side.rest);
}

// One gradient of a row on its way.
struct Outgoing {
  Side side;
  bool wanted;
  float others;  // sum of all but the greatest entry's, in rows with an entry > 1/2
  int peak;      // the column of that entry, where this thread has it

  // Bit i: entry i is the row's top, which the others' sum leaves out.
  __device__ __forceinline__ unsigned peaks(const float (&logits)[kOctet], float top) const {
    unsigned peaks = 0;
    if (!side.peaked) return peaks;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) peaks |= logits[i] == top ? 1u << i : 0u;
    return peaks;
  }

  __device__ __forceinline__ void add(int j, unsigned peaks, const float (&values)[kOctet]) {
    if (!side.peaked) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (peaks >> i & 1) {
        peak = j * kOctet + i;
      } else {
        sum += values[i];
      }
    }
    others += sum;
  }
};

// The gradients of an octet, in the place of its logits.
__device__ __forceinline__ void direct_octet(const Divergence& s, const DivergenceStatistics& row,
                                             const Outgoing& teacher, const Outgoing& model, float (&a)[kOctet],
                                             float (&b)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float x = direct_exponent(a[i], row.teacher_top, s.teacher_temperature);
    const float y = direct_exponent(b[i], row.model_top, s.model_temperature);
    const float p = ptx::exp2_approx(x), q = ptx::exp2_approx(y), d = x - y;
    if (teacher.wanted) a[i] = direct_gradient(teacher.side, p, q, d);
    if (model.wanted) b[i] = direct_gradient(model.side, q, p, d);
  }
}

__device__ __forceinline__ void centred_octet(const Centred& c, const Outgoing& teacher, const Outgoing& model,
                                              float (&a)[kOctet], float (&b)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const CentredEntry e = centred_entry(c, a[i], b[i]);
    if (teacher.wanted) a[i] = centred_gradient(teacher.side, e.p, e.ratio, e.difference);
    if (model.wanted) b[i] = centred_gradient(model.side, e.q, e.ratio, e.difference);
  }
}

struct Writers {
  OctetWriter teacher, model, uncond;
  float guidance;

  __device__ __forceinline__ Writers(const DivergenceBackwardParams& p, int64_t n, float guidance)
      : teacher(p.teacher.data, p.teacher.dtype, n, static_cast<int>(p.call.vocabulary)),
        model(p.model.data, p.model.dtype, n, static_cast<int>(p.call.vocabulary)),
        uncond(p.uncond.data, p.uncond.dtype, n, static_cast<int>(p.call.vocabulary)),
        guidance(guidance) {}

  // The guided logits u + s (c - u) hand s times their gradient to c and 1 - s times to u.
  __device__ __forceinline__ void store_guided(int j, const float (&values)[kOctet]) const {
    float scaled[kOctet];
    if (teacher.wanted()) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) scaled[i] = values[i] * guidance;
      teacher.store(j, scaled);
    }
    if (uncond.wanted()) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) scaled[i] = values[i] * (1.0f - guidance);
      uncond.store(j, scaled);
    }
  }

  __device__ __forceinline__ void store_guided_entry(int column, float value) const {
    if (teacher.wanted()) teacher.store_entry(column, value * guidance);
    if (uncond.wanted()) uncond.store_entry(column, value * (1.0f - guidance));
  }
};

template <int kThreads>
__device__ __forceinline__ void fill_row(const Writers& out, int octets, int thread, float value) {
  float values[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = value;
  for (int j = thread; j < octets; j += kThreads) {
    if (out.teacher.wanted()) out.teacher.store(j, values);
    if (out.model.wanted()) out.model.store(j, values);
    if (out.uncond.wanted()) out.uncond.store(j, values);
  }
}

// One look at the row. `octet(a, b)` puts the gradients in the place of the logits.
template <int kThreads, typename Gradients>
__device__ __forceinline__ void look(const LogitPairs& pairs, const Writers& out, const DivergenceStatistics& row,
                                     int thread, Outgoing& teacher, Outgoing& model, const Gradients& octet) {
  float ignored = 0.0f;
  for (int j = thread; j < pairs.octets(); j += kThreads) {
    float a[kOctet], b[kOctet];
    pairs.read(j, a, b, ignored);
    const unsigned teacher_peaks = teacher.peaks(a, row.teacher_top), model_peaks = model.peaks(b, row.model_top);
    octet(a, b);
    if (model.wanted) {
      model.add(j, model_peaks, b);
      out.model.store(j, b);
    }
    if (teacher.wanted) {
      teacher.add(j, teacher_peaks, a);
      out.store_guided(j, a);
    }
  }
}

template <int kThreads, bool kTeacher>
__device__ __forceinline__ void backward_row(const DivergenceBackwardParams& p, int64_t n, int thread,
                                             const DivergenceStatistics& row) {
  const Divergence& s = p.call;
  const LogitPairs pairs(s, n);
  const Writers out(p, n, pairs.guidance());
  const float factor = row_number(p.upstream, n, 1.0f) * row_share(s, n);
  const float teacher_factor = factor / s.teacher_temperature.value;
  const float model_factor = factor / s.model_temperature.value;
  Outgoing teacher{make_side(row, row.teacher_sum, row.model_sum, row.teacher_mean, s.forward_weight,
                             s.reverse_weight, teacher_factor, 1.0f),
                   kTeacher, 0.0f, -1};
  Outgoing model{make_side(row, row.model_sum, row.teacher_sum, row.model_mean, s.reverse_weight, s.forward_weight,
                           model_factor, -1.0f),
                 !kTeacher || out.model.wanted(), 0.0f, -1};
  if (row.direct != 0.0f) {
    look<kThreads>(pairs, out, row, thread, teacher, model, [&](float (&a)[kOctet], float (&b)[kOctet]) {
      direct_octet(s, row, teacher, model, a, b);
    });
  } else {
    const Centred c = centred_row(s, row);
    look<kThreads>(pairs, out, row, thread, teacher, model,
                   [&](float (&a)[kOctet], float (&b)[kOctet]) { centred_octet(c, teacher, model, a, b); });
  }
  if (!teacher.side.peaked && !model.side.peaked) return;
  float others[2] = {teacher.others, model.others};
  row_totals<kThreads>(others, [](float x, float y) { return x + y; });
  // A factor that is not finite must show in a row of one entry too.
  if (teacher.peak >= 0) out.store_guided_entry(teacher.peak, fmaf(0.0f, teacher_factor, -others[0]));
  if (model.peak >= 0) out.model.store_entry(model.peak, fmaf(0.0f, model_factor, -others[1]));
}

template <int kThreads>
constexpr int kBlock = kThreads <= kWarp ? 128 : kThreads;

// kTeacher: a gradient to the teacher's or the unconditional logits is wanted.
// The blocks leave a thread 96 registers, or 128.
template <int kThreads, bool kTeacher>
__global__ void __launch_bounds__(kBlock<kThreads>, (kTeacher ? 512 : 640) / kBlock<kThreads>)
    divergence_backward_kernel(const DivergenceBackwardParams p) {
  constexpr int kRows = kBlock<kThreads> / kThreads;
  const int thread = threadIdx.x % kThreads;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
  if (n >= p.call.rows) return;  // with all threads of the row
  const bool counted = is_counted(p.call.mask, n);
  DivergenceStatistics row{};
  if (counted) row = p.statistics[n];
  if (counted && row.teacher_sum == row.teacher_sum) {
    backward_row<kThreads, kTeacher>(p, n, thread, row);
  } else {
    fill_row<kThreads>(Writers(p, n, 1.0f), octets_of(static_cast<int>(p.call.vocabulary)), thread,
                       counted ? NAN : 0.0f);
  }
}

template <int kThreads, bool kTeacher>
cudaError_t launch(const DivergenceBackwardParams& p, cudaStream_t stream) {
  constexpr int64_t kRows = kBlock<kThreads> / kThreads;
  const int64_t blocks = (p.call.rows + kRows - 1) / kRows;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  SOFTDIMO_LAUNCH((divergence_backward_kernel<kThreads, kTeacher>), static_cast<unsigned>(blocks),
                  kBlock<kThreads>, 0, stream, p);
  return cudaGetLastError();
}

}  // namespace

extern "C" int softdimo_divergence_backward(const DivergenceBackwardParams* params, void* stream) {
  const DivergenceBackwardParams& p = *params;
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t columns = p.call.vocabulary;
  if (columns < 1 || columns > kMaxVocabulary) return cudaErrorInvalidValue;
  const bool teacher = p.teacher.data != nullptr || p.uncond.data != nullptr;
  if (p.call.rows <= 0 || !(teacher || p.model.data != nullptr)) return cudaSuccess;
  // By the vocabulary alone, so that a row's bits do not depend on how many rows there are.
  if (columns <= 128) return teacher ? launch<8, true>(p, queue) : launch<8, false>(p, queue);
  if (columns <= 1024) return teacher ? launch<64, true>(p, queue) : launch<64, false>(p, queue);
  return teacher ? launch<128, true>(p, queue) : launch<128, false>(p, queue);
}

}  // namespace softdimo::cuda
