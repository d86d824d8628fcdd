// linear_soft_embedding on CPUs: allocation, layout, threads, and the loop over the blocks of the backward.

#include "bind_cpu/linear_soft_embedding_call.h"

#include <cstring>

namespace softdimo::cpu {
namespace {

// Scratch that a call may hold for each of its threads.
constexpr int64_t kThreadBytes = int64_t{4} << 20;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t thread_count() { return std::max<int64_t>(torch::stable::get_num_threads(), 1); }

// ---------------------------------------------------------------------------------------------------
// forward

// Rows of one task: its scratch fits a thread's share, and threads have equally many blocks. A row's result does not
// depend on its block.
int64_t forward_block_rows(const Prepared& prepared) {
  const LinearSoftEmbedding& s = prepared.call;
  const int64_t size = prepared.size(), sum = prepared.sum_size(), factor = s.half ? 2 : size;
  const int64_t hidden = round_up(s.weight.columns, kRowUnit), width = round_up(s.codebook.columns, kRowUnit);
  const int64_t copy = s.half ? 2 * (s.slice + kRowUnit) : sum > size ? sum * s.slice : 0;
  const int64_t row = factor * hidden + size * (s.slice + 8) + sum * (width + 16) + copy;
  const int64_t tables = s.slice * (factor * (hidden + kRowUnit) + (s.half ? 2 : sum) * width + size * 32) +
                         size * kRowUnit * hidden;
  const int64_t most = std::clamp<int64_t>((kThreadBytes - tables) / row / kRowUnit * kRowUnit, kRowUnit, 448);
  const int64_t blocks = s.groups * ((s.positions + most - 1) / most), threads = thread_count();
  const int64_t rounds = std::max<int64_t>(round_up(blocks, threads) / s.groups, 1);
  return std::min(most, std::max(round_up((s.positions + rounds - 1) / rounds, kRowUnit / 2), kRowUnit));
}

// keep: 0 nothing, 1 what a backward needs that computes the logits again, 2 the logits too.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_soft_embedding(
    const Tensor& hidden, const Tensor& weight, const Tensor& codebook, const OptionalTensor& bias, double temperature,
    const OptionalTensor& row_temperature, const OptionalTensor& mask, const OptionalTensor& mask_embedding,
    bool high_precision, int64_t keep) {
  const Prepared prepared =
      prepare(hidden, weight, codebook, bias, temperature, row_temperature, mask, mask_embedding, high_precision);
  const LinearSoftEmbedding& s = prepared.call;
  const auto kept = [&](bool wanted, const Shape& shape) {
    return wanted ? output(hidden, shape, prepared.compute) : torch::stable::new_empty(hidden, {0}, prepared.compute);
  };
  const auto pointer = [](Tensor& tensor, bool wanted) { return wanted ? tensor.mutable_data_ptr() : nullptr; };
  const bool keeps_soft = keep > 0 && codebook.scalar_type() != prepared.compute;
  Tensor value = output(codebook, with(prepared.rows, s.codebook.columns), codebook.scalar_type());
  Tensor logits = kept(keep > 1, {s.groups, s.vocabulary, s.positions});
  Tensor row_max = kept(keep > 0, prepared.rows), row_sum = kept(keep > 0, prepared.rows);
  Tensor soft = kept(keeps_soft, with(prepared.rows, s.codebook.columns));
  const int64_t block = forward_block_rows(prepared);
  const LinearForward job{s, block, value.mutable_data_ptr(), pointer(logits, keep > 1), pointer(row_max, keep > 0),
                          pointer(row_sum, keep > 0), pointer(soft, keeps_soft)};
  parallel(s.groups * ((s.positions + block - 1) / block),
           [&](int64_t begin, int64_t end) { prepared.kernels.forward(job, begin, end); });
  return {value, logits, row_max, row_sum, soft};
}

// ---------------------------------------------------------------------------------------------------
// backward

// Bytes of scratch for blocks of `block` rows on `threads` threads, whatever gradients are wanted.
int64_t block_bytes(const Prepared& prepared, int64_t block, int64_t threads) {
  const LinearSoftEmbedding& s = prepared.call;
  const int64_t size = prepared.size(), sum = prepared.sum_size(), stride = block + 16, groups = s.groups;
  const int64_t factor = s.half ? 2 : size, sum_factor = s.half ? 2 : sum;
  const int64_t hidden = round_up(s.weight.columns, kRowUnit), width = round_up(s.codebook.columns, kRowUnit);
  const int64_t slices = s.slices();
  const int64_t shared = factor * block * (2 * hidden + groups * width) + sum_factor * block * groups * width +
                         size * stride * groups * (s.vocabulary + 4 + 5 * slices) + 8 * stride * groups * slices;
  const int64_t copy_of_p = s.half ? 2 : sum > size ? sum : 0;
  const int64_t slice = s.slice * (factor * (std::max(hidden, width) + 32) + (2 * size + copy_of_p) * (stride + 32));
  const int64_t columns = factor * s.slice * kColumnBlock + size * block * (kColumnBlock + 16);
  const int64_t copy = s.mask != nullptr && groups > 1 ? size * block * hidden : 0;
  return shared + threads * std::max({slice, columns, copy});
}

struct Blocks {
  int64_t rows;     // most rows of a block
  int64_t chain;    // by shapes alone, so that sums over rows form the same tree on any machine
  int64_t product;  // rows of a product of bfloat16: a chain, or the block where every cut gives the same sums
};

// Larger blocks read and write the tables less often. Where the logits were kept memory is no concern: scratch of
// their size, within kKeptBytes.
Blocks backward_blocks(const Prepared& prepared, bool kept) {
  const int64_t threads = thread_count(), positions = prepared.call.positions;
  constexpr int64_t kMostRows = 1024, kKeptBytes = int64_t{32} << 20;
  const int64_t logits = prepared.row_count() * prepared.call.vocabulary * prepared.size();
  const int64_t budget = std::max(threads * kThreadBytes, kept ? std::min(logits, kKeptBytes) : 0);
  const bool half = prepared.call.half, free_cuts = half && linear_soft_embedding_table().free_cuts;
  const int64_t least = half ? kRowUnit : kRowUnit / 2;
  int64_t chain = free_cuts ? kRowUnit : 3 * kRowUnit;
  while (chain > least && block_bytes(prepared, chain, 1) > kThreadBytes) {
    chain -= chain > kRowUnit ? kRowUnit : kRowUnit / 2;
  }
  int64_t rows = chain;
  while (rows < positions && rows + chain <= kMostRows &&
         block_bytes(prepared, rows + chain, threads) <= budget) {
    rows += chain;
  }
  return {rows, chain, free_cuts ? rows : chain};
}

// Sums of a table's gradient: [G, V, columns rounded up], in the result itself where that is the same.
struct TableGradient {
  Tensor result, sums;
  int64_t row = 0;

