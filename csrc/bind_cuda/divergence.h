// What the bindings of token_divergence and distribution_matching_loss share: layout, allocation, launch.
#pragma once

#include "bind_cuda/tensors.h"
#include "softdimo/cuda/divergence.h"

namespace softdimo::cuda {

// The logits and settings of a call, as the operators take them.
struct DivergenceArguments {
  const char* name;  // of the operator
  const Tensor &teacher, &model;
  const OptionalTensor& uncond;
  double guidance;
  const OptionalTensor& row_guidance;
  double teacher_temperature, model_temperature, forward_weight, reverse_weight;
  const OptionalTensor &mask, &weight;
};

// A call with everything it points at.
struct PreparedDivergence {
  const char* name;
  Shape shape;  // of the rows
  Divergence call{};
  std::optional<RowList> mask;
  std::vector<Tensor> kept;
};

PreparedDivergence prepare_divergence(const DivergenceArguments& arguments);

// weight x D / divisor of every row, 0 where it does not count, and what the backward needs of it.
std::tuple<Tensor, Tensor> row_divergences(const PreparedDivergence& prepared);

// The gradients that are wanted: to the teacher's, the model's (in `model_type`) and the unconditional logits.
// `upstream`: that of weight x D / divisor; broadcasts to the rows.
std::tuple<Tensor, Tensor, Tensor> divergence_gradients(PreparedDivergence& prepared,
                                                        const DivergenceArguments& arguments, const Tensor& upstream,
                                                        const Tensor& statistics, const std::vector<bool>& wanted,
                                                        ScalarType model_type);

}  // namespace softdimo::cuda
