// The element types tensors may have, and exact conversions from and to them in portable integer arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

// Functions that are shared by files compiled for different instruction sets: never emitted, so that the linker
// cannot hand one set's copy to another.
#define SOFTDIMO_ALWAYS_INLINE inline __attribute__((always_inline))

// Declares an operator's table of kernels for every instruction set.
#define SOFTDIMO_DECLARE_TABLE(Table, name) \
  namespace baseline {                      \
  const Table& name();                      \
  }                                         \
  namespace x86_64_v3 {                     \
  const Table& name();                      \
  }                                         \
  namespace x86_64_v4 {                     \
  const Table& name();                      \
  }                                         \
  namespace avx512_bf16 {                   \
  const Table& name();                      \
  }                                         \
  namespace amx_bf16 {                      \
  const Table& name();                      \
  }

namespace softdimo {

enum class DType : int { float64, float32, bfloat16, float16 };

SOFTDIMO_ALWAYS_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The rows of a tensor [..., V]: row n starts offset(n) elements after the data pointer. Leading dimensions are
// given outermost first; any strides, so that a slice of a padded head or an expanded tensor needs no copy.
struct Rows {
  static constexpr int kMaxDims = 8;
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];

  SOFTDIMO_ALWAYS_INLINE int64_t offset(int64_t row) const {
    int64_t sum = 0;
    for (int i = dims - 1; i > 0; --i) {
      sum += row % size[i] * stride[i];
      row /= size[i];
    }
    return dims > 0 ? sum + row * stride[0] : 0;
  }
};

}  // namespace softdimo
