// Rows and entries of the divergences: how logits are read, and what one entry contributes.
//
//   r = log p - log q
//   KL(p || q) = sum p r                    gradient to b / T: q - p;  to a / S: p (r - KL(p || q))
//   KL(q || p) = -sum q r                   the same with p and q exchanged
//
// Rows whose p and q differ clearly ("direct") take p - q as it is, and r through d = a / S - b / T about the maxima,
// whose means under p and q say everything: KL(p || q) = E_p d - c with c = log(sum_p / sum_q). In the others these
// differences would cancel; they are looked at once more ("centred"), and every term is formed from the entry's own r:
//
//   p - q = p (r - g),   p r - (p - q) = p g,   -q r + (p - q) = (p - q) r - p g,   g = r + expm1(-r) = r^2 (1/2 - ...)
//
// with r from exact differences of logits. The rounding of c is taken back so that p - q sums to zero.
#pragma once

#include <cmath>

#include "softdimo/cuda/divergence.h"
#include "softdimo/cuda/octets.cuh"
#include "softdimo/cuda/ptx.cuh"

namespace softdimo::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kFar = 1e30f;  // scaled logits and log ratios end here: 0 times such a one is 0

__device__ __forceinline__ bool is_counted(const RowMask& mask, int64_t n) {
  return mask.data == nullptr || mask.data[n * mask.stride] != 0;
}

__device__ __forceinline__ float row_number(const RowNumbers& numbers, int64_t n, float otherwise) {
  return numbers.data == nullptr ? otherwise : numbers.data[n * numbers.stride];
}

// weight / divisor, which D is multiplied by.
__device__ __forceinline__ float row_share(const Divergence& s, int64_t n) {
  float divisor = s.divisor.divisor;
  if (s.divisor.counts != nullptr) {
    const int count = s.divisor.counts[n / s.divisor.rows_per_group];
    divisor *= static_cast<float>(count > 1 ? count : 1);
  }
  return row_number(s.weight, n, 1.0f) / divisor;
}

// ---------------------------------------------------------------------------------------------------
// reading

class LogitPairs {
 public:
  __device__ __forceinline__ LogitPairs(const Divergence& s, int64_t n)
      : teacher_(s.teacher.data, s.teacher.dtype, s.teacher.stride, n, static_cast<int>(s.vocabulary)),
        model_(s.model.data, s.model.dtype, s.model.stride, n, static_cast<int>(s.vocabulary)),
        columns_(static_cast<int>(s.vocabulary)) {
    if (s.uncond.data != nullptr) {
      guidance_ = row_number(s.row_guidance, n, s.guidance);
      guided_ = guidance_ != 1.0f;
      if (guided_) uncond_ = OctetReader(s.uncond.data, s.uncond.dtype, s.uncond.stride, n, columns_);
    }
    aligned_ = teacher_.aligned() && model_.aligned() && uncond_.aligned();
  }

  __device__ __forceinline__ int octets() const { return octets_of(columns_); }
  __device__ __forceinline__ float guidance() const { return guidance_; }

  // Octet j of the teacher's guided and the model's logits, -inf past the row's end. `greatest`: raised to that of
  // the unconditional logits.
  __device__ __forceinline__ void read(int j, float (&a)[kOctet], float (&b)[kOctet], float& greatest) const {
    if (aligned_ && (j + 1) * kOctet <= columns_) {  // all loads under way before the first is used
      OctetBytes uncond;
      const OctetBytes teacher = teacher_.load_aligned(j), model = model_.load_aligned(j);
      if (guided_) uncond = uncond_.load_aligned(j);
      teacher_.unpack(teacher, a);
      if (guided_) {
        uncond_.unpack(uncond, b);
        guide(a, b, greatest);
      }
      model_.unpack(model, b);
    } else {
      teacher_.unpack(teacher_.load(j), a);
      if (guided_) {
        uncond_.unpack(uncond_.load(j), b);
        guide(a, b, greatest);
      }
      model_.unpack(model_.load(j), b);
    }
  }

 private:
  // u + s (c - u) from its nearer end. -inf where both are; what +inf in u alone makes of it, `greatest` tells.
  __device__ __forceinline__ void guide(float (&c)[kOctet], const float (&u)[kOctet], float& greatest) const {
    const bool near_u = guidance_ < 1.0f;
    const float factor = near_u ? guidance_ : guidance_ - 1.0f;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float step = c[i] == u[i] ? 0.0f : c[i] - u[i];
      greatest = ptx::max_or_nan(greatest, u[i]);
      c[i] = fmaf(factor, step, near_u ? u[i] : c[i]);
    }
  }

  OctetReader teacher_, model_, uncond_;
  int columns_;
  float guidance_ = 1.0f;
  bool guided_ = false;
  bool aligned_;
};