  TableGradient(bool wanted, const Tensor& table, ScalarType type, const Tensor& like)
      : result(nothing(like)), sums(nothing(like)) {
    if (!wanted) return;
    row = round_up(table.size(-1), kRowUnit);
    result = output(table, leading_shape(table, 0), table.scalar_type());
    const bool same = row == table.size(-1) && type == table.scalar_type();
    sums = same ? result : output(table, with(leading_shape(table), row), type);
  }

  void* pointer(bool wanted) { return wanted ? sums.mutable_data_ptr() : nullptr; }

  // After the last block, or without one.
  void finish(bool empty, bool half, const LinearSoftEmbeddingKernels& kernels) {
    if (row == 0) return;
    const int64_t bytes = sums.numel() * static_cast<int64_t>(sums.element_size());
    if (empty) std::memset(sums.mutable_data_ptr(), 0, static_cast<size_t>(bytes));
    if (sums.mutable_data_ptr() == result.mutable_data_ptr()) return;
    const bool wide = sums.scalar_type() == ScalarType::Double;
    const int64_t width = half ? kRowUnit : row;
    const TableSums layout{sums.const_data_ptr(), wide, row / width, result.size(-2), width};
    parallel_rows(result.numel() / result.size(-1), [&](int64_t begin, int64_t end) {
      kernels.narrow_sums(layout, result.size(-1), result.mutable_data_ptr(), dtype_of(result), begin, end);
    });
  }
};

// The bias's gradient: written directly where every entry has a logit of its own, else summed in double.
struct BiasSums {
  Tensor sums;
  bool direct = false, apart = false;  // apart: no two entries of the vocabulary share a sum

