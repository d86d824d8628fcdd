// token_divergence and distribution_matching_loss on CPUs: what the bindings tell the kernels, and the table of
// kernels of one instruction set.
//
//   p[n] = softmax((u + s (c - u)) / S)     c, u: the teacher's conditional and unconditional logits
//   q[n] = softmax(z / T)                   z: the model's logits
//   D[n] = forward_weight KL(p[n] || q[n]) + reverse_weight KL(q[n] || p[n])
//
// "T" below is the compute type: float, or double when any input is double.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu {

struct LogitRows {
  const void* data;
  DType type;
  Rows rows;
};

struct Divergence {
  LogitRows teacher, model;
  LogitRows uncond;  // read only where the guidance is not 1
  int64_t rows;
  int64_t vocabulary;
  double guidance;
  const void* row_guidance;  // T [rows]; null for the scalar
  double teacher_temperature, model_temperature;  // finite; NaN where not positive
  double forward_weight, reverse_weight;
  const int64_t* counted;  // the rows that count, in order; null when every row does
};

// What the forward saves of a row for the backward; in double, so that gradients sum to zero.
struct RowStatistics {
  double teacher_top, model_top;  // the greatest logits
  double teacher_sum, model_sum;  // sums of exp((logit - top) / temperature); NaN in a row that holds no distributions
  double direct;                  // 1: the means are those of d, the difference of the scaled logits about their tops
                                  // 0: the row is "centred", see divergence.cpp
  double centre, excess;          // centred: d - centre - excess = log p - log q
  double teacher_mean;            // mean of d under p; centred: KL(p || q)
  double model_mean;              // mean of d under q; centred: KL(q || p)
};
constexpr int64_t kRowStatistics = sizeof(RowStatistics) / sizeof(double);

struct DivergenceForward {
  Divergence call;
  void* value;                // T [rows]: D, of the rows that count
  RowStatistics* statistics;  // [rows]
};

struct Gradient {
  void* data;  // [rows, V] contiguous; null when not wanted
  DType type;
};

struct DivergenceBackward {
  Divergence call;
  const RowStatistics* statistics;
  const void* upstream;  // T [rows]: what the gradient of D[n] is multiplied by
  Gradient teacher, model, uncond;
};

// Kernels take a range of the rows that count; rows are independent.
struct DivergenceKernels {
  void (*forward)(const DivergenceForward&, int64_t begin, int64_t end);
  void (*backward)(const DivergenceBackward&, int64_t begin, int64_t end);
};

struct DivergenceTable {
  DivergenceKernels float32;
  DivergenceKernels float64;
};

SOFTDIMO_DECLARE_TABLE(DivergenceTable, divergence_table)

}  // namespace softdimo::cpu