// ---------------------------------------------------------------------------------------------------
// entries of direct rows

// (logit - top) log2(e) / temperature, not below -kFar: that stands for minus infinity, also on both sides at once.
// fmaxf drops the NaN of infinity times zero.
__device__ __forceinline__ float direct_exponent(float logit, float top, const Temperature& temperature) {
  return fmaxf((logit - top) * temperature.base2, -kFar);
}

// ---------------------------------------------------------------------------------------------------
// entries of centred rows

// distance / temperature within [-kFar, kFar].
__device__ __forceinline__ float scaled(float distance, const Temperature& temperature) {
  return fminf(fmaxf(fmaf(distance, temperature.inverse, distance * temperature.inverse_low), -kFar), kFar);
}

// a - b - difference, exactly (Knuth's two-sum).
__device__ __forceinline__ float rounding(float a, float b, float difference) {
  const float negated_b = difference - a;
  return (a - (difference - negated_b)) - (b + negated_b);
}

// What turns logits of a row into its centred terms.
struct Centred {
  Temperature teacher, model;
  float teacher_top, model_top;
  float top, top_rounding;  // teacher_top - model_top
  float p_scale, q_scale;   // 1 / sums
  float centre, excess;
  bool same_temperature;
};

__device__ __forceinline__ Centred centred_row(const Divergence& s, const DivergenceStatistics& row) {
  const float top = row.teacher_top - row.model_top;
  return {s.teacher_temperature,
          s.model_temperature,
          row.teacher_top,
          row.model_top,
          top,
          rounding(row.teacher_top, row.model_top, top),
          1.0f / row.teacher_sum,
          1.0f / row.model_sum,
          row.centre,
          row.excess,
          s.teacher_temperature.value == s.model_temperature.value};
}

// (x + expm1(-x)) / x^2 for |x| < 1/2, to the last bit or so.
__device__ __forceinline__ float curvature(float x) {
  float sum = fmaf(2.49224358e-05f, x, -1.99621762e-04f);
  sum = fmaf(sum, x, 1.38888737e-03f);
  sum = fmaf(sum, x, -8.33318196e-03f);
  sum = fmaf(sum, x, 4.16666679e-02f);
  sum = fmaf(sum, x, -1.66666672e-01f);
  return fmaf(sum, x, 0.5f);
}

struct CentredEntry {
  float p, q, ratio, difference;  // difference: p - q
  float forward, reverse;         // terms of KL(p || q) and KL(q || p)
};

// Of two probabilities that differ, the smaller one is the larger times exp(-|r|), so that both belong to the same r;
// nearly equal ones are p and p exp(-r). An entry that is -inf on one side has a ratio of -kFar or kFar.
__device__ __forceinline__ CentredEntry centred_entry(const Centred& c, float a, float b) {
  const float x = scaled(a - c.teacher_top, c.teacher), y = scaled(b - c.model_top, c.model);
  float d = x - y;
  if (c.same_temperature) {
    // The differences with their rounding errors added back: exact for nearly equal logits and for rows that differ by
    // a large common offset alike. Not finite where an entry is not.
    const float entry = a - b;
    const float exact = (entry - c.top) + (rounding(a, b, entry) - c.top_rounding);
    d = fabsf(exact) < INFINITY ? scaled(exact, c.teacher) : d;
  }
  CentredEntry e;
  e.ratio = (d - c.centre) - c.excess;
  const float far = fabsf(e.ratio);
  const bool near = far < 0.5f, q_larger = e.ratio <= -0.5f;
  const float base = ptx::exp2_approx((q_larger ? y : x) * kLog2E) * (q_larger ? c.q_scale : c.p_scale);
  const float share = ptx::exp2_approx(far * -kLog2E), other = base * share;

  const float g = e.ratio * e.ratio * curvature(near ? e.ratio : 0.0f);
  const float lost = 1.0f - share, more = base * (far - lost), less = base * fmaf(-far, share, lost);
  e.difference = near ? base * (e.ratio - g) : q_larger ? -(base * lost) : base * lost;
  e.forward = near ? base * g : q_larger ? less : more;
  e.reverse = near ? fmaf(e.difference, e.ratio, -e.forward) : q_larger ? more : less;
  e.p = q_larger ? other : base;
  e.q = near ? base - e.difference : q_larger ? base : other;
  return e;
}

}  // namespace softdimo::cuda