  BiasSums(bool wanted, const Prepared& prepared, const OptionalTensor& bias, LinearBackward& job)
      : sums(torch::stable::new_empty(prepared.kept[0], {0}, ScalarType::Double)) {
    if (!wanted) return;
    const LinearSoftEmbedding& s = prepared.call;
    direct = bias->numel() == prepared.row_count() * s.vocabulary;
    sums = torch::stable::new_zeros(*bias, leading_shape(*bias, 0), direct ? bias->scalar_type() : ScalarType::Double);
    apart = s.vocabulary == 1 || (bias->dim() > 0 && bias->size(-1) == s.vocabulary);
    STD_TORCH_CHECK(layout_rows(sums, prepared.rows, std::min<int64_t>(sums.dim(), 1), &job.bias_rows),
                    "softdimo: too many broadcast dimensions");
    job.bias_step = bias->dim() > 0 && bias->size(-1) > 1 ? 1 : 0;
    job.bias_direct = direct;
    job.bias_type = dtype_of(*bias);
    job.dbias = sums.mutable_data_ptr();
  }
};

// Scratch that all threads share, sized for blocks of `block` rows.
std::vector<Tensor> share_scratch(const Prepared& prepared, int64_t block, bool dlogits, LinearBackward& job) {
  const LinearSoftEmbedding& s = prepared.call;
  std::vector<Tensor> held;
  const auto scratch = [&](int64_t count, ScalarType type) {
    held.push_back(torch::stable::new_empty(prepared.kept[0], {count}, type));
    return held.back().mutable_data_ptr();
  };
  const ScalarType compute = prepared.compute, factor = s.half ? ScalarType::BFloat16 : compute;
  const ScalarType sum_factor = sums_in_double(s) ? ScalarType::Double : factor;
  const int64_t rows = round_up(block, std::max(job.chain, kRowUnit)), slices = s.slices();
  const int64_t hidden = round_up(s.weight.columns, kRowUnit), width = round_up(s.codebook.columns, kRowUnit);
  job.stride = rows % 128 == 0 ? rows + 16 : rows;
  job.slice_fields = job.dtemperature != nullptr ? 5 : 1;
  job.hidden_columns = scratch(rows * hidden, factor);
  job.hidden_rows = scratch(rows * hidden, factor);
  job.grad_columns = scratch(rows * s.groups * width, factor);
  job.grad_rows = scratch(rows * s.groups * width, sum_factor);
  job.row_state = scratch(4 * s.groups * job.stride, compute);
  job.partials = scratch(slices * job.slice_fields * s.groups * job.stride, compute);
  job.peaks = static_cast<int64_t*>(scratch(slices * s.groups * job.stride, ScalarType::Long));
  job.dlogits_rows = slices * s.slice;
  job.dlogits = scratch(dlogits ? s.groups * job.dlogits_rows * job.stride : 0, compute);
  return held;
}

bool masked_everywhere(const LinearSoftEmbedding& s, int64_t position) {
  for (int64_t group = 0; group < s.groups; ++group) {
    if (s.mask == nullptr || !s.mask[position * s.groups + group]) return false;
  }
  return true;
}

void run_block(const LinearSoftEmbeddingKernels& kernels, const LinearBackward& job, bool bias_apart) {
  const LinearSoftEmbedding& s = job.call;
  const auto run = [&](void (*kernel)(const LinearBackward&, int64_t, int64_t), int64_t tasks) {
    parallel(tasks, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  };
  const int64_t slices = s.groups * s.slices();
  run(kernels.load_rows, (job.count + kRowUnit - 1) / kRowUnit);
  run(kernels.slices, slices);
  if (!job.wants_dlogits()) return;
  parallel_rows(s.groups * job.count, [&](int64_t begin, int64_t end) { kernels.finish_rows(job, begin, end); });
  if (job.dbias != nullptr && bias_apart) {
    parallel_rows(s.vocabulary, [&](int64_t begin, int64_t end) { kernels.bias_gradient(job, begin, end); });
  } else if (job.dbias != nullptr) {
    kernels.bias_gradient(job, 0, s.vocabulary);
  }
  run(kernels.weight_gradient, slices);
  if (job.dhidden != nullptr) run(kernels.hidden_gradient, (s.weight.columns + kRowUnit - 1) / kRowUnit);
}

// Blocks of the positions that count, one after the other. Returns whether there was none.
bool run_blocks(const Prepared& prepared, LinearBackward& job, bool bias_apart) {
  const LinearSoftEmbedding& s = prepared.call;
  const Blocks blocks = backward_blocks(prepared, job.logits != nullptr);
  const int64_t most = std::min(blocks.rows, std::max<int64_t>(s.positions, 1));
  job.chain = blocks.chain;
  job.product_rows = blocks.product;
  const std::vector<Tensor> held = share_scratch(prepared, most, job.wants_dlogits(), job);
  std::vector<int64_t> position(static_cast<size_t>(blocks.rows));
  job.position = position.data();
  job.first = true;
  const size_t hidden_bytes = static_cast<size_t>(s.weight.columns * size_of(s.hidden.type));
  for (int64_t n = 0; n < s.positions;) {
    job.count = 0;
    for (; n < s.positions && job.count < blocks.rows; ++n) {
      if (!masked_everywhere(s, n)) {
        position[static_cast<size_t>(job.count++)] = n;
      } else if (job.dhidden != nullptr) {
        std::memset(static_cast<char*>(job.dhidden) + static_cast<size_t>(n) * hidden_bytes, 0, hidden_bytes);
      }
    }
    if (job.count == 0) continue;
    run_block(prepared.kernels, job, bias_apart);
    job.first = false;
  }
  return job.first;
}

// Sums over the dimensions along which the temperature was broadcast: in float64 and in row order.
template <class T>
Tensor temperature_gradient(const Tensor& slopes, const Shape& shape, const Tensor& temperature) {
  Tensor sums = torch::stable::new_zeros(temperature, leading_shape(temperature, 0), ScalarType::Double);
  Rows rows;
  STD_TORCH_CHECK(layout_rows(sums, shape, 0, &rows), "softdimo: too many broadcast dimensions");
  double* sum = static_cast<double*>(sums.mutable_data_ptr());
  const T* slope = static_cast<const T*>(slopes.const_data_ptr());
  for (int64_t n = 0; n < slopes.numel(); ++n) sum[rows.offset(n)] += static_cast<double>(slope[n]);
  return torch::stable::to(sums, temperature.scalar_type());
}

Tensor mask_embedding_gradient(const Prepared& prepared, const RowMatrix& grad, const Tensor& mask_embedding) {
  const LinearSoftEmbedding& s = prepared.call;
  Tensor sums = torch::stable::new_zeros(mask_embedding, leading_shape(mask_embedding, 0), ScalarType::Double);
  double* sum = static_cast<double*>(sums.mutable_data_ptr());
  parallel(s.groups * ((s.codebook.columns + kRowUnit - 1) / kRowUnit),
           [&](int64_t begin, int64_t end) { prepared.kernels.mask_gradient(s, grad, sum, begin, end); });
  return torch::stable::to(sums, mask_embedding.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_soft_embedding_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& codebook, const OptionalTensor& bias,
    double temperature, const OptionalTensor& row_temperature, const OptionalTensor& mask,
    const OptionalTensor& mask_embedding, bool high_precision, const OptionalTensor& logits, const Tensor& row_max,
    const Tensor& row_sum,
    const Tensor& soft, std::vector<bool> wanted) {
  Prepared prepared =
      prepare(hidden, weight, codebook, bias, temperature, row_temperature, mask, mask_embedding, high_precision);
  const LinearSoftEmbedding& s = prepared.call;
  const int64_t rows = prepared.row_count();
  const auto fits = [&](const Tensor& tensor, int64_t count) {
    return tensor.numel() == count && tensor.scalar_type() == prepared.compute;
  };
  STD_TORCH_CHECK(wanted.size() == 6 && grad.numel() == rows * s.codebook.columns && fits(row_max, rows) &&
                      fits(row_sum, rows) && fits(soft, rows * s.codebook.columns) &&
                      (!logits.has_value() || fits(*logits, rows * s.vocabulary)),
                  "softdimo: the saved tensors do not fit the hidden states");
  LinearBackward job{};
  job.grad = prepared.matrix(grad, prepared.rows);
  job.row_max = prepared.keep<void>(as_contiguous(row_max));
  job.row_sum = prepared.keep<void>(as_contiguous(row_sum));
  job.soft = prepared.keep<void>(as_contiguous(soft));
  job.logits = logits.has_value() ? prepared.keep<void>(as_contiguous(*logits)) : nullptr;
  job.call = s;

  Tensor dhidden = wanted[0] ? output(hidden, leading_shape(hidden, 0), hidden.scalar_type()) : nothing(hidden);
  TableGradient dweight(wanted[1], weight, prepared.compute, hidden);
  TableGradient dcodebook(wanted[2], codebook, sums_in_double(s) ? ScalarType::Double : prepared.compute, hidden);
  const BiasSums dbias(wanted[3] && bias.has_value(), prepared, bias, job);
  const bool wants_temperature = wanted[4] && row_temperature.has_value();
  Tensor slopes = torch::stable::new_zeros(hidden, {wants_temperature ? rows : 0}, prepared.compute);
  job.dhidden = wanted[0] ? dhidden.mutable_data_ptr() : nullptr;
  job.dweight = dweight.pointer(wanted[1]);
  job.weight_row = dweight.row;
  job.dcodebook = dcodebook.pointer(wanted[2]);
  job.codebook_row = dcodebook.row;
  job.dtemperature = wants_temperature ? slopes.mutable_data_ptr() : nullptr;
  if (job.wants_dlogits() || wanted[2]) {
    const bool empty = run_blocks(prepared, job, dbias.apart);
    dweight.finish(empty, s.half, prepared.kernels);
    dcodebook.finish(empty, s.half, prepared.kernels);
  }
  Tensor dtemperature = nothing(hidden), dmask = nothing(hidden), bias_result = nothing(hidden);
  if (wanted[3] && bias.has_value()) bias_result = torch::stable::to(dbias.sums, bias->scalar_type());
  if (wants_temperature) {
    dtemperature = prepared.compute == ScalarType::Double
                       ? temperature_gradient<double>(slopes, prepared.rows, *row_temperature)
                       : temperature_gradient<float>(slopes, prepared.rows, *row_temperature);
  }
  if (wanted[5] && mask.has_value()) dmask = mask_embedding_gradient(prepared, job.grad, *mask_embedding);
  return {dhidden, dweight.result, dcodebook.result, bias_result, dtemperature, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) {
  m.impl("linear_soft_embedding", TORCH_BOX(&linear_soft_embedding));
  m.impl("linear_soft_embedding_backward", TORCH_BOX(&linear_soft_embedding_backward));
}

}  // namespace softdimo::cpu
