// What the forward and the backward of linear_soft_embedding are called with, checked and laid out for the kernels.
#pragma once

#include "bind_cpu/tensors.h"
#include "softdimo/cpu/linear_soft_embedding.h"

namespace softdimo::cpu {
namespace {

inline const LinearSoftEmbeddingTable& linear_soft_embedding_table() {
  return SOFTDIMO_PRODUCT_TABLE(linear_soft_embedding_table);
}

// A call with everything it points at.
struct Prepared {
  LinearSoftEmbedding call{};
  ScalarType compute;
  LinearSoftEmbeddingKernels kernels;
  Shape rows;  // [..., (G)]
  std::vector<Tensor> kept;

  int64_t row_count() const { return call.positions * call.groups; }
  int64_t size() const { return compute == ScalarType::Double ? 8 : 4; }
  int64_t sum_size() const { return sums_in_double(call) ? 8 : size(); }

  template <class T>
  const T* keep(Tensor tensor) {
    kept.push_back(std::move(tensor));
    return static_cast<const T*>(kept.back().const_data_ptr());
  }

  // A tensor that broadcasts to [shape, last]; copied only where its rows cannot be walked.
  RowMatrix matrix(Tensor tensor, const Shape& shape) {
    RowMatrix out{};
    const int64_t dropped = std::min<int64_t>(tensor.dim(), 1);
    if (!layout_rows(tensor, shape, dropped, &out.rows)) {
      tensor = as_contiguous(tensor);
      STD_TORCH_CHECK(layout_rows(tensor, shape, dropped, &out.rows), "softdimo: too many broadcast dimensions");
    }
    out.type = dtype_of(tensor);
    out.step = dropped == 0 || tensor.size(-1) == 1 ? 0 : tensor.stride(-1);
    out.data = keep<void>(std::move(tensor));
    return out;
  }
};

inline TokenTable token_table(const Tensor& tensor) {
  const int64_t group = tensor.dim() == 3 ? tensor.stride(0) : 0;
  return {tensor.const_data_ptr(), dtype_of(tensor), {group, tensor.stride(-2), tensor.stride(-1)}, tensor.size(-1)};
}

inline void check_shapes(const Tensor& hidden, const Tensor& weight, const Tensor& codebook, const OptionalTensor& mask,
                  const OptionalTensor& mask_embedding) {
  STD_TORCH_CHECK(hidden.is_cpu() && weight.is_cpu() && codebook.is_cpu(), "softdimo: expected CPU tensors");
  STD_TORCH_CHECK(hidden.dim() >= 1 && (weight.dim() == 2 || weight.dim() == 3) && codebook.dim() == weight.dim(),
                  "softdimo: bad dimensions");
  STD_TORCH_CHECK(weight.numel() > 0 && codebook.numel() > 0 && weight.size(-1) == hidden.size(-1) &&
                      weight.size(-2) == codebook.size(-2) && weight.size(0) == codebook.size(0),
                  "softdimo: weight and codebook do not fit the hidden states");
  const int64_t groups = weight.dim() == 3 ? weight.size(0) : 1;
  const int64_t rows = product(leading_shape(hidden)) * groups;
  STD_TORCH_CHECK(!mask.has_value() || (mask->numel() == rows && mask->scalar_type() == ScalarType::Bool &&
                                        mask_embedding.has_value()),
                  "softdimo: mask does not fit the hidden states");
  STD_TORCH_CHECK(!mask_embedding.has_value() || mask_embedding->numel() == groups * codebook.size(-1),
                  "softdimo: mask_embedding does not fit the codebook");
}

inline Prepared prepare(const Tensor& hidden, const Tensor& weight, const Tensor& codebook, const OptionalTensor& bias,
                 double temperature, const OptionalTensor& row_temperature, const OptionalTensor& mask,
                 const OptionalTensor& mask_embedding, bool high_precision) {
  check_shapes(hidden, weight, codebook, mask, mask_embedding);
  Prepared prepared;
  bool wide = is_double(hidden) || is_double(weight) || is_double(codebook) || is_double(bias);
  wide = wide || is_double(row_temperature) || is_double(mask_embedding);
  prepared.compute = wide ? ScalarType::Double : ScalarType::Float;
  prepared.kernels = wide ? linear_soft_embedding_table().float64 : linear_soft_embedding_table().float32;

  LinearSoftEmbedding& s = prepared.call;
  const Shape positions = leading_shape(hidden);
  s.positions = product(positions);
  s.groups = weight.dim() == 3 ? weight.size(0) : 1;
  s.vocabulary = weight.size(-2);
  s.weight = token_table(weight);
  s.codebook = token_table(codebook);
  s.hidden = prepared.matrix(hidden, positions);
  prepared.rows = weight.dim() == 3 ? with(positions, s.groups) : positions;
  if (bias.has_value()) s.bias = prepared.matrix(*bias, prepared.rows);
  s.temperature = wide ? usable_temperature<double>(temperature) : usable_temperature<float>(temperature);
  const auto is_half = [](const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; };
  s.half = linear_soft_embedding_table().bfloat16_products && !wide && !high_precision && is_half(hidden) &&
           is_half(weight) && is_half(codebook) && !sums_in_double(s) && !(mask.has_value() && s.groups > 1);
  const int64_t slices = (s.vocabulary + kChainSlice - 1) / kChainSlice;
  const int64_t half_slice = s.vocabulary < kManyEntries ? kSmallSlice : kSlice;
  s.slice = s.half ? half_slice : (s.vocabulary + slices - 1) / slices;
  if (row_temperature.has_value()) {
    const Tensor like = torch::stable::new_empty(hidden, with(prepared.rows, 0), prepared.compute);
    s.row_temperature =
        prepared.keep<void>(wide ? row_temperatures<double>(like, *row_temperature, prepared.compute)
                                 : row_temperatures<float>(like, *row_temperature, prepared.compute));
  }
  if (mask.has_value()) {
    s.mask = prepared.keep<bool>(as_contiguous(*mask));
    s.mask_embedding =
        prepared.keep<void>(as_contiguous(*mask_embedding, prepared.compute));
  }
  return prepared;
}

}  // namespace
}  // namespace softdimo::cpu
