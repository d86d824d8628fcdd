// sample_tokens on CPUs: allocation, layout, threads.

#include "softdimo/cpu/sample_tokens.h"

#include "bind_cpu/tensors.h"

namespace softdimo::cpu {
namespace {

const SampleTokensTable& sample_tokens_table() { return SOFTDIMO_TABLE(sample_tokens_table); }

// One temperature per row; a row whose temperature is not positive and finite gets no token.
template <class T>
Tensor finite_temperatures(const Tensor& logits, const Tensor& temperature, ScalarType compute) {
  Tensor rows = torch::stable::new_empty(logits, leading_shape(logits), compute);
  torch::stable::copy_(rows, temperature);  // broadcasts, or refuses
  T* value = static_cast<T*>(rows.mutable_data_ptr());
  for (int64_t n = 0; n < rows.numel(); ++n) {
    if (!(value[n] > 0 && value[n] <= std::numeric_limits<T>::max())) value[n] = std::numeric_limits<T>::quiet_NaN();
  }
  return rows;
}

// A number that is positive in T too.
template <class T>
double positive_temperature(double value) {
  return std::max(usable_temperature<T>(value), std::numeric_limits<T>::min());
}

void check(const Tensor& logits, const std::optional<int64_t>& top_k, const Tensor& seed,
           const OptionalTensor& row_ids) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() >= 1 && logits.size(-1) > 0,
                  "softdimo: expected logits [..., V] on the CPU");
  STD_TORCH_CHECK(!top_k.has_value() || *top_k > 0, "softdimo: top_k must be at least 1");
  STD_TORCH_CHECK(seed.is_cpu() && seed.numel() == 2 && seed.scalar_type() == ScalarType::Long,
                  "softdimo: seed must be int64 [2]");
  STD_TORCH_CHECK(!row_ids.has_value() || (row_ids->numel() == product(leading_shape(logits)) && row_ids->is_cpu() &&
                                           row_ids->scalar_type() == ScalarType::Long),
                  "softdimo: row_ids do not fit the logits");
}

std::tuple<Tensor, Tensor> sample_tokens(const Tensor& logits, double temperature,
                                         const OptionalTensor& row_temperature, std::optional<int64_t> top_k,
                                         std::optional<double> top_p, const Tensor& seed,
                                         const OptionalTensor& row_ids, bool log_prob) {
  check(logits, top_k, seed, row_ids);
  const bool wide = is_double(logits) || is_double(row_temperature);
  const ScalarType compute = wide ? ScalarType::Double : ScalarType::Float;
  const Shape rows = leading_shape(logits);
  Tensor tokens = torch::stable::new_empty(logits, rows, ScalarType::Long);
  Tensor found = torch::stable::new_empty(logits, log_prob ? rows : Shape{0}, compute);
  SampleTokens s{};
  s.rows = product(rows);
  s.vocabulary = logits.size(-1);
  s.logits_type = dtype_of(logits);
  const Tensor walked = walkable(logits, &s.logits_rows);
  s.logits = walked.const_data_ptr();
  s.temperature = wide ? positive_temperature<double>(temperature) : positive_temperature<float>(temperature);
  Tensor temperatures = logits;
  if (row_temperature.has_value()) {
    temperatures = wide ? finite_temperatures<double>(logits, *row_temperature, compute)
                        : finite_temperatures<float>(logits, *row_temperature, compute);
    s.row_temperature = temperatures.const_data_ptr();
  }
  s.top_k = top_k.value_or(0);
  s.top_p = top_p.value_or(1.0);
  const Tensor pair = as_contiguous(seed);
  s.seed = static_cast<uint64_t>(static_cast<const int64_t*>(pair.const_data_ptr())[0]);
  s.offset = static_cast<uint32_t>(static_cast<const int64_t*>(pair.const_data_ptr())[1]);
  const Tensor numbers = row_ids.has_value() ? as_contiguous(*row_ids) : pair;
  if (row_ids.has_value()) s.row_ids = static_cast<const int64_t*>(numbers.const_data_ptr());
  s.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  s.log_prob = log_prob ? found.mutable_data_ptr() : nullptr;

  const SampleTokensKernels& kernels = wide ? sample_tokens_table().float64 : sample_tokens_table().float32;
  constexpr int64_t kTaskEntries = 16384;  // less work than this is not worth a thread
  if (s.rows > 0) {
    torch::stable::parallel_for(0, s.rows, std::max<int64_t>(kTaskEntries / s.vocabulary, 1),
                                [&](int64_t begin, int64_t end) { kernels.draw(s, begin, end); });
  }
  return {tokens, found};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace softdimo::cpu
