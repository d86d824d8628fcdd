// What the bindings of token_divergence and distribution_matching_loss share: layout, the rows that count, threads.
#pragma once

#include <cstring>

#include "bind_cpu/tensors.h"
#include "softdimo/cpu/divergence.h"

namespace softdimo::cpu {

// The logits and settings of a call, as the operators take them.
struct DivergenceArguments {
  const Tensor &teacher, &model;
  const OptionalTensor& uncond;
  double guidance;
  const OptionalTensor& row_guidance;
  double teacher_temperature, model_temperature, forward_weight, reverse_weight;
  const OptionalTensor &mask, &weight;
};

// A call with everything it points at.
struct PreparedDivergence {
  Divergence call{};
  ScalarType compute;
  DivergenceKernels kernels;
  std::vector<Tensor> kept;
  int64_t count = 0;             // of the rows that count
  std::vector<int64_t> counted;  // these rows, where there is a mask
  std::vector<double> share;     // per row: its weight; 0 where it does not count
};

PreparedDivergence prepare_divergence(const DivergenceArguments& arguments, bool wide);

// D of every row in the compute type, 0 where it does not count, and what the backward needs of it.
std::tuple<Tensor, Tensor> row_divergences(const PreparedDivergence& prepared);

// Sum of value x share over the rows: in double, the same tree for any number of threads.
Tensor sum_of_shares(const PreparedDivergence& prepared, const Tensor& values);

// The gradients that are wanted: to the teacher's, the model's (in `model_type`) and the unconditional logits.
std::tuple<Tensor, Tensor, Tensor> divergence_gradients(const PreparedDivergence& prepared,
                                                        const DivergenceArguments& arguments, const Tensor& grad,
                                                        const Tensor& statistics, const std::vector<bool>& wanted,
                                                        ScalarType model_type);

}  // namespace softdimo::cpu
