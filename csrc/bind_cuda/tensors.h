// What every binding needs: element types, layouts, errors. The Python layer has checked the arguments; what bindings
// check again is what memory safety rests on.
//
// No kernel waits for the device, and no binding reads device memory, so every operator can be captured in a graph.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind_cuda/device.h"
#include "softdimo/cuda/limits.h"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// `code` is what a launcher returned.
inline void check_launch(const char* name, int code) {
  STD_TORCH_CHECK(code == 0, "softdimo::", name, ": the kernel was not launched: ", error_text(code));
}

inline void check_device(const char* name, const char* argument, const Tensor& tensor, const Tensor& logits) {
  STD_TORCH_CHECK(same_device(tensor, logits), "softdimo::", name, ": ", argument,
                  " must be on the device of the logits");
}

inline DType dtype_of(const char* name, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "softdimo::", name, ": ", argument, " must be float32, bfloat16 or float16 on CUDA, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// ---------------------------------------------------------------------------------------------------
// layout

inline Shape leading_shape(const Tensor& logits) {
  Shape shape;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) shape.push_back(logits.size(i));
  return shape;
}

inline int64_t product(const Shape& shape) {
  int64_t total = 1;
  for (int64_t size : shape) total *= size;
  return total;
}

// A tensor seen as a list of rows: row n starts n * stride elements after the tensor's first.
struct RowList {
  Tensor tensor;
  int64_t stride;

  template <typename T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

// The stride of that list, where the leading dimensions step like one. The tensor broadcasts to `shape` after
// `dropped` trailing dimensions are left out; a dimension along which it is expanded steps by zero.
inline std::optional<int64_t> row_stride(const Tensor& tensor, const Shape& shape, int64_t dropped) {
  const int64_t missing = static_cast<int64_t>(shape.size()) - (tensor.dim() - dropped);
  std::optional<int64_t> stride;
  int64_t inner = 1;  // rows within one step of the dimension
  for (int64_t i = static_cast<int64_t>(shape.size()) - 1; i >= 0; --i) {
    if (shape[i] == 1) continue;
    const int64_t step = i < missing || tensor.size(i - missing) == 1 ? 0 : tensor.stride(i - missing);
    if (!stride.has_value()) {
      stride = step;
    } else if (step != *stride * inner) {
      return std::nullopt;
    }
    inner *= shape[i];
  }
  return stride.value_or(0);
}

// The logits' rows, each contiguous: the tensor itself, or one contiguous copy.
inline RowList logits_rows(const Tensor& logits, const Shape& shape) {
  if (logits.stride(-1) == 1 || logits.size(-1) == 1) {
    if (const auto stride = row_stride(logits, shape, 1)) return {logits, *stride};
  }
  return {torch::stable::contiguous(logits), logits.size(-1)};
}

// One value per row from a tensor that broadcasts to the rows: the tensor itself, or a copy of `dtype`.
inline RowList row_values(const char* name, const char* argument, const Tensor& tensor, const Shape& shape, ScalarType dtype) {
  const int64_t missing = static_cast<int64_t>(shape.size()) - tensor.dim();
  bool broadcasts = missing >= 0;
  for (int64_t i = 0; broadcasts && i < tensor.dim(); ++i) {
    broadcasts = tensor.size(i) == 1 || tensor.size(i) == shape[i + missing];
  }
  STD_TORCH_CHECK(broadcasts, "softdimo::", name, ": ", argument, " must broadcast to the rows of the logits");
  const Tensor values = torch::stable::to(tensor, dtype);
  if (const auto stride = row_stride(values, shape, 0)) return {values, *stride};
  Tensor copy = torch::stable::new_empty(values, shape);
  torch::stable::copy_(copy, values);
  return {copy, 1};
}

}  // namespace softdimo::cuda
