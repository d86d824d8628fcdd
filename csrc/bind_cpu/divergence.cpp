// Layout, threads and sums over rows of the divergences on CPUs.

#include "bind_cpu/divergence.h"

namespace softdimo::cpu {
namespace {

const DivergenceTable& divergence_table() { return SOFTDIMO_TABLE(divergence_table); }

void check_shapes(const DivergenceArguments& a) {
  const Shape shape = leading_shape(a.model, 0);
  STD_TORCH_CHECK(a.model.is_cpu() && a.model.dim() >= 1 && a.model.size(-1) > 0, "softdimo: expected CPU logits");
  STD_TORCH_CHECK(a.teacher.is_cpu() && leading_shape(a.teacher, 0) == shape, "softdimo: the logits differ in shape");
  STD_TORCH_CHECK(!a.uncond.has_value() || (a.uncond->is_cpu() && leading_shape(*a.uncond, 0) == shape),
                  "softdimo: the logits differ in shape");
  STD_TORCH_CHECK(!a.mask.has_value() || (a.mask->numel() == product(leading_shape(a.model)) &&
                                          a.mask->scalar_type() == ScalarType::Bool),
                  "softdimo: mask does not fit the logits");
}

LogitRows logit_rows(PreparedDivergence& prepared, const Tensor& logits) {
  LogitRows rows{nullptr, dtype_of(logits), {}};
  prepared.kept.push_back(walkable(logits, &rows.rows));
  rows.data = prepared.kept.back().const_data_ptr();
  return rows;
}

// One value per row, in the given type.
Tensor row_values(const Tensor& logits, const Tensor& values, ScalarType type) {
  Tensor rows = torch::stable::new_empty(logits, leading_shape(logits), type);
  torch::stable::copy_(rows, values);  // broadcasts, or refuses
  return rows;
}

void count_rows(PreparedDivergence& prepared, const DivergenceArguments& a) {
  prepared.count = prepared.call.rows;
  prepared.share.assign(static_cast<size_t>(prepared.call.rows), a.mask.has_value() ? 0.0 : 1.0);
  if (a.mask.has_value()) {
    const Tensor mask = as_contiguous(*a.mask);
    const bool* counts = static_cast<const bool*>(mask.const_data_ptr());
    for (int64_t n = 0; n < prepared.call.rows; ++n) {
      if (!counts[n]) continue;
      prepared.counted.push_back(n);
      prepared.share[static_cast<size_t>(n)] = 1.0;
    }
    prepared.call.counted = prepared.counted.data();
    prepared.count = static_cast<int64_t>(prepared.counted.size());
  }
  if (!a.weight.has_value()) return;
  const Tensor weights = row_values(a.model, *a.weight, ScalarType::Double);
  const double* weight = static_cast<const double*>(weights.const_data_ptr());
  for (size_t n = 0; n < prepared.share.size(); ++n) {
    if (prepared.share[n] != 0) prepared.share[n] = weight[n];
  }
}

void parallel_counted(const PreparedDivergence& prepared, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kLeastEntries = int64_t{1} << 15;
  const int64_t grain = std::max<int64_t>(kLeastEntries / prepared.call.vocabulary, 1), rows = prepared.count;
  if (rows > 0) torch::stable::parallel_for(0, rows, grain, body);
}

// Rows that do not count get zero gradient.
void clear_others(const PreparedDivergence& prepared, const Gradient& out) {
  if (out.data == nullptr || prepared.count == prepared.call.rows) return;
  const int64_t bytes = prepared.call.vocabulary * size_of(out.type);
  std::vector<bool> counts(static_cast<size_t>(prepared.call.rows), false);
  for (int64_t n : prepared.counted) counts[static_cast<size_t>(n)] = true;
  parallel_rows(prepared.call.rows, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (counts[static_cast<size_t>(n)]) continue;
      std::memset(static_cast<char*>(out.data) + n * bytes, 0, static_cast<size_t>(bytes));
    }
  });
}

template <class T>
double tree_sum(const T* values, const std::vector<double>& share) {
  constexpr size_t kBlock = 256;
  double total = 0;
  for (size_t begin = 0; begin < share.size(); begin += kBlock) {
    double sum = 0;
    for (size_t n = begin; n < std::min(begin + kBlock, share.size()); ++n) {
      sum += static_cast<double>(values[n]) * share[n];
    }
    total += sum;
  }
  return total;
}

template <class T>
Tensor upstream_rows(const PreparedDivergence& prepared, const Tensor& like, const Tensor& grad) {
  Tensor rows = row_values(like, grad, prepared.compute);
  T* value = static_cast<T*>(rows.mutable_data_ptr());
  for (size_t n = 0; n < prepared.share.size(); ++n) {
    value[n] = static_cast<T>(static_cast<double>(value[n]) * prepared.share[n]);
  }
  return rows;
}

}  // namespace

