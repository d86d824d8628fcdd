// distribution_matching_loss on CPUs: a token divergence whose gradient is handed to the student.

#include "bind_cpu/divergence.h"

namespace softdimo::cpu {
namespace {

// Divides every row's share by what `normalization` says: nothing, B, or B x max(its sample's counted rows, 1).
void apply_normalization(PreparedDivergence& prepared, const Tensor& student, const std::string& normalization) {
  if (normalization == "sum") return;
  const int64_t batch = std::max<int64_t>(student.size(0), 1), per_sample = prepared.call.rows / batch;
  std::vector<int64_t> counted(static_cast<size_t>(batch), 0);
  for (int64_t n : prepared.counted) ++counted[static_cast<size_t>(n / per_sample)];
  for (int64_t n : prepared.counted) {
    const int64_t in_sample = normalization == "masked" ? counted[static_cast<size_t>(n / per_sample)] : 1;
    prepared.share[static_cast<size_t>(n)] /= static_cast<double>(batch * in_sample);
  }
}

PreparedDivergence prepare(const DivergenceArguments& arguments, const Tensor& student,
                           const std::string& normalization) {
  STD_TORCH_CHECK(student.dim() >= 2 && leading_shape(student, 0) == leading_shape(arguments.model, 0),
                  "softdimo: the logits differ in shape");
  PreparedDivergence prepared = prepare_divergence(arguments, is_double(student));
  apply_normalization(prepared, student, normalization);
  return prepared;
}

std::tuple<Tensor, Tensor> distribution_matching_loss(
    const Tensor& student, const Tensor& teacher, const Tensor& auxiliary, const Tensor& mask,
    const OptionalTensor& uncond, double guidance, const OptionalTensor& row_guidance, double teacher_temperature,
    double auxiliary_temperature, double forward_weight, double reverse_weight, const OptionalTensor& weight,
    std::string normalization) {
  const OptionalTensor counts = mask;
  const PreparedDivergence prepared =
      prepare({teacher, auxiliary, uncond, guidance, row_guidance, teacher_temperature, auxiliary_temperature,
               forward_weight, reverse_weight, counts, weight},
              student, normalization);
  const auto [values, statistics] = row_divergences(prepared);
  return {sum_of_shares(prepared, values), statistics};
}

Tensor distribution_matching_loss_backward(
    const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& auxiliary, const Tensor& mask,
    const OptionalTensor& uncond, double guidance, const OptionalTensor& row_guidance, double teacher_temperature,
    double auxiliary_temperature, double forward_weight, double reverse_weight, const OptionalTensor& weight,
    std::string normalization, const Tensor& statistics, std::vector<bool> wanted) {
  const OptionalTensor counts = mask;
  const DivergenceArguments arguments{teacher, auxiliary, uncond, guidance, row_guidance, teacher_temperature,
                                      auxiliary_temperature, forward_weight, reverse_weight, counts, weight};
  const PreparedDivergence prepared = prepare(arguments, student, normalization);
  STD_TORCH_CHECK(wanted.size() == 1, "softdimo: distribution_matching_loss has one gradient");
  return std::get<1>(divergence_gradients(prepared, arguments, grad, statistics, {false, wanted[0], false},
                                          student.scalar_type()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) {
  m.impl("distribution_matching_loss", TORCH_BOX(&distribution_matching_loss));
  m.impl("distribution_matching_loss_backward", TORCH_BOX(&distribution_matching_loss_backward));
}

}  // namespace softdimo::cpu
