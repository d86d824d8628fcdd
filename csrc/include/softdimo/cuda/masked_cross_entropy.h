// Launchers of masked_cross_entropy: raw pointers and sizes in, a CUDA error code out.
#pragma once

#include <cstdint>

#include "softdimo/cuda/limits.h"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

// Row n has its logits at logits + n * row_stride, contiguous, its target at targets + n * target_stride and so on;
// strides count elements and may be zero.
struct CrossEntropy {
  const void* logits;
  DType dtype;  // float32, bfloat16 or float16
  int64_t rows;
  int64_t vocabulary;
  int64_t row_stride;
  const int64_t* targets;  // out of [0, vocabulary): the row is NaN
  int64_t target_stride;
  const uint8_t* mask;  // 0: the row is not counted, its logits and target are not read. Null: every row counts.
  int64_t mask_stride;
  double smoothing;  // in [0, 1)
};

struct CrossEntropyForwardParams {
  CrossEntropy call;
  float* loss;      // [rows] each; 0 where not counted
  float* row_max;   // NaN in a row that holds no distribution or no target
  float* row_rest;  // sum of exp(z - max) without one maximum
};

struct CrossEntropyBackwardParams {
  CrossEntropy call;
  const float* row_max;  // [rows] each, as the forward left them
  const float* row_rest;
  const float* grad;  // of row n at grad + n * grad_stride
  int64_t grad_stride;
  void* dlogits;  // [rows, vocabulary] contiguous, in the logits' type
};

// Each queues its kernel on `stream` (a cudaStream_t) of the current device and returns cudaSuccess (0) or the error
// of the launch. Neither allocates nor waits.
extern "C" int softdimo_masked_cross_entropy(const CrossEntropyForwardParams* params, void* stream);
extern "C" int softdimo_masked_cross_entropy_backward(const CrossEntropyBackwardParams* params, void* stream);

}  // namespace softdimo::cuda
