// masked_cross_entropy on CPUs: allocation, layout, threads, reduction.

#include "softdimo/cpu/masked_cross_entropy.h"

#include "bind_cpu/tensors.h"

namespace softdimo::cpu {
namespace {

// A call with everything it points at.
struct Prepared {
  CrossEntropy call{};
  int64_t rows;
  ScalarType compute;
  std::vector<Tensor> kept;

  const void* keep(Tensor tensor) {
    kept.push_back(std::move(tensor));
    return kept.back().const_data_ptr();
  }
};

Prepared prepare(const Tensor& logits, const Tensor& targets, const OptionalTensor& mask, double smoothing) {
  check_rows(logits, mask);
  Prepared prepared;
  prepared.rows = product(leading_shape(logits));
  STD_TORCH_CHECK(targets.is_cpu() && targets.numel() == prepared.rows && targets.scalar_type() == ScalarType::Long,
                  "softdimo: targets do not fit the logits");
  prepared.compute = is_double(logits) ? ScalarType::Double : ScalarType::Float;
  CrossEntropy& c = prepared.call;
  c.logits = prepared.keep(walkable(logits, &c.logits_rows));
  c.logits_type = dtype_of(logits);
  c.vocabulary = logits.size(-1);
  c.targets = static_cast<const int64_t*>(prepared.keep(as_contiguous(targets)));
  if (mask.has_value()) c.mask = static_cast<const bool*>(prepared.keep(as_contiguous(*mask)));
  c.smoothing = smoothing;
  return prepared;
}

// What a reduction divides the sum of the rows' losses by.
double divisor(const Prepared& prepared, const std::string& reduction) {
  if (reduction != "mean") return 1;
  int64_t count = 0;
  for (int64_t n = 0; n < prepared.rows; ++n) count += prepared.call.counts(n);
  return static_cast<double>(std::max<int64_t>(count, 1));
}

std::tuple<Tensor, Tensor, Tensor> masked_cross_entropy(const Tensor& logits, const Tensor& targets,
                                                        const OptionalTensor& mask, double label_smoothing,
                                                        std::string reduction) {
  const Prepared prepared = prepare(logits, targets, mask, label_smoothing);
  const Shape shape = leading_shape(logits);
  Tensor losses = output(logits, shape, ScalarType::Double);
  Tensor row_max = output(logits, shape, prepared.compute), row_rest = output(logits, shape, prepared.compute);
  const CrossEntropyForward job{prepared.call, static_cast<double*>(losses.mutable_data_ptr()),
                                row_max.mutable_data_ptr(), row_rest.mutable_data_ptr()};
  const CrossEntropyTable& table = SOFTDIMO_TABLE(masked_cross_entropy_table);
  const auto kernel = is_double(logits) ? table.float64.forward : table.float32.forward;
  parallel_entries(prepared.rows, job.call.vocabulary, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  if (reduction == "none") return {torch::stable::to(losses, prepared.compute), row_max, row_rest};
  double total = 0;
  for (int64_t n = 0; n < prepared.rows; ++n) total += job.loss[n];
  Tensor loss = output(logits, {}, ScalarType::Double);
  *static_cast<double*>(loss.mutable_data_ptr()) = total / divisor(prepared, reduction);
  return {torch::stable::to(loss, prepared.compute), row_max, row_rest};
}

Tensor masked_cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& targets,
                                     const OptionalTensor& mask, double label_smoothing, std::string reduction,
                                     const Tensor& row_max, const Tensor& row_rest) {
  const Prepared prepared = prepare(logits, targets, mask, label_smoothing);
  const bool by_row = reduction == "none";
  STD_TORCH_CHECK(grad.numel() == (by_row ? prepared.rows : 1) && row_max.numel() == prepared.rows &&
                      row_max.scalar_type() == prepared.compute && row_rest.numel() == prepared.rows &&
                      row_rest.scalar_type() == prepared.compute,
                  "softdimo: the saved tensors do not fit the logits");
  const Tensor upstream = as_contiguous(grad, prepared.compute);
  const Tensor tops = as_contiguous(row_max), rests = as_contiguous(row_rest);
  Tensor dlogits = output(logits, leading_shape(logits, 0), logits.scalar_type());
  const CrossEntropyBackward job{prepared.call, tops.const_data_ptr(), rests.const_data_ptr(),
                                 upstream.const_data_ptr(), by_row ? 1 : 0, divisor(prepared, reduction),
                                 dlogits.mutable_data_ptr()};
  const CrossEntropyTable& table = SOFTDIMO_TABLE(masked_cross_entropy_table);
  const auto kernel = is_double(logits) ? table.float64.backward : table.float32.backward;
  parallel_entries(prepared.rows, job.call.vocabulary, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&masked_cross_entropy));
  m.impl("masked_cross_entropy_backward", TORCH_BOX(&masked_cross_entropy_backward));
}

}  // namespace softdimo::cpu
