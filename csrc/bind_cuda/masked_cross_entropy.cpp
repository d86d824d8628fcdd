// masked_cross_entropy on CUDA: layout, allocation, launch, reduction.

#include "softdimo/cuda/masked_cross_entropy.h"

#include "bind_cuda/row_sum.h"
#include "bind_cuda/tensors.h"

namespace softdimo::cuda {
namespace {

constexpr const char* kName = "masked_cross_entropy";

// A call with the tensors that it points at.
struct Prepared {
  CrossEntropy call{};
  Shape shape;
  RowList logits, targets;
  std::optional<RowList> mask;
};

Prepared prepare(const Tensor& logits, const Tensor& targets, const OptionalTensor& mask, double smoothing) {
  const DType dtype = dtype_of(kName, "logits", logits);
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1 && logits.size(-1) <= kMaxVocabulary, "softdimo::", kName,
                  ": logits must have shape [..., V] with 1 <= V <= 2^30");
  check_device(kName, "targets", targets, logits);
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, "softdimo::", kName, ": targets must be int64");
  const Shape shape = leading_shape(logits);
  Prepared prepared{{}, shape, logits_rows(logits, shape),
                    row_values(kName, "targets", targets, shape, ScalarType::Long), std::nullopt};
  CrossEntropy& c = prepared.call;
  c.logits = prepared.logits.data<void>();
  c.dtype = dtype;
  c.rows = product(shape);
  c.vocabulary = logits.size(-1);
  c.row_stride = prepared.logits.stride;
  c.targets = prepared.targets.data<int64_t>();
  c.target_stride = prepared.targets.stride;
  c.smoothing = smoothing;
  if (mask.has_value()) {
    check_device(kName, "mask", *mask, logits);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "softdimo::", kName, ": mask must be bool");
    prepared.mask = row_values(kName, "mask", *mask, shape, ScalarType::Bool);
    c.mask = prepared.mask->data<uint8_t>();
    c.mask_stride = prepared.mask->stride;
  }
  return prepared;
}

std::tuple<Tensor, Tensor, Tensor> masked_cross_entropy(const Tensor& logits, const Tensor& targets,
                                                        const OptionalTensor& mask, double label_smoothing,
                                                        std::string reduction) {
  const DeviceGuard guard(logits.get_device_index());
  const Prepared prepared = prepare(logits, targets, mask, label_smoothing);
  const auto output = [&] { return torch::stable::new_empty(logits, prepared.shape, ScalarType::Float); };
  Tensor loss = output(), row_max = output(), row_rest = output();
  const CrossEntropyForwardParams params{prepared.call, static_cast<float*>(loss.mutable_data_ptr()),
                                         static_cast<float*>(row_max.mutable_data_ptr()),
                                         static_cast<float*>(row_rest.mutable_data_ptr())};
  check_launch(kName, softdimo_masked_cross_entropy(&params, current_stream(logits)));
  if (reduction != "none") loss = sum_of_rows(kName, loss, prepared.mask, reduction == "mean");
  return {loss, row_max, row_rest};
}

Tensor masked_cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& targets,
                                     const OptionalTensor& mask, double label_smoothing, std::string reduction,
                                     const Tensor& row_max, const Tensor& row_rest) {
  const DeviceGuard guard(logits.get_device_index());
  const Prepared prepared = prepare(logits, targets, mask, label_smoothing);
  const Tensor tops = torch::stable::contiguous(row_max), rests = torch::stable::contiguous(row_rest);
  for (const Tensor& saved : {tops, rests}) {
    STD_TORCH_CHECK(same_device(saved, logits) && saved.numel() == prepared.call.rows &&
                        saved.scalar_type() == ScalarType::Float,
                    "softdimo::", kName, ": the saved tensors do not fit the logits");
  }
  STD_TORCH_CHECK(reduction == "none" || grad.numel() == 1, "softdimo::", kName, ": grad must be a scalar");
  check_device(kName, "grad", grad, logits);
  RowList upstream = row_values(kName, "grad", grad, prepared.shape, ScalarType::Float);
  if (reduction == "mean") {
    upstream.tensor = over_counted_rows(kName, upstream.tensor, prepared.call.rows, prepared.mask);
  }
  Shape shape = prepared.shape;
  shape.push_back(prepared.call.vocabulary);
  Tensor dlogits = torch::stable::new_empty(logits, shape);
  const CrossEntropyBackwardParams params{prepared.call,
                                          static_cast<const float*>(tops.const_data_ptr()),
                                          static_cast<const float*>(rests.const_data_ptr()),
                                          upstream.data<float>(),
                                          upstream.stride,
                                          dlogits.mutable_data_ptr()};
  check_launch(kName, softdimo_masked_cross_entropy_backward(&params, current_stream(logits)));
  return dlogits;
}

}  // namespace

SOFTDIMO_CUDA_LIBRARY(m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&masked_cross_entropy));
  m.impl("masked_cross_entropy_backward", TORCH_BOX(&masked_cross_entropy_backward));
}

}  // namespace softdimo::cuda
