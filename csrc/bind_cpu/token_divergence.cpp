// token_divergence on CPUs.

#include "bind_cpu/divergence.h"

namespace softdimo::cpu {
namespace {

// "mean": over the rows that count.
void apply_reduction(PreparedDivergence& prepared, const std::string& reduction) {
  if (reduction != "mean") return;
  for (double& share : prepared.share) share /= static_cast<double>(std::max<int64_t>(prepared.count, 1));
}

template <class T>
void multiply(Tensor& values, const std::vector<double>& share) {
  T* value = static_cast<T*>(values.mutable_data_ptr());
  for (size_t n = 0; n < share.size(); ++n) {
    if (share[n] != 1) value[n] = static_cast<T>(static_cast<double>(value[n]) * share[n]);
  }
}

std::tuple<Tensor, Tensor> token_divergence(const Tensor& teacher, const Tensor& model, const OptionalTensor& uncond,
                                            double guidance, const OptionalTensor& row_guidance,
                                            double teacher_temperature, double model_temperature,
                                            double forward_weight, double reverse_weight, const OptionalTensor& mask,
                                            const OptionalTensor& weight, std::string reduction) {
  PreparedDivergence prepared =
      prepare_divergence({teacher, model, uncond, guidance, row_guidance, teacher_temperature, model_temperature,
                          forward_weight, reverse_weight, mask, weight},
                         false);
  apply_reduction(prepared, reduction);
  auto [values, statistics] = row_divergences(prepared);
  if (reduction != "none") return {sum_of_shares(prepared, values), statistics};
  prepared.compute == ScalarType::Double ? multiply<double>(values, prepared.share)
                                         : multiply<float>(values, prepared.share);
  return {values, statistics};
}

std::tuple<Tensor, Tensor, Tensor> token_divergence_backward(
    const Tensor& grad, const Tensor& teacher, const Tensor& model, const OptionalTensor& uncond, double guidance,
    const OptionalTensor& row_guidance, double teacher_temperature, double model_temperature, double forward_weight,
    double reverse_weight, const OptionalTensor& mask, const OptionalTensor& weight, std::string reduction,
    const Tensor& statistics, std::vector<bool> wanted) {
  const DivergenceArguments arguments{teacher, model, uncond, guidance, row_guidance, teacher_temperature,
                                      model_temperature, forward_weight, reverse_weight, mask, weight};
  PreparedDivergence prepared = prepare_divergence(arguments, false);
  apply_reduction(prepared, reduction);
  return divergence_gradients(prepared, arguments, grad, statistics, wanted, model.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) {
  m.impl("token_divergence", TORCH_BOX(&token_divergence));
  m.impl("token_divergence_backward", TORCH_BOX(&token_divergence_backward));
}

}  // namespace softdimo::cpu
