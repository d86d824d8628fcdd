// Launcher of sample_tokens: raw pointers and sizes in, a CUDA error code out.
#pragma once

#include <cstdint>

#include "softdimo/cuda/limits.h"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

// Row n has its logits at logits + n * row_stride, contiguous, its temperature at row_temperature +
// n * row_temperature_stride and so on; strides count elements and may be zero.
struct SampleTokensParams {
  const void* logits;
  DType dtype;  // float32, bfloat16 or float16
  int64_t rows;
  int64_t vocabulary;
  int64_t row_stride;
  const float* row_temperature;  // null: `temperature` for every row
  int64_t row_temperature_stride;
  float temperature;
  int64_t top_k;  // 0 keeps all
  double top_p;   // 1 keeps all
  const int64_t* seed;     // (seed, offset), read by the kernel
  const int64_t* row_ids;  // null: 0 .. rows - 1
  int64_t row_ids_stride;
  int64_t* tokens;  // [rows]; -1 where the row holds no distribution
  float* log_prob;  // [rows], NaN where the token is -1; null when not wanted
};

// Queues the kernel on `stream` (a cudaStream_t) of the current device and returns cudaSuccess (0) or the error of
// the launch. Neither allocates nor waits.
extern "C" int softdimo_sample_tokens(const SampleTokensParams* params, void* stream);

}  // namespace softdimo::cuda
