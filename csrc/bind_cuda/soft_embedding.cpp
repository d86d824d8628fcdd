// soft_embedding on CUDA: allocation, launch.

#include "bind_cuda/soft_embedding.h"

#include "softdimo/cuda/soft_embedding_tiny.h"

namespace softdimo::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_embedding(
    const Tensor& logits, const Tensor& codebook, double temperature, const OptionalTensor& row_temperature,
    const OptionalTensor& mask, const OptionalTensor& mask_embedding, const OptionalTensor& seed,
    const OptionalTensor& row_ids, std::optional<int64_t> top_k, std::optional<double> top_p, bool high_precision,
    bool hard) {
  constexpr const char* kName = soft_embedding_binding::kName;
  STD_TORCH_CHECK(!top_k.has_value() && !top_p.has_value(), "softdimo::", kName, ": no CUDA kernel truncates");
  const DeviceGuard guard(logits.get_device_index());
  SoftEmbeddingCall call = prepare_soft_embedding(logits, codebook, temperature, row_temperature, mask,
                                                  mask_embedding, seed, row_ids, high_precision);
  STD_TORCH_CHECK(call.params.width <= kMaxSoftEmbeddingWidth, "softdimo::", kName,
                  ": the CUDA kernel takes codebooks of at most 128 columns, got ", call.params.width);
  const Shape rows = leading_shape(logits);
  Shape shape = rows;
  shape.push_back(call.params.width);
  const bool keeps_soft = hard || call.params.codebook_type != DType::float32;
  Tensor output = torch::stable::new_empty(logits, shape, codebook.scalar_type());
  Tensor row_max = torch::stable::new_empty(logits, rows, ScalarType::Double);
  Tensor row_sum = torch::stable::new_empty(logits, rows, ScalarType::Float);
  Tensor soft = torch::stable::new_empty(logits, keeps_soft ? shape : Shape{0}, ScalarType::Float);
  const Tensor row_threshold = torch::stable::new_empty(logits, {0}, ScalarType::Float);
  const Tensor row_last = torch::stable::new_empty(logits, {0}, ScalarType::Long);

  SoftEmbeddingForwardParams params{};
  params.call = call.params;
  params.hard = hard;
  params.output = output.mutable_data_ptr();
  params.row_max = static_cast<double*>(row_max.mutable_data_ptr());
  params.row_sum = static_cast<float*>(row_sum.mutable_data_ptr());
  params.soft = keeps_soft ? static_cast<float*>(soft.mutable_data_ptr()) : nullptr;
  if (is_tiny(call.params)) {
    check_launch(kName, softdimo_soft_embedding_tiny_forward(&params, current_stream(logits)));
    return {output, row_max, row_sum, soft, row_threshold, row_last};
  }
  params.packed = call.scratch(logits, soft_embedding_packed_bytes(call.params));
  params.workspace = call.scratch(logits, softdimo_soft_embedding_workspace_bytes(&call.params));
  check_launch(kName, softdimo_soft_embedding_forward(&params, current_stream(logits)));
  return {output, row_max, row_sum, soft, row_threshold, row_last};
}

}  // namespace

SOFTDIMO_CUDA_LIBRARY(m) { m.impl("soft_embedding", TORCH_BOX(&soft_embedding)); }

}  // namespace softdimo::cuda
