// token_divergence on CUDA.

#include "bind_cuda/divergence.h"
#include "bind_cuda/row_sum.h"

namespace softdimo::cuda {
namespace {

constexpr const char* kName = "token_divergence";

std::tuple<Tensor, Tensor> token_divergence(const Tensor& teacher, const Tensor& model, const OptionalTensor& uncond,
                                            double guidance, const OptionalTensor& row_guidance,
                                            double teacher_temperature, double model_temperature,
                                            double forward_weight, double reverse_weight, const OptionalTensor& mask,
                                            const OptionalTensor& weight, std::string reduction) {
  const DeviceGuard guard(model.get_device_index());
  const PreparedDivergence prepared =
      prepare_divergence({kName, teacher, model, uncond, guidance, row_guidance, teacher_temperature,
                          model_temperature, forward_weight, reverse_weight, mask, weight});
  const auto [values, statistics] = row_divergences(prepared);
  if (reduction == "none") return {values, statistics};
  return {sum_of_rows(kName, values, prepared.mask, reduction == "mean"), statistics};
}

std::tuple<Tensor, Tensor, Tensor> token_divergence_backward(
    const Tensor& grad, const Tensor& teacher, const Tensor& model, const OptionalTensor& uncond, double guidance,
    const OptionalTensor& row_guidance, double teacher_temperature, double model_temperature, double forward_weight,
    double reverse_weight, const OptionalTensor& mask, const OptionalTensor& weight, std::string reduction,
    const Tensor& statistics, std::vector<bool> wanted) {
  const DeviceGuard guard(model.get_device_index());
  const DivergenceArguments arguments{kName, teacher, model, uncond, guidance, row_guidance, teacher_temperature,
                                      model_temperature, forward_weight, reverse_weight, mask, weight};
  PreparedDivergence prepared = prepare_divergence(arguments);
  Tensor upstream = grad;
  if (reduction == "mean") {
    check_device(kName, "grad", grad, model);
    STD_TORCH_CHECK(grad.numel() == 1, "softdimo::", kName, ": grad must be one number");
    upstream = over_counted_rows(kName, torch::stable::to(grad, ScalarType::Float), prepared.call.rows, prepared.mask);
  }
  return divergence_gradients(prepared, arguments, upstream, statistics, wanted, model.scalar_type());
}

}  // namespace

SOFTDIMO_CUDA_LIBRARY(m) {
  m.impl("token_divergence", TORCH_BOX(&token_divergence));
  m.impl("token_divergence_backward", TORCH_BOX(&token_divergence_backward));
}

}  // namespace softdimo::cuda
