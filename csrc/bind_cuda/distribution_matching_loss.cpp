// distribution_matching_loss on CUDA: a token divergence whose gradient is handed to the student.

#include "bind_cuda/divergence.h"
#include "bind_cuda/row_sum.h"

namespace softdimo::cuda {
namespace {

constexpr const char* kName = "distribution_matching_loss";

// Divides every row by what `normalization` says: nothing, B, or B x max(its sample's counted rows, 1).
void apply_normalization(PreparedDivergence& prepared, const std::string& normalization) {
  if (normalization == "sum" || prepared.call.rows == 0) return;
  const int64_t batch = prepared.shape.front(), per_sample = prepared.call.rows / batch;
  prepared.call.divisor = {nullptr, per_sample, static_cast<float>(batch)};
  if (normalization == "batch") return;
  Tensor counts = torch::stable::new_empty(prepared.kept.front(), {batch}, ScalarType::Int);
  const RowCountParams params{prepared.call.mask, batch, per_sample, static_cast<int32_t*>(counts.mutable_data_ptr())};
  check_launch(kName, softdimo_count_rows(&params, current_stream(counts)));
  prepared.call.divisor.counts = params.counts;
  prepared.kept.push_back(counts);
}

PreparedDivergence prepare(const DivergenceArguments& arguments, const Tensor& student,
                           const std::string& normalization) {
  bool same = student.dim() >= 2 && student.dim() == arguments.model.dim();
  for (int64_t i = 0; same && i < student.dim(); ++i) same = student.size(i) == arguments.model.size(i);
  STD_TORCH_CHECK(same, "softdimo::", kName, ": the logits differ in shape");
  PreparedDivergence prepared = prepare_divergence(arguments);
  apply_normalization(prepared, normalization);
  return prepared;
}

std::tuple<Tensor, Tensor> distribution_matching_loss(
    const Tensor& student, const Tensor& teacher, const Tensor& auxiliary, const Tensor& mask,
    const OptionalTensor& uncond, double guidance, const OptionalTensor& row_guidance, double teacher_temperature,
    double auxiliary_temperature, double forward_weight, double reverse_weight, const OptionalTensor& weight,
    std::string normalization) {
  const DeviceGuard guard(auxiliary.get_device_index());
  const OptionalTensor counts = mask;
  const PreparedDivergence prepared =
      prepare({kName, teacher, auxiliary, uncond, guidance, row_guidance, teacher_temperature, auxiliary_temperature,
               forward_weight, reverse_weight, counts, weight},
              student, normalization);
  const auto [values, statistics] = row_divergences(prepared);
  return {sum_of_rows(kName, values, std::nullopt, false), statistics};
}

Tensor distribution_matching_loss_backward(
    const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& auxiliary, const Tensor& mask,
    const OptionalTensor& uncond, double guidance, const OptionalTensor& row_guidance, double teacher_temperature,
    double auxiliary_temperature, double forward_weight, double reverse_weight, const OptionalTensor& weight,
    std::string normalization, const Tensor& statistics, std::vector<bool> wanted) {
  STD_TORCH_CHECK(wanted.size() == 1, "softdimo::", kName, ": it has one gradient");
  const DeviceGuard guard(auxiliary.get_device_index());
  const OptionalTensor counts = mask;
  const DivergenceArguments arguments{kName, teacher, auxiliary, uncond, guidance, row_guidance, teacher_temperature,
                                      auxiliary_temperature, forward_weight, reverse_weight, counts, weight};
  PreparedDivergence prepared = prepare(arguments, student, normalization);
  return std::get<1>(divergence_gradients(prepared, arguments, grad, statistics, {false, wanted[0], false},
                                          student.scalar_type()));
}

}  // namespace

SOFTDIMO_CUDA_LIBRARY(m) {
  m.impl("distribution_matching_loss", TORCH_BOX(&distribution_matching_loss));
  m.impl("distribution_matching_loss_backward", TORCH_BOX(&distribution_matching_loss_backward));
}

}  // namespace softdimo::cuda
