// token_statistics on CPUs: allocation, layout, threads.

#include "softdimo/cpu/token_statistics.h"

#include "bind_cpu/tensors.h"

namespace softdimo::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> token_statistics(const Tensor& logits, double temperature,
                                                    const OptionalTensor& row_temperature,
                                                    const OptionalTensor& mask) {
  const Shape shape = leading_shape(logits);
  const int64_t rows = product(shape);
  check_rows(logits, mask);
  const bool wide = is_double(logits) || is_double(row_temperature);
  const ScalarType compute = wide ? ScalarType::Double : ScalarType::Float;

  TokenStatistics job{};
  const Tensor kept = walkable(logits, &job.logits_rows);
  job.logits = kept.const_data_ptr();
  job.logits_type = dtype_of(logits);
  job.vocabulary = logits.size(-1);
  job.temperature = wide ? usable_temperature<double>(temperature) : usable_temperature<float>(temperature);
  OptionalTensor temperatures, counted;
  if (row_temperature.has_value()) {
    temperatures = wide ? row_temperatures<double>(logits, *row_temperature, compute)
                        : row_temperatures<float>(logits, *row_temperature, compute);
    job.row_temperature = temperatures->const_data_ptr();
  }
  if (mask.has_value()) {
    counted = as_contiguous(*mask);
    job.mask = static_cast<const bool*>(counted->const_data_ptr());
  }
  Tensor log_normalizer = output(logits, shape, compute), entropy = output(logits, shape, compute),
         max_prob = output(logits, shape, compute);
  job.log_normalizer = log_normalizer.mutable_data_ptr();
  job.entropy = entropy.mutable_data_ptr();
  job.max_prob = max_prob.mutable_data_ptr();
  const TokenStatisticsTable& table = SOFTDIMO_TABLE(token_statistics_table);
  parallel_entries(rows, job.vocabulary, [&](int64_t begin, int64_t end) {
    (wide ? table.float64 : table.float32)(job, begin, end);
  });
  return {log_normalizer, entropy, max_prob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) { m.impl("token_statistics", TORCH_BOX(&token_statistics)); }

}  // namespace softdimo::cpu
