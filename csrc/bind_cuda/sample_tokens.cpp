// sample_tokens on CUDA: layout, allocation, launch.

#include "softdimo/cuda/sample_tokens.h"

#include <algorithm>
#include <limits>

#include "bind_cuda/tensors.h"

namespace softdimo::cuda {
namespace {

constexpr const char* kName = "sample_tokens";

// Positive, and finite in float32. Not positive stays as it is: no row gets a token.
float usable_temperature(double value) {
  if (!(value > 0.0)) return static_cast<float>(value);
  using Limits = std::numeric_limits<float>;
  return static_cast<float>(std::clamp(value, static_cast<double>(Limits::min()), static_cast<double>(Limits::max())));
}

void check(const Tensor& logits, std::optional<int64_t> top_k, std::optional<double> top_p, const Tensor& seed) {
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1 && logits.size(-1) <= kMaxVocabulary, "softdimo::", kName,
                  ": logits must have shape [..., V] with 1 <= V <= 2^30");
  STD_TORCH_CHECK(!top_k.has_value() || *top_k >= 1, "softdimo::", kName, ": top_k must be at least 1");
  STD_TORCH_CHECK(!top_p.has_value() || *top_p > 0.0, "softdimo::", kName, ": top_p must be positive");
  check_device(kName, "seed", seed, logits);
  STD_TORCH_CHECK(seed.numel() == 2 && seed.scalar_type() == ScalarType::Long, "softdimo::", kName,
                  ": seed must be int64 [2]");
}

std::tuple<Tensor, Tensor> sample_tokens(const Tensor& logits, double temperature,
                                         const OptionalTensor& row_temperature, std::optional<int64_t> top_k,
                                         std::optional<double> top_p, const Tensor& seed,
                                         const OptionalTensor& row_ids, bool log_prob) {
  SampleTokensParams params{};
  params.dtype = dtype_of(kName, "logits", logits);
  check(logits, top_k, top_p, seed);
  const DeviceGuard guard(logits.get_device_index());
  const Shape shape = leading_shape(logits);
  const RowList rows = logits_rows(logits, shape);
  std::optional<RowList> temperatures, numbers;
  if (row_temperature.has_value()) {
    check_device(kName, "row_temperature", *row_temperature, logits);
    temperatures = row_values(kName, "row_temperature", *row_temperature, shape, ScalarType::Float);
    params.row_temperature = temperatures->data<float>();
    params.row_temperature_stride = temperatures->stride;
  }
  if (row_ids.has_value()) {
    check_device(kName, "row_ids", *row_ids, logits);
    STD_TORCH_CHECK(row_ids->scalar_type() == ScalarType::Long, "softdimo::", kName, ": row_ids must be int64");
    numbers = row_values(kName, "row_ids", *row_ids, shape, ScalarType::Long);
    params.row_ids = numbers->data<int64_t>();
    params.row_ids_stride = numbers->stride;
  }
  const Tensor pair = torch::stable::contiguous(seed);
  Tensor tokens = torch::stable::new_empty(logits, shape, ScalarType::Long);
  Tensor found = torch::stable::new_empty(logits, log_prob ? shape : Shape{0}, ScalarType::Float);

  params.logits = rows.data<void>();
  params.rows = product(shape);
  params.vocabulary = logits.size(-1);
  params.row_stride = rows.stride;
  params.temperature = usable_temperature(temperature);
  params.top_k = top_k.value_or(params.vocabulary) < params.vocabulary ? *top_k : 0;
  params.top_p = std::min(top_p.value_or(1.0), 1.0);
  params.seed = static_cast<const int64_t*>(pair.const_data_ptr());
  params.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  params.log_prob = log_prob ? static_cast<float*>(found.mutable_data_ptr()) : nullptr;
  check_launch(kName, softdimo_sample_tokens(&params, current_stream(logits)));
  return {tokens, found};
}

}  // namespace

SOFTDIMO_CUDA_LIBRARY(m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace softdimo::cuda
