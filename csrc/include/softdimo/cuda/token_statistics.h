// Launcher of token_statistics: raw pointers and sizes in, a CUDA error code out.
#pragma once

#include <cstdint>

#include "softdimo/cuda/limits.h"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

// Row n has its logits at logits + n * row_stride, contiguous, its mask at mask + n * mask_stride and so on;
// strides count elements and may be zero.
struct TokenStatisticsParams {
  const void* logits;
  DType dtype;  // float32, bfloat16 or float16
  int64_t rows;
  int64_t vocabulary;
  int64_t row_stride;
  const uint8_t* mask;  // 0: the row is not counted, its logits are not read. Null: every row counts.
  int64_t mask_stride;
  const float* row_temperature;  // null: `temperature` for every row
  int64_t row_temperature_stride;
  float temperature;
  float* log_normalizer;  // [rows] each
  float* entropy;
  float* max_prob;
};

// Queues the kernel on `stream` (a cudaStream_t) of the current device and returns cudaSuccess (0) or the error of
// the launch. Neither allocates nor waits.
extern "C" int softdimo_token_statistics(const TokenStatisticsParams* params, void* stream);

}  // namespace softdimo::cuda
