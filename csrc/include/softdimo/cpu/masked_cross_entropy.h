// masked_cross_entropy on CPUs: what the binding tells the kernels. T: float, or double for double logits.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu {

struct CrossEntropy {
  const void* logits;
  DType logits_type;
  Rows logits_rows;
  int64_t vocabulary;
  const int64_t* targets;  // [rows]
  const bool* mask;        // [rows]; false: not read. Null: every row counts
  double smoothing;

  SOFTDIMO_ALWAYS_INLINE bool counts(int64_t row) const { return mask == nullptr || mask[row]; }
  SOFTDIMO_ALWAYS_INLINE bool target_fits(int64_t row) const {
    return targets[row] >= 0 && targets[row] < vocabulary;
  }
};

struct CrossEntropyForward {
  CrossEntropy call;
  double* loss;    // [rows]; 0 where not counted
  void* row_max;   // T [rows]: NaN in a row that holds no distribution or no target
  void* row_rest;  // T [rows]: sum of exp(z - max) without the first maximum
};

struct CrossEntropyBackward {
  CrossEntropy call;
  const void* row_max;
  const void* row_rest;
  const void* grad;   // T: of one row at grad + row * grad_step
  int64_t grad_step;  // 0 or 1
  double factor;      // the reduction's: what every upstream gradient is divided by
  void* dlogits;      // [rows, V] contiguous in the logits' type
};

// Over a range of rows.
template <class T>
struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyForward&, int64_t begin, int64_t end);
  void (*backward)(const CrossEntropyBackward&, int64_t begin, int64_t end);
};

struct CrossEntropyTable {
  CrossEntropyKernels<float> float32;
  CrossEntropyKernels<double> float64;
};

SOFTDIMO_DECLARE_TABLE(CrossEntropyTable, masked_cross_entropy_table)

}  // namespace softdimo::cpu