PreparedDivergence prepare_divergence(const DivergenceArguments& a, bool wide) {
  check_shapes(a);
  PreparedDivergence prepared;
  wide = wide || is_double(a.teacher) || is_double(a.model) || is_double(a.uncond) || is_double(a.row_guidance) ||
         is_double(a.weight);
  prepared.compute = wide ? ScalarType::Double : ScalarType::Float;
  prepared.kernels = wide ? divergence_table().float64 : divergence_table().float32;
  Divergence& s = prepared.call;
  s.rows = product(leading_shape(a.model));
  s.vocabulary = a.model.size(-1);
  s.teacher = logit_rows(prepared, a.teacher);
  s.model = logit_rows(prepared, a.model);
  s.guidance = a.guidance;
  if (a.uncond.has_value()) s.uncond = logit_rows(prepared, *a.uncond);
  if (a.uncond.has_value() && a.row_guidance.has_value()) {
    prepared.kept.push_back(row_values(a.model, *a.row_guidance, prepared.compute));
    s.row_guidance = prepared.kept.back().const_data_ptr();
  }
  s.teacher_temperature =
      wide ? usable_temperature<double>(a.teacher_temperature) : usable_temperature<float>(a.teacher_temperature);
  s.model_temperature =
      wide ? usable_temperature<double>(a.model_temperature) : usable_temperature<float>(a.model_temperature);
  s.forward_weight = a.forward_weight;
  s.reverse_weight = a.reverse_weight;
  count_rows(prepared, a);
  return prepared;
}

std::tuple<Tensor, Tensor> row_divergences(const PreparedDivergence& prepared) {
  const Tensor& like = prepared.kept.front();
  Tensor values = torch::stable::new_zeros(like, leading_shape(like), prepared.compute);
  Tensor statistics = torch::stable::new_zeros(like, with(leading_shape(like), kRowStatistics), ScalarType::Double);
  const DivergenceForward job{prepared.call, values.mutable_data_ptr(),
                              static_cast<RowStatistics*>(statistics.mutable_data_ptr())};
  parallel_counted(prepared, [&](int64_t begin, int64_t end) { prepared.kernels.forward(job, begin, end); });
  return {values, statistics};
}

Tensor sum_of_shares(const PreparedDivergence& prepared, const Tensor& values) {
  Tensor sum = torch::stable::new_empty(values, {}, prepared.compute);
  if (prepared.compute == ScalarType::Double) {
    *static_cast<double*>(sum.mutable_data_ptr()) =
        tree_sum(static_cast<const double*>(values.const_data_ptr()), prepared.share);
  } else {
    *static_cast<float*>(sum.mutable_data_ptr()) =
        static_cast<float>(tree_sum(static_cast<const float*>(values.const_data_ptr()), prepared.share));
  }
  return sum;
}

std::tuple<Tensor, Tensor, Tensor> divergence_gradients(const PreparedDivergence& prepared,
                                                        const DivergenceArguments& a, const Tensor& grad,
                                                        const Tensor& statistics, const std::vector<bool>& wanted,
                                                        ScalarType model_type) {
  STD_TORCH_CHECK(statistics.numel() == prepared.call.rows * kRowStatistics &&
                      statistics.scalar_type() == ScalarType::Double && wanted.size() == 3,
                  "softdimo: the saved statistics do not fit the logits");
  const Tensor saved = as_contiguous(statistics);
  const Tensor upstream = prepared.compute == ScalarType::Double ? upstream_rows<double>(prepared, a.model, grad)
                                                                 : upstream_rows<float>(prepared, a.model, grad);
  const Shape shape = leading_shape(a.model, 0);
  const auto make = [&](bool needed, ScalarType type) {
    return needed ? output(a.model, shape, type) : nothing(a.model);
  };
  Tensor teacher = make(wanted[0], a.teacher.scalar_type()), model = make(wanted[1], model_type);
  const bool has_uncond = wanted[2] && a.uncond.has_value();
  Tensor uncond = make(has_uncond, has_uncond ? a.uncond->scalar_type() : model_type);
  const auto gradient = [](bool needed, Tensor& out) {
    return Gradient{needed ? out.mutable_data_ptr() : nullptr, dtype_of(out)};
  };
  const DivergenceBackward job{prepared.call,
                               static_cast<const RowStatistics*>(saved.const_data_ptr()),
                               upstream.const_data_ptr(),
                               gradient(wanted[0], teacher),
                               gradient(wanted[1], model),
                               gradient(has_uncond, uncond)};
  for (const Gradient* out : {&job.teacher, &job.model, &job.uncond}) clear_others(prepared, *out);
  parallel_counted(prepared, [&](int64_t begin, int64_t end) { prepared.kernels.backward(job, begin, end); });
  return {teacher, model, uncond};
}

}  // namespace softdimo::cpu
