// What the bindings of soft_embedding's forward and backward share: checks, and the parameters that both take.
#pragma once

#include <utility>

#include "bind_cuda/tensors.h"
#include "softdimo/cuda/soft_embedding.h"

namespace softdimo::cuda {

// A call with everything it points at.
struct SoftEmbeddingCall {
  SoftEmbeddingParams params{};
  std::vector<Tensor> kept;

  template <typename T>
  const T* keep(const Tensor& tensor) {
    kept.push_back(tensor);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  // Bytes on the device of `like`; null for none.
  void* scratch(const Tensor& like, int64_t bytes) {
    if (bytes == 0) return nullptr;
    kept.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
    return kept.back().mutable_data_ptr();
  }
};

namespace soft_embedding_binding {

constexpr const char* kName = "soft_embedding";

inline void check_codebook(const Tensor& logits, const Tensor& codebook) {
  check_device(kName, "codebook", codebook, logits);
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1 && logits.size(-1) <= kMaxVocabulary, "softdimo::", kName,
                  ": logits must have shape [..., V] with 1 <= V <= 2^30");
  STD_TORCH_CHECK((codebook.dim() == 2 || codebook.dim() == 3) && codebook.size(-2) == logits.size(-1) &&
                      codebook.size(-1) >= 1,
                  "softdimo::", kName, ": codebook must have shape [V, D] or [G, V, D] with the logits' V");
  const bool grouped = codebook.dim() == 3;
  STD_TORCH_CHECK(!grouped || (logits.dim() >= 2 && logits.size(-2) == codebook.size(0) && codebook.size(0) >= 1),
                  "softdimo::", kName, ": a codebook [G, V, D] needs logits [..., G, V]");
}

inline void set_mask(SoftEmbeddingCall& call, const Tensor& logits, const Shape& shape, const Tensor& mask,
                     const OptionalTensor& mask_embedding) {
  SoftEmbeddingParams& p = call.params;
  check_device(kName, "mask", mask, logits);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "softdimo::", kName, ": mask must be bool");
  STD_TORCH_CHECK(mask_embedding.has_value() && mask_embedding->numel() == p.groups * p.width, "softdimo::", kName,
                  ": mask needs a mask_embedding that fits the codebook");
  check_device(kName, "mask_embedding", *mask_embedding, logits);
  const RowList masks = row_values(kName, "mask", mask, shape, ScalarType::Bool);
  p.mask = call.keep<uint8_t>(masks.tensor);
  p.mask_stride = masks.stride;
  p.mask_embedding = call.keep<void>(torch::stable::contiguous(*mask_embedding));
  p.mask_embedding_type = dtype_of(kName, "mask_embedding", *mask_embedding);
}

inline void set_noise(SoftEmbeddingCall& call, const Tensor& logits, const Shape& shape, const Tensor& seed,
                      const OptionalTensor& row_ids) {
  check_device(kName, "seed", seed, logits);
  STD_TORCH_CHECK(seed.numel() == 2 && seed.scalar_type() == ScalarType::Long, "softdimo::", kName,
                  ": seed must be int64 [2]");
  call.params.seed = call.keep<int64_t>(torch::stable::contiguous(seed));
  if (!row_ids.has_value()) return;
  check_device(kName, "row_ids", *row_ids, logits);
  STD_TORCH_CHECK(row_ids->scalar_type() == ScalarType::Long, "softdimo::", kName, ": row_ids must be int64");
  const RowList ids = row_values(kName, "row_ids", *row_ids, shape, ScalarType::Long);
  call.params.row_ids = call.keep<int64_t>(ids.tensor);
  call.params.row_ids_stride = ids.stride;
}

}  // namespace soft_embedding_binding

// Checks the arguments and lays them out. The caller holds a DeviceGuard.
inline SoftEmbeddingCall prepare_soft_embedding(const Tensor& logits, const Tensor& codebook, double temperature,
                                                const OptionalTensor& row_temperature, const OptionalTensor& mask,
                                                const OptionalTensor& mask_embedding, const OptionalTensor& seed,
                                                const OptionalTensor& row_ids, bool high_precision) {
  using namespace soft_embedding_binding;
  check_codebook(logits, codebook);
  const Shape shape = leading_shape(logits);
  const RowList rows = logits_rows(logits, shape);
  SoftEmbeddingCall call;
  SoftEmbeddingParams& p = call.params;
  p.logits = call.keep<void>(rows.tensor);
  p.logits_type = dtype_of(kName, "logits", logits);
  p.rows = product(shape);
  p.groups = codebook.dim() == 3 ? codebook.size(0) : 1;
  p.vocabulary = logits.size(-1);
  p.row_stride = rows.stride;
  p.codebook = call.keep<void>(codebook);
  p.codebook_type = dtype_of(kName, "codebook", codebook);
  p.width = codebook.size(-1);
  p.codebook_stride[0] = codebook.dim() == 3 ? codebook.stride(0) : 0;
  p.codebook_stride[1] = codebook.stride(-2);
  p.codebook_stride[2] = codebook.stride(-1);
  p.high_precision = high_precision;
  p.temperature = static_cast<float>(temperature);
  if (row_temperature.has_value()) {
    check_device(kName, "row_temperature", *row_temperature, logits);
    const RowList values = row_values(kName, "row_temperature", *row_temperature, shape, ScalarType::Float);
    p.row_temperature = call.keep<float>(values.tensor);
    p.row_temperature_stride = values.stride;
  }
  if (mask.has_value()) set_mask(call, logits, shape, *mask, mask_embedding);
  if (seed.has_value()) set_noise(call, logits, shape, *seed, row_ids);
  return call;
}

}  // namespace softdimo::cuda
