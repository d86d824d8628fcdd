// sample_tokens on CPUs: what the binding tells the kernels, and the table of kernels of one instruction set.
//
//   token[n] = argmax_v (z[n, v] - max z[n]) / T[n] + gumbel(seed, row_ids[n])[v]     over the kept entries
//
// "T" below is the compute type: float, or double when any input is double.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu {

struct SampleTokens {
  const void* logits;
  DType logits_type;
  Rows logits_rows;
  int64_t rows;
  int64_t vocabulary;

  double temperature;
  const void* row_temperature;  // T [rows], NaN where not positive and finite; null for the scalar
  int64_t top_k;                // 0 keeps all
  double top_p;                 // 1 keeps all

  uint64_t seed;
  uint32_t offset;
  const int64_t* row_ids;  // [rows]; null for 0 .. rows - 1

  int64_t* tokens;  // [rows]; -1 where the row holds no distribution
  void* log_prob;   // T [rows], NaN where token is -1; null when not wanted
};

struct SampleTokensKernels {
  void (*draw)(const SampleTokens&, int64_t begin, int64_t end);  // over rows
};

struct SampleTokensTable {
  SampleTokensKernels float32;
  SampleTokensKernels float64;
};

SOFTDIMO_DECLARE_TABLE(SampleTokensTable, sample_tokens_table)

}  // namespace softdimo::cpu
