// What every binding needs: element types, outputs, layouts, threads. The Python layer has checked the arguments;
// what bindings check again is what memory safety rests on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/isa.h"
#include "softdimo/dtype.h"

namespace softdimo::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "softdimo: expected float64, float32, bfloat16 or float16");
  }
}

inline Shape leading_shape(const Tensor& tensor, int64_t dropped = 1) {
  Shape shape;
  for (int64_t i = 0; i + dropped < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

inline Shape with(Shape shape, int64_t last) {
  shape.push_back(last);
  return shape;
}

inline int64_t product(const Shape& shape) {
  int64_t total = 1;
  for (int64_t size : shape) total *= size;
  return total;
}

// A fresh output. Large ones are backed by huge pages: first touching 4 KiB pages costs more than the arithmetic.
inline Tensor output(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, shape, dtype);
#ifdef __linux__
  constexpr size_t kLarge = size_t{8} << 20, kPage = 4096;
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (bytes >= kLarge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// Scratch in several parts, each aligned to a cache line: one allocation by torch, which costs a small call dear.
class Workspace {
 public:
  // Room for so many bytes; returns where. Before allocate().
  int64_t add(int64_t bytes) {
    const int64_t at = size_;
    size_ += (bytes + kLine - 1) / kLine * kLine;
    return at;
  }
  void allocate(const Tensor& like) {
    memory_ = output(like, {size_}, ScalarType::Byte);
    data_ = static_cast<char*>(memory_->mutable_data_ptr());
  }
  void* at(int64_t where) const { return data_ + where; }

 private:
  static constexpr int64_t kLine = 64;
  int64_t size_ = 0;
  OptionalTensor memory_;
  char* data_ = nullptr;
};

// torch's, without a call of the dispatcher where there is nothing to do.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor as_contiguous(const Tensor& tensor, ScalarType type) {
  return as_contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// Strides of a tensor over `shape`, to which it broadcasts; dimensions that step alike are merged.
// `dropped` trailing dimensions of the tensor are left out. False when more dimensions remain than Rows holds.
inline bool layout_rows(const Tensor& tensor, const Shape& shape, int64_t dropped, Rows* rows) {
  rows->dims = 0;
  const int64_t own = tensor.dim() - dropped, missing = static_cast<int64_t>(shape.size()) - own;
  for (size_t i = 0; i < shape.size(); ++i) {
    const int64_t dim = static_cast<int64_t>(i) - missing;
    const int64_t stride = dim < 0 || tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
    if (shape[i] == 1) continue;
    if (rows->dims > 0 && rows->stride[rows->dims - 1] == stride * shape[i]) {
      rows->size[rows->dims - 1] *= shape[i];
      rows->stride[rows->dims - 1] = stride;
      continue;
    }
    if (rows->dims == Rows::kMaxDims) return false;
    rows->size[rows->dims] = shape[i];
    rows->stride[rows->dims] = stride;
    ++rows->dims;
  }
  return true;
}

// The tensor itself where its rows can be walked in place, else one contiguous copy.
inline Tensor walkable(const Tensor& logits, Rows* rows) {
  const Shape shape = leading_shape(logits);
  if (logits.stride(-1) == 1 && layout_rows(logits, shape, 1, rows)) return logits;
  if (logits.size(-1) == 1 && layout_rows(logits, shape, 1, rows)) return logits;
  Tensor copy = torch::stable::contiguous(logits);
  layout_rows(copy, shape, 1, rows);
  return copy;
}

inline void parallel(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, body);
}

// Grain for loops whose iterations are short.
inline void parallel_rows(int64_t rows, const std::function<void(int64_t, int64_t)>& body) {
  if (rows > 0) torch::stable::parallel_for(0, rows, 256, body);
}

// Grain for loops whose iterations pass over `width` entries each.
inline void parallel_entries(int64_t rows, int64_t width, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kEntries = 1 << 15;
  if (rows > 0) torch::stable::parallel_for(0, rows, std::max<int64_t>(kEntries / width, 1), body);
}

// Logits [..., V] with V >= 1, and a mask over their rows.
inline void check_rows(const Tensor& logits, const OptionalTensor& mask) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() >= 1 && logits.size(-1) > 0, "softdimo: expected CPU logits [..., V]");
  STD_TORCH_CHECK(!mask.has_value() || (mask->is_cpu() && mask->numel() == product(leading_shape(logits)) &&
                                        mask->scalar_type() == ScalarType::Bool),
                  "softdimo: mask does not fit the logits");
}

inline bool is_double(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->scalar_type() == ScalarType::Double;
}

// A temperature the kernels can divide by: finite (an infinite one would make NaN of absent entries), and NaN where
// it is not positive, so that the row becomes NaN.
template <class T>
T usable_temperature(double value) {
  if (!(value > 0)) return std::numeric_limits<T>::quiet_NaN();
  return static_cast<T>(std::min(value, static_cast<double>(std::numeric_limits<T>::max())));
}

// One temperature per row.
template <class T>
Tensor row_temperatures(const Tensor& logits, const Tensor& temperature, ScalarType compute) {
  Tensor rows = torch::stable::new_empty(logits, leading_shape(logits), compute);
  torch::stable::copy_(rows, temperature);  // broadcasts, or refuses
  T* value = static_cast<T*>(rows.mutable_data_ptr());
  for (int64_t n = 0; n < rows.numel(); ++n) value[n] = usable_temperature<T>(value[n]);
  return rows;
}

}  // namespace softdimo::cpu
