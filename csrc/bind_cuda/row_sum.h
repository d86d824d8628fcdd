// Reductions over rows, for the bindings of operators that have one.
#pragma once

#include "bind_cuda/tensors.h"
#include "softdimo/cuda/row_sum.h"

namespace softdimo::cuda {

inline Tensor run_row_sum(const char* name, RowSumParams params, const std::optional<RowList>& mask,
                          const Tensor& like) {
  const auto output = [&](const Shape& shape) { return torch::stable::new_empty(like, shape, ScalarType::Float); };
  const int64_t partials = row_sum_partials(params.rows);
  Tensor result = output({}), workspace = output({partials * int64_t{sizeof(RowSumPartial) / sizeof(float)}});
  if (mask.has_value()) {
    params.mask = mask->data<uint8_t>();
    params.mask_stride = mask->stride;
  }
  params.partials = static_cast<RowSumPartial*>(workspace.mutable_data_ptr());
  params.result = static_cast<float*>(result.mutable_data_ptr());
  check_launch(name, softdimo_row_sum(&params, current_stream(like)));
  return result;
}

// The sum of one float per row (0 where not counted) as a scalar, or their mean over the counted rows.
inline Tensor sum_of_rows(const char* name, const Tensor& values, const std::optional<RowList>& mask, bool mean) {
  RowSumParams params{};
  params.values = static_cast<const float*>(values.const_data_ptr());
  params.rows = values.numel();
  params.mean = mean;
  return run_row_sum(name, params, mask, values);
}

// A scalar divided by the number of counted rows: the upstream gradient of each row of a mean.
inline Tensor over_counted_rows(const char* name, const Tensor& value, int64_t rows,
                                const std::optional<RowList>& mask) {
  RowSumParams params{};
  params.value = static_cast<const float*>(value.const_data_ptr());
  params.rows = rows;
  params.mean = true;
  return run_row_sum(name, params, mask, value);
}

}  // namespace softdimo::cuda
