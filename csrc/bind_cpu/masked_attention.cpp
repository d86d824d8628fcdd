// masked_attention on CPUs: allocation, layout, threads.

#include "bind_cpu/tensors.h"
#include "softdimo/cpu/masked_attention.h"

namespace softdimo::cpu {
namespace {

const MaskedAttentionTable& masked_attention_table() { return SOFTDIMO_PRODUCT_TABLE(masked_attention_table); }

bool has_bf16_products() { return masked_attention_table().bfloat16.forward != nullptr; }

// A call with the tensors it points at.
struct Prepared {
  MaskedAttention call{};
  ScalarType compute;
  MaskedAttentionKernels kernels;
  std::vector<Tensor> kept;

  // The tensor itself where its last dimension is contiguous, else one copy.
  Heads heads(const Tensor& tensor) {
    kept.push_back(tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : as_contiguous(tensor));
    const Tensor& own = kept.back();
    return {own.const_data_ptr(), dtype_of(own), {own.stride(0), own.stride(1), own.stride(2)}};
  }
};

void check_shapes(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_mask,
                  const OptionalTensor& query_mask) {
  STD_TORCH_CHECK(query.is_cpu() && key.is_cpu() && value.is_cpu(), "softdimo: expected CPU tensors");
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "softdimo: expected [B, H, L, d]");
  STD_TORCH_CHECK(key.size(0) == query.size(0) && key.size(1) == query.size(1) && key.size(3) == query.size(3) &&
                      query.size(3) > 0,
                  "softdimo: key does not fit the query");
  STD_TORCH_CHECK(value.size(0) == key.size(0) && value.size(1) == key.size(1) && value.size(2) == key.size(2) &&
                      value.size(3) > 0,
                  "softdimo: value does not fit the key");
  const auto fits = [&](const OptionalTensor& mask, int64_t length) {
    return !mask.has_value() || (mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                                 mask->size(0) == query.size(0) && mask->size(1) == length);
  };
  STD_TORCH_CHECK(fits(key_mask, key.size(2)) && fits(query_mask, query.size(2)), "softdimo: a mask does not fit");
}

RowMask row_mask(const OptionalTensor& mask) {
  if (!mask.has_value()) return {nullptr, {0, 0}};
  return {static_cast<const bool*>(mask->const_data_ptr()), {mask->stride(0), mask->stride(1)}};
}

Prepared prepare(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_mask,
                 const OptionalTensor& query_mask, double scale) {
  check_shapes(query, key, value, key_mask, query_mask);
  Prepared prepared;
  const bool wide = is_double(query) || is_double(key) || is_double(value);
  prepared.compute = wide ? ScalarType::Double : ScalarType::Float;
  const bool half = has_bf16_products() && query.scalar_type() == ScalarType::BFloat16 &&
                    key.scalar_type() == ScalarType::BFloat16 && value.scalar_type() == ScalarType::BFloat16;
  prepared.kernels = half   ? masked_attention_table().bfloat16
                     : wide ? masked_attention_table().float64
                            : masked_attention_table().float32;
  MaskedAttention& a = prepared.call;
  a.batch = query.size(0);
  a.heads = query.size(1);
  a.queries = query.size(2);
  a.keys = key.size(2);
  a.width = query.size(3);
  a.value_width = value.size(3);
  a.scale = scale;
  a.query = prepared.heads(query);
  a.key = prepared.heads(key);
  a.value = prepared.heads(value);
  a.key_mask = row_mask(key_mask);
  a.query_mask = row_mask(query_mask);
  return prepared;
}

// Heads whole where there are enough of them for every thread; a row's result does not depend on its chunk.
int64_t chunk_rows(const MaskedAttention& a) {
  constexpr int64_t kLeast = 96, kMost = 960;
  const int64_t heads = std::max<int64_t>(a.batch * a.heads, 1);
  const int64_t chunks = (4 * static_cast<int64_t>(torch::stable::get_num_threads()) + heads - 1) / heads;
  return std::clamp<int64_t>((a.queries / chunks + kLeast - 1) / kLeast * kLeast, kLeast, kMost);
}

std::tuple<Tensor, Tensor, Tensor> masked_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const OptionalTensor& key_mask, const OptionalTensor& query_mask,
                                                    double scale) {
  const Prepared prepared = prepare(query, key, value, key_mask, query_mask, scale);
  const MaskedAttention& a = prepared.call;
  const Shape rows = leading_shape(query);
  Tensor out = output(query, with(rows, a.value_width), query.scalar_type());
  Tensor row_max = output(query, rows, prepared.compute), row_sum = output(query, rows, prepared.compute);
  const AttentionForward job{a, chunk_rows(a), out.mutable_data_ptr(), row_max.mutable_data_ptr(),
                             row_sum.mutable_data_ptr()};
  parallel(a.batch * a.heads * ((a.queries + job.chunk - 1) / job.chunk),
           [&](int64_t begin, int64_t end) { prepared.kernels.forward(job, begin, end); });
  return {out, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_mask,
    const OptionalTensor& query_mask, double scale, const Tensor& row_max, const Tensor& row_sum,
    std::vector<bool> wanted) {
  Prepared prepared = prepare(query, key, value, key_mask, query_mask, scale);
  const MaskedAttention& a = prepared.call;
  const int64_t rows = a.batch * a.heads * a.queries;
  const auto saved = [&](const Tensor& tensor) {
    return tensor.is_cpu() && tensor.numel() == rows && tensor.scalar_type() == prepared.compute;
  };
  STD_TORCH_CHECK(wanted.size() == 3 && saved(row_max) && saved(row_sum) && grad.is_cpu() && grad.dim() == 4 &&
                      leading_shape(grad) == leading_shape(query) && grad.size(3) == a.value_width,
                  "softdimo: the saved tensors do not fit the query");
  const Tensor tops = as_contiguous(row_max), sums = as_contiguous(row_sum);
  const auto gradient = [&](bool needed, const Tensor& input) {
    return needed ? output(input, leading_shape(input, 0), input.scalar_type()) : nothing(input);
  };
  Tensor dquery = gradient(wanted[0], query), dkey = gradient(wanted[1], key), dvalue = gradient(wanted[2], value);
  const AttentionBackward job{a,
                              prepared.heads(torch::stable::to(grad, query.scalar_type())),
                              tops.const_data_ptr(),
                              sums.const_data_ptr(),
                              wanted[0] ? dquery.mutable_data_ptr() : nullptr,
                              wanted[1] ? dkey.mutable_data_ptr() : nullptr,
                              wanted[2] ? dvalue.mutable_data_ptr() : nullptr};
  parallel(a.batch * a.heads, [&](int64_t begin, int64_t end) { prepared.kernels.backward(job, begin, end); });
  return {dquery, dkey, dvalue};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) {
  m.impl("masked_attention", TORCH_BOX(&masked_attention));
  m.impl("masked_attention_backward", TORCH_BOX(&masked_attention_backward));
}

}  // namespace softdimo::cpu
