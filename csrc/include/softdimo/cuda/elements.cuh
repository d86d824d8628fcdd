// Single elements of tensors whose type is known at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

__device__ __forceinline__ float load_element(const void* data, DType type, int64_t index) {
  switch (type) {
    case DType::bfloat16:
      return to_float(__ldg(static_cast<const __nv_bfloat16*>(data) + index));
    case DType::float16:
      return to_float(__ldg(static_cast<const __half*>(data) + index));
    default:
      return __ldg(static_cast<const float*>(data) + index);
  }
}

__device__ __forceinline__ void store_as(float* out, float value) { *out = value; }
__device__ __forceinline__ void store_as(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store_as(__half* out, float value) { *out = __float2half_rn(value); }

__device__ __forceinline__ void store_element(void* data, DType type, int64_t index, float value) {
  switch (type) {
    case DType::bfloat16:
      return store_as(static_cast<__nv_bfloat16*>(data) + index, value);
    case DType::float16:
      return store_as(static_cast<__half*>(data) + index, value);
    default:
      return store_as(static_cast<float*>(data) + index, value);
  }
}

}  // namespace softdimo::cuda
