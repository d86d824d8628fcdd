// Launchers of the kernels of token_divergence and distribution_matching_loss: raw pointers and sizes in, a CUDA error
// code out. They queue on `stream` (a cudaStream_t) of the current device, neither allocate nor wait.
//
//   p[n] = softmax((u + s (c - u)) / S)     c, u: the teacher's conditional and unconditional logits
//   q[n] = softmax(z / T)                   z: the model's logits
//   D[n] = forward_weight KL(p[n] || q[n]) + reverse_weight KL(q[n] || p[n])
#pragma once

#include <cstdint>

#include "softdimo/cuda/limits.h"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

// Row n starts n * stride elements after `data` and is contiguous.
struct DivergenceLogits {
  const void* data;
  DType dtype;  // float32, bfloat16 or float16
  int64_t stride;
};

// One number per row, at data + n * stride; null where there is none.
struct RowNumbers {
  const float* data;
  int64_t stride;
};

struct RowMask {
  const uint8_t* data;  // 0: the row is not counted, its logits are not read. Null: every row counts.
  int64_t stride;
};

// 1 / temperature as a sum of two, so that the product is rounded like the quotient, and log2(e) / temperature.
struct Temperature {
  float value, inverse, inverse_low, base2;
};

// NaN in all where the temperature is not a positive float.
inline Temperature make_temperature(double temperature) {
  constexpr double kMost = 3.4e38;
  // Above this nothing finite is told apart, and the inverse would lose its bits.
  if (temperature > kMost / 100) temperature = kMost / 100;
  if (!(static_cast<float>(temperature) > 0.0f)) {
    const float nothing = __builtin_nanf("");
    return {nothing, nothing, nothing, nothing};
  }
  const double inverse = 1 / temperature, base2 = inverse * 1.44269504088896340736;
  const float high = static_cast<float>(inverse < kMost ? inverse : kMost);
  const float low = inverse < kMost ? static_cast<float>(inverse - static_cast<double>(high)) : 0.0f;
  return {static_cast<float>(temperature), high, low, static_cast<float>(base2 < kMost ? base2 : kMost)};
}

// What D is divided by: divisor x max(counts[group of the row], 1), groups of neighbouring rows of equal size; without
// counts the divisor alone.
struct RowDivisor {
  const int32_t* counts;
  int64_t rows_per_group;
  float divisor;
};

struct Divergence {
  DivergenceLogits teacher, model;
  DivergenceLogits uncond;  // read only where the guidance is not 1; null without guidance
  int64_t rows;
  int64_t vocabulary;
  float guidance;
  RowNumbers row_guidance;  // instead of `guidance`
  Temperature teacher_temperature, model_temperature;
  float forward_weight, reverse_weight;
  RowMask mask;
  RowNumbers weight;
  RowDivisor divisor;
};

// What the forward saves of a row for the backward.
struct DivergenceStatistics {
  float teacher_top, model_top;  // the greatest logits, the teacher's guided
  float teacher_sum, model_sum;  // sums of exp((logit - top) / temperature); NaN in a row that holds no distributions
  float direct;                  // 1: the means are those of d, the difference of the scaled logits about their tops
                                 // 0: the row is "centred"; see softdimo/cuda/divergence_row.cuh
  float centre, excess;          // centred: d - centre - excess = log p - log q
  float teacher_mean;            // mean of d under p, times log2(e); centred: KL(p || q)
  float model_mean;              // mean of d under q, times log2(e); centred: KL(q || p)
};
constexpr int64_t kDivergenceStatistics = sizeof(DivergenceStatistics) / sizeof(float);

struct DivergenceForwardParams {
  Divergence call;
  float* value;                      // [rows]: weight x D / divisor; 0 in rows that are not counted
  DivergenceStatistics* statistics;  // [rows]; 0 in rows that are not counted
};

struct DivergenceGradient {
  void* data;  // [rows, vocabulary] contiguous; null when not wanted
  DType dtype;
};

struct DivergenceBackwardParams {
  Divergence call;
  const DivergenceStatistics* statistics;
  RowNumbers upstream;  // that of weight x D / divisor
  DivergenceGradient teacher, model, uncond;
};

struct RowCountParams {
  RowMask mask;
  int64_t groups, rows_per_group;
  int32_t* counts;  // [groups]: the rows that count
};

extern "C" int softdimo_divergence_forward(const DivergenceForwardParams* params, void* stream);
extern "C" int softdimo_divergence_backward(const DivergenceBackwardParams* params, void* stream);
extern "C" int softdimo_count_rows(const RowCountParams* params, void* stream);

}  // namespace softdimo::cuda
