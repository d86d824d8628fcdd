// Layout, allocation and launches of the divergences on CUDA.

#include "bind_cuda/divergence.h"

namespace softdimo::cuda {
namespace {

DivergenceLogits logit_rows(PreparedDivergence& prepared, const char* argument, const Tensor& logits,
                            const Tensor& like) {
  check_device(prepared.name, argument, logits, like);
  bool same = logits.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = logits.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "softdimo::", prepared.name, ": the logits differ in shape");
  const RowList rows = logits_rows(logits, prepared.shape);
  prepared.kept.push_back(rows.tensor);
  return {rows.data<void>(), dtype_of(prepared.name, argument, logits), rows.stride};
}

RowNumbers row_numbers(PreparedDivergence& prepared, const char* argument, const Tensor& numbers, const Tensor& like) {
  check_device(prepared.name, argument, numbers, like);
  const RowList rows = row_values(prepared.name, argument, numbers, prepared.shape, ScalarType::Float);
  prepared.kept.push_back(rows.tensor);
  return {rows.data<float>(), rows.stride};
}

}  // namespace

PreparedDivergence prepare_divergence(const DivergenceArguments& a) {
  STD_TORCH_CHECK(a.model.dim() >= 1 && a.model.size(-1) >= 1 && a.model.size(-1) <= kMaxVocabulary, "softdimo::",
                  a.name, ": logits must have shape [..., V] with 1 <= V <= 2^30");
  PreparedDivergence prepared{a.name, leading_shape(a.model), {}, {}, {}};
  Divergence& s = prepared.call;
  s.rows = product(prepared.shape);
  s.vocabulary = a.model.size(-1);
  s.teacher = logit_rows(prepared, "teacher_logits", a.teacher, a.model);
  s.model = logit_rows(prepared, "model_logits", a.model, a.model);
  s.guidance = static_cast<float>(a.guidance);
  if (a.uncond.has_value()) {
    s.uncond = logit_rows(prepared, "teacher_uncond_logits", *a.uncond, a.model);
    if (a.row_guidance.has_value()) s.row_guidance = row_numbers(prepared, "guidance_scale", *a.row_guidance, a.model);
  }
  s.teacher_temperature = make_temperature(a.teacher_temperature);
  s.model_temperature = make_temperature(a.model_temperature);
  s.forward_weight = static_cast<float>(a.forward_weight);
  s.reverse_weight = static_cast<float>(a.reverse_weight);
  if (a.mask.has_value()) {
    check_device(a.name, "mask", *a.mask, a.model);
    STD_TORCH_CHECK(a.mask->scalar_type() == ScalarType::Bool, "softdimo::", a.name, ": mask must be bool");
    prepared.mask = row_values(a.name, "mask", *a.mask, prepared.shape, ScalarType::Bool);
    s.mask = {prepared.mask->data<uint8_t>(), prepared.mask->stride};
  }
  if (a.weight.has_value()) s.weight = row_numbers(prepared, "weight", *a.weight, a.model);
  s.divisor = {nullptr, 1, 1.0f};
  return prepared;
}

std::tuple<Tensor, Tensor> row_divergences(const PreparedDivergence& prepared) {
  const Tensor& like = prepared.kept.front();
  Shape nine = prepared.shape;
  nine.push_back(kDivergenceStatistics);
  Tensor values = torch::stable::new_empty(like, prepared.shape, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(like, nine, ScalarType::Float);
  const DivergenceForwardParams params{prepared.call, static_cast<float*>(values.mutable_data_ptr()),
                                       static_cast<DivergenceStatistics*>(statistics.mutable_data_ptr())};
  check_launch(prepared.name, softdimo_divergence_forward(&params, current_stream(like)));
  return {values, statistics};
}

std::tuple<Tensor, Tensor, Tensor> divergence_gradients(PreparedDivergence& prepared, const DivergenceArguments& a,
                                                        const Tensor& upstream, const Tensor& statistics,
                                                        const std::vector<bool>& wanted, ScalarType model_type) {
  check_device(prepared.name, "statistics", statistics, a.model);
  STD_TORCH_CHECK(statistics.numel() == prepared.call.rows * kDivergenceStatistics &&
                      statistics.scalar_type() == ScalarType::Float && wanted.size() == 3,
                  "softdimo::", prepared.name, ": the saved statistics do not fit the logits");
  const Tensor saved = torch::stable::contiguous(statistics);
  Shape shape = prepared.shape;
  shape.push_back(prepared.call.vocabulary);
  const bool has_uncond = wanted[2] && a.uncond.has_value();
  const auto output = [&](bool needed, ScalarType type) {
    return torch::stable::new_empty(a.model, needed ? shape : Shape{0}, needed ? type : a.model.scalar_type());
  };
  Tensor teacher = output(wanted[0], a.teacher.scalar_type()), model = output(wanted[1], model_type);
  Tensor uncond = output(has_uncond, has_uncond ? a.uncond->scalar_type() : model_type);
  const auto gradient = [&](bool needed, Tensor& out) {
    return DivergenceGradient{needed ? out.mutable_data_ptr() : nullptr, dtype_of(prepared.name, "gradient", out)};
  };
  const DivergenceBackwardParams params{prepared.call,
                                        static_cast<const DivergenceStatistics*>(saved.const_data_ptr()),
                                        row_numbers(prepared, "grad", upstream, a.model),
                                        gradient(wanted[0], teacher),
                                        gradient(wanted[1], model),
                                        gradient(has_uncond, uncond)};
  check_launch(prepared.name, softdimo_divergence_backward(&params, current_stream(a.model)));
  return {teacher, model, uncond};
}

}  // namespace softdimo::cuda
