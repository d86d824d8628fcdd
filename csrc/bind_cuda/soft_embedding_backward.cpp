// soft_embedding's backward on CUDA: workspace, layout, launches.

#include "softdimo/cuda/soft_embedding_backward.h"

#include "bind_cuda/soft_embedding.h"
#include "softdimo/cuda/soft_embedding_tiny.h"

namespace softdimo::cuda {
namespace {

using soft_embedding_binding::kName;

Tensor nothing(const Tensor& logits) { return torch::stable::new_empty(logits, {0}); }

Shape shape_of(const Tensor& tensor) {
  Shape shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

// A contiguous tensor of the forward's, checked.
Tensor saved(const char* argument, const Tensor& tensor, int64_t count, ScalarType type, const Tensor& logits) {
  check_device(kName, argument, tensor, logits);
  STD_TORCH_CHECK(tensor.numel() == count && tensor.scalar_type() == type, "softdimo::", kName, ": ", argument,
                  " does not fit the logits");
  return torch::stable::contiguous(tensor);
}

// out = factor * the sum of `count` parts, each of `out`'s size.
void sum_parts(const float* parts, int64_t count, float factor, Tensor& out, void* stream) {
  const SumPartsParams params{parts, count, out.numel(), factor, out.mutable_data_ptr(), dtype_of(kName, "out", out)};
  check_launch(kName, softdimo_sum_parts(&params, stream));
}

// One backward: its parameters, and everything that they point at.
class Backward {
 public:
  Backward(SoftEmbeddingCall call, const Tensor& logits, void* stream)
      : call_(std::move(call)), logits_(logits), stream_(stream) {
    params_.call = call_.params;
  }

  void save(const Tensor& grad, const Tensor& codebook, const Tensor& row_max, const Tensor& row_sum,
            const Tensor& soft) {
    const SoftEmbeddingParams& p = params_.call;
    STD_TORCH_CHECK(grad.numel() == p.rows * p.width, "softdimo::", kName, ": the gradient does not fit the output");
    check_device(kName, "grad", grad, logits_);
    params_.grad = call_.keep<void>(torch::stable::contiguous(torch::stable::to(grad, codebook.scalar_type())));
    params_.row_max = call_.keep<double>(saved("row_max", row_max, p.rows, ScalarType::Double, logits_));
    params_.row_sum = call_.keep<float>(saved("row_sum", row_sum, p.rows, ScalarType::Float, logits_));
    params_.soft = call_.keep<float>(saved("soft", soft, p.rows * p.width, ScalarType::Float, logits_));
  }

  // Of the logits and of each row's temperature, each where it is wanted.
  void logits_gradient(Tensor* dlogits, Tensor* dtemperature) {
    params_.dlogits = dlogits != nullptr ? dlogits->mutable_data_ptr() : nullptr;
    params_.dtemperature = dtemperature != nullptr ? static_cast<float*>(dtemperature->mutable_data_ptr()) : nullptr;
    const SoftEmbeddingParams& p = params_.call;
    if (is_tiny(p)) return check_launch(kName, softdimo_soft_embedding_tiny_dlogits(&params_, stream_));
    prepare();
    if (void* packed = scratch(soft_embedding_packed_bytes(p))) {
      check_launch(kName, softdimo_soft_embedding_pack(&p, packed, stream_));
      params_.packed = packed;
    }
    const int64_t partials = p.groups * padded_positions(p) * row_chunks(p);
    params_.partials = static_cast<RowPartial*>(scratch(partials * static_cast<int64_t>(sizeof(RowPartial))));
    check_launch(kName, softdimo_soft_embedding_dlogits(&params_, stream_));
    check_launch(kName, softdimo_soft_embedding_finish(&params_, stream_));
  }

  void codebook_gradient(Tensor& dcodebook) {
    const SoftEmbeddingParams& p = params_.call;
    params_.splits = is_tiny(p) ? tiny_gradient_splits(p) : gradient_splits(p);
    params_.dcodebook = static_cast<float*>(scratch(4 * params_.splits * dcodebook.numel()));
    if (is_tiny(p)) {
      check_launch(kName, softdimo_soft_embedding_tiny_dcodebook(&params_, stream_));
      return sum_parts(params_.dcodebook, params_.splits, 1.0f, dcodebook, stream_);
    }
    prepare();
    check_launch(kName, softdimo_soft_embedding_dcodebook(&params_, stream_));
    sum_parts(params_.dcodebook, params_.splits, gradient_factor(p), dcodebook, stream_);
  }

  void mask_gradient(Tensor& dmask) {
    const int64_t parts = mask_parts(params_.call);
    params_.mask_parts = static_cast<float*>(scratch(4 * parts * dmask.numel()));
    check_launch(kName, softdimo_soft_embedding_mask_parts(&params_, stream_));
    sum_parts(params_.mask_parts, parts, 1.0f, dmask, stream_);
  }

 private:
  // What dlogits and dcodebook read: once.
  void prepare() {
    if (params_.records != nullptr) return;
    const SoftEmbeddingParams& p = params_.call;
    const int64_t positions = p.groups * padded_positions(p);
    params_.records = static_cast<RowRecord*>(scratch(positions * static_cast<int64_t>(sizeof(RowRecord))));
    params_.upstream = static_cast<uint16_t*>(scratch(upstream_bytes(p)));
    check_launch(kName, softdimo_soft_embedding_prepare(&params_, stream_));
  }

  void* scratch(int64_t bytes) { return call_.scratch(logits_, bytes); }

  SoftEmbeddingCall call_;
  const Tensor& logits_;
  void* stream_;
  SoftEmbeddingBackwardParams params_{};
};

// The sums over the dimensions along which the temperature was broadcast to the rows.
Tensor temperature_gradient(const Tensor& of_rows, const Tensor& temperature, void* stream) {
  const Shape rows = shape_of(of_rows), own = shape_of(temperature);
  Tensor out = torch::stable::new_empty(temperature, own);
  SumRowsParams params{};
  params.values = static_cast<const float*>(of_rows.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.type = dtype_of(kName, "row_temperature", temperature);
  const size_t missing = rows.size() - own.size();
  for (size_t i = 0; i < rows.size(); ++i) {
    Dimensions& dimensions = i < missing || own[i - missing] != rows[i] ? params.reduced : params.kept;
    STD_TORCH_CHECK(dimensions.count < Dimensions::kMost, "softdimo::", kName,
                    ": row_temperature has too many dimensions");
    dimensions.total *= rows[i];
    dimensions.size[dimensions.count] = rows[i];
    dimensions.stride[dimensions.count++] = product(Shape(rows.begin() + static_cast<int64_t>(i) + 1, rows.end()));
  }
  if (params.reduced.total == 1) {
    sum_parts(params.values, 1, 1.0f, out, stream);
  } else {
    check_launch(kName, softdimo_sum_rows(&params, stream));
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_embedding_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& codebook, double temperature,
    const OptionalTensor& row_temperature, const OptionalTensor& mask, const OptionalTensor& mask_embedding,
    const OptionalTensor& seed, const OptionalTensor& row_ids, std::optional<int64_t> top_k,
    std::optional<double> top_p, bool high_precision, const Tensor& row_max, const Tensor& row_sum, const Tensor& soft,
    const Tensor&, const Tensor&, std::vector<bool> wanted) {
  STD_TORCH_CHECK(!top_k.has_value() && !top_p.has_value(), "softdimo::", kName,
                  ": top_k and top_p are not supported on CUDA");
  STD_TORCH_CHECK(wanted.size() == 4, "softdimo::", kName, ": wanted must have 4 elements");
  const DeviceGuard guard(logits.get_device_index());
  void* stream = current_stream(logits);
  Backward backward(prepare_soft_embedding(logits, codebook, temperature, row_temperature, mask, mask_embedding, seed,
                                           row_ids, high_precision),
                    logits, stream);
  STD_TORCH_CHECK(codebook.size(-1) <= kMaxSoftEmbeddingWidth, "softdimo::", kName,
                  ": codebook must have at most 128 columns, got ", codebook.size(-1));
  backward.save(grad, codebook, row_max, row_sum, soft);
  const bool wants_temperature = wanted[2] && row_temperature.has_value();
  const auto output = [&](bool is_wanted, const Tensor& like) {
    return is_wanted ? torch::stable::new_empty(like, shape_of(like)) : nothing(logits);
  };
  Tensor dlogits = output(wanted[0], logits), dcodebook = output(wanted[1], codebook), dtemperature = nothing(logits);
  Tensor dmask = wanted[3] && mask.has_value() ? output(true, *mask_embedding) : nothing(logits);
  if (wanted[0] || wants_temperature) {
    const Shape rows = wants_temperature ? leading_shape(logits) : Shape{0};
    Tensor of_rows = torch::stable::new_empty(logits, rows, ScalarType::Float);
    backward.logits_gradient(wanted[0] ? &dlogits : nullptr, wants_temperature ? &of_rows : nullptr);
    if (wants_temperature) dtemperature = temperature_gradient(of_rows, *row_temperature, stream);
  }
  if (wanted[1]) backward.codebook_gradient(dcodebook);
  if (wanted[3] && mask.has_value()) backward.mask_gradient(dmask);
  return {dlogits, dcodebook, dtemperature, dmask};
}

}  // namespace

SOFTDIMO_CUDA_LIBRARY(m) { m.impl("soft_embedding_backward", TORCH_BOX(&soft_embedding_backward)); }

}  // namespace softdimo::cuda
