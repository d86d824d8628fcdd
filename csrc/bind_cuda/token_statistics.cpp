// token_statistics on CUDA: layout, allocation, launch.

#include "bind_cuda/tensors.h"
#include "softdimo/cuda/token_statistics.h"

namespace softdimo::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> token_statistics(const Tensor& logits, double temperature,
                                                    const OptionalTensor& row_temperature, const OptionalTensor& mask) {
  constexpr const char* kName = "token_statistics";
  const DType dtype = dtype_of(kName, "logits", logits);
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1 && logits.size(-1) <= kMaxVocabulary, "softdimo::", kName,
                  ": logits must have shape [..., V] with 1 <= V <= 2^30");
  const DeviceGuard guard(logits.get_device_index());
  const Shape shape = leading_shape(logits);
  const RowList rows = logits_rows(logits, shape);
  std::optional<RowList> masks, temperatures;
  if (mask.has_value()) {
    check_device(kName, "mask", *mask, logits);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "softdimo::", kName, ": mask must be bool");
    masks = row_values(kName, "mask", *mask, shape, ScalarType::Bool);
  }
  if (row_temperature.has_value()) {
    check_device(kName, "row_temperature", *row_temperature, logits);
    temperatures = row_values(kName, "row_temperature", *row_temperature, shape, ScalarType::Float);
  }
  const auto output = [&] { return torch::stable::new_empty(logits, shape, ScalarType::Float); };
  Tensor log_normalizer = output(), entropy = output(), max_prob = output();

  TokenStatisticsParams params{};
  params.logits = rows.data<void>();
  params.dtype = dtype;
  params.rows = product(shape);
  params.vocabulary = logits.size(-1);
  params.row_stride = rows.stride;
  params.temperature = static_cast<float>(temperature);
  if (masks.has_value()) {
    params.mask = masks->data<uint8_t>();
    params.mask_stride = masks->stride;
  }
  if (temperatures.has_value()) {
    params.row_temperature = temperatures->data<float>();
    params.row_temperature_stride = temperatures->stride;
  }
  params.log_normalizer = static_cast<float*>(log_normalizer.mutable_data_ptr());
  params.entropy = static_cast<float*>(entropy.mutable_data_ptr());
  params.max_prob = static_cast<float*>(max_prob.mutable_data_ptr());
  check_launch(kName, softdimo_token_statistics(&params, current_stream(logits)));
  return {log_normalizer, entropy, max_prob};
}

}  // namespace

SOFTDIMO_CUDA_LIBRARY(m) { m.impl("token_statistics", TORCH_BOX(&token_statistics)); }

}  // namespace softdimo::cuda
