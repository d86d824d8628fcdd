// token_statistics on CPUs: what the binding tells the kernel. T: float, or double when any input is double.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu {

struct TokenStatistics {
  const void* logits;
  DType logits_type;
  Rows logits_rows;
  int64_t vocabulary;
  double temperature;
  const void* row_temperature;  // T [rows], NaN where not positive; null for the scalar
  const bool* mask;             // [rows]; false: not read, zeros. Null: every row counts
  void* log_normalizer;         // T [rows] each
  void* entropy;
  void* max_prob;
};

// Over a range of rows.
struct TokenStatisticsTable {
  void (*float32)(const TokenStatistics&, int64_t begin, int64_t end);
  void (*float64)(const TokenStatistics&, int64_t begin, int64_t end);
};

SOFTDIMO_DECLARE_TABLE(TokenStatisticsTable, token_statistics_table)

}  // namespace softdimo::cpu
