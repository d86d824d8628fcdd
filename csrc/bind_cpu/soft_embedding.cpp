// soft_embedding on CPUs: allocation, layout, threads.

#include "bind_cpu/tensors.h"
#include "softdimo/soft_embedding.h"

namespace softdimo::cpu {
namespace {

const SoftEmbeddingTable& soft_embedding_table() { return SOFTDIMO_PRODUCT_TABLE(soft_embedding_table); }

// A call with everything it points at.
struct Prepared {
  SoftEmbedding call{};
  ScalarType compute;
  SoftEmbeddingKernels kernels;
  std::vector<Tensor> kept;

  template <class T>
  const T* keep(Tensor tensor) {
    kept.push_back(std::move(tensor));
    return static_cast<const T*>(kept.back().const_data_ptr());
  }
};

void check_shapes(const Tensor& logits, const Tensor& codebook, const OptionalTensor& mask,
                  const OptionalTensor& mask_embedding, const OptionalTensor& row_ids) {
  STD_TORCH_CHECK(logits.is_cpu() && codebook.is_cpu(), "softdimo: expected CPU tensors");
  STD_TORCH_CHECK(logits.dim() >= 1 && (codebook.dim() == 2 || codebook.dim() == 3), "softdimo: bad dimensions");
  STD_TORCH_CHECK(codebook.size(-2) == logits.size(-1) && logits.size(-1) > 0 && codebook.size(-1) > 0,
                  "softdimo: codebook does not fit the logits");
  const int64_t groups = codebook.dim() == 3 ? codebook.size(0) : 1;
  STD_TORCH_CHECK(groups > 0 && (codebook.dim() == 2 || (logits.dim() >= 2 && logits.size(-2) == groups)), "softdimo: groups do not fit");
  const int64_t rows = product(leading_shape(logits));
  STD_TORCH_CHECK(!mask.has_value() || (mask->numel() == rows && mask->scalar_type() == ScalarType::Bool &&
                                        mask_embedding.has_value()),
                  "softdimo: mask does not fit the logits");
  STD_TORCH_CHECK(!mask_embedding.has_value() || mask_embedding->numel() == groups * codebook.size(-1),
                  "softdimo: mask_embedding does not fit the codebook");
  STD_TORCH_CHECK(!row_ids.has_value() || (row_ids->numel() == rows && row_ids->scalar_type() == ScalarType::Long),
                  "softdimo: row_ids do not fit the logits");
}

Prepared prepare(const Tensor& logits, const Tensor& codebook, double temperature,
                 const OptionalTensor& row_temperature, const OptionalTensor& mask,
                 const OptionalTensor& mask_embedding, const OptionalTensor& seed, const OptionalTensor& row_ids) {
  check_shapes(logits, codebook, mask, mask_embedding, row_ids);
  Prepared prepared;
  const bool wide = is_double(logits) || is_double(codebook) || is_double(row_temperature) || is_double(mask_embedding);
  prepared.compute = wide ? ScalarType::Double : ScalarType::Float;
  prepared.kernels = wide ? soft_embedding_table().float64 : soft_embedding_table().float32;

  SoftEmbedding& s = prepared.call;
  s.rows = product(leading_shape(logits));
  s.groups = codebook.dim() == 3 ? codebook.size(0) : 1;
  s.vocabulary = logits.size(-1);
  s.width = codebook.size(-1);
  s.logits_type = dtype_of(logits);
  s.logits = prepared.keep<void>(walkable(logits, &s.logits_rows));
  s.codebook_type = dtype_of(codebook);
  s.codebook = codebook.const_data_ptr();
  s.codebook_stride[0] = codebook.dim() == 3 ? codebook.stride(0) : 0;
  s.codebook_stride[1] = codebook.stride(-2);
  s.codebook_stride[2] = codebook.stride(-1);
  s.temperature = wide ? usable_temperature<double>(temperature) : usable_temperature<float>(temperature);
  if (row_temperature.has_value()) {
    s.row_temperature = prepared.keep<void>(
        wide ? row_temperatures<double>(logits, *row_temperature, prepared.compute)
             : row_temperatures<float>(logits, *row_temperature, prepared.compute));
  }
  if (mask.has_value()) {
    s.mask = prepared.keep<bool>(torch::stable::contiguous(*mask));
    s.mask_embedding =
        prepared.keep<void>(torch::stable::contiguous(torch::stable::to(*mask_embedding, prepared.compute)));
  }
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->numel() == 2 && seed->scalar_type() == ScalarType::Long, "softdimo: seed must be int64 [2]");
    const int64_t* pair = prepared.keep<int64_t>(torch::stable::contiguous(*seed));
    s.noise = true;
    s.seed = static_cast<uint64_t>(pair[0]);
    s.offset = static_cast<uint32_t>(pair[1]);
    if (row_ids.has_value()) s.row_ids = prepared.keep<int64_t>(torch::stable::contiguous(*row_ids));
  }
  Tensor packed = output(logits, {prepared.kernels.packed_size(s.groups, s.vocabulary, s.width)}, prepared.compute);
  parallel_rows(s.rows > 0 ? s.groups * s.vocabulary : 0, [&](int64_t begin, int64_t end) {
    prepared.kernels.pack_codebook(s, packed.mutable_data_ptr(), begin, end);
  });
  s.packed_codebook = prepared.keep<void>(packed);
  return prepared;
}

// Blocks small enough that every thread has a few; a row's result does not depend on its block.
int64_t forward_block_rows(int64_t positions, int64_t groups) {
  const int64_t tasks = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  return std::clamp<int64_t>(positions * groups / std::max<int64_t>(tasks, 1) / 14 * 14, 14, kBlockRows);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_embedding(
    const Tensor& logits, const Tensor& codebook, double temperature, const OptionalTensor& row_temperature,
    const OptionalTensor& mask, const OptionalTensor& mask_embedding, const OptionalTensor& seed,
    const OptionalTensor& row_ids, bool hard) {
  const Prepared prepared =
      prepare(logits, codebook, temperature, row_temperature, mask, mask_embedding, seed, row_ids);
  const SoftEmbedding& s = prepared.call;
  const Shape rows = leading_shape(logits), shape = with(rows, s.width);
  Tensor value = output(codebook, shape, codebook.scalar_type());
  Tensor row_max = output(logits, rows, ScalarType::Double), row_sum = output(logits, rows, prepared.compute);
  const bool keeps_soft = hard || codebook.scalar_type() != prepared.compute;
  Tensor soft = keeps_soft ? output(logits, shape, prepared.compute)
                           : torch::stable::new_empty(logits, {0}, prepared.compute);

  const int64_t positions = s.rows / s.groups, block = forward_block_rows(positions, s.groups);
  const Forward job{s, hard, block, value.mutable_data_ptr(), static_cast<double*>(row_max.mutable_data_ptr()),
                    row_sum.mutable_data_ptr(), keeps_soft ? soft.mutable_data_ptr() : nullptr};
  parallel(s.groups * ((positions + block - 1) / block),
           [&](int64_t begin, int64_t end) { prepared.kernels.forward(job, begin, end); });
  return {value, row_max, row_sum, soft};
}

// How the backward is cut into tasks: by shapes alone, so that sums over rows form the same tree on any machine.
struct Cut {
  int64_t tile, tiles, splits;
};

Cut backward_cut(const SoftEmbedding& s) {
  constexpr int64_t kTasks = 64, kLeastRows = 4 * kBlockRows, kMostPartialBytes = int64_t{32} << 20;
  const int64_t tile = std::min<int64_t>(s.width > 256 ? 128 : kVocabularyChunk, (s.vocabulary + 3) / 4 * 4);
  const int64_t tiles = (s.vocabulary + tile - 1) / tile;
  const int64_t table_bytes = s.groups * s.vocabulary * s.width * static_cast<int64_t>(sizeof(double));
  const int64_t by_rows = s.rows / s.groups / kLeastRows, by_memory = kMostPartialBytes / table_bytes;
  const int64_t splits = std::min({kTasks / (tiles * s.groups), by_rows, by_memory});
  return {tile, tiles, std::max<int64_t>(splits, 1)};
}

Tensor reduced(const Tensor& parts, int64_t count, const Tensor& like) {
  Tensor out = output(like, leading_shape(like, 0), like.scalar_type());
  const bool wide = parts.scalar_type() == ScalarType::Double;
  const SoftEmbeddingKernels& kernels = wide ? soft_embedding_table().float64 : soft_embedding_table().float32;
  const int64_t n = out.numel();
  parallel_rows(n, [&](int64_t begin, int64_t end) {
    kernels.reduce(parts.const_data_ptr(), count, n, out.mutable_data_ptr(), dtype_of(like), begin, end);
  });
  return out;
}

Tensor mask_embedding_gradient(const Prepared& prepared, const Tensor& grad, const Tensor& mask_embedding) {
  const SoftEmbedding& s = prepared.call;
  const int64_t chunks = std::max<int64_t>((s.rows / s.groups + kMaskChunk - 1) / kMaskChunk, 1);
  Tensor parts = torch::stable::new_empty(grad, {chunks, s.groups, s.width}, ScalarType::Double);
  double* sums = static_cast<double*>(parts.mutable_data_ptr());
  parallel(chunks, [&](int64_t begin, int64_t end) {
    prepared.kernels.mask_gradient(s, grad.const_data_ptr(), sums, begin, end);
  });
  return reduced(parts, chunks, mask_embedding);
}

// Sums over the dimensions along which the temperature was broadcast: in float64 and in row order, whatever the
// number of threads.
template <class T>
Tensor temperature_gradient(const Tensor& per_row, const Tensor& logits, const Tensor& temperature) {
  const Shape rows = leading_shape(logits), own = leading_shape(temperature, 0);
  Tensor sums = torch::stable::new_zeros(logits, own, ScalarType::Double);
  const T* slope = static_cast<const T*>(per_row.const_data_ptr());
  double* sum = static_cast<double*>(sums.mutable_data_ptr());
  for (int64_t n = 0; n < per_row.numel(); ++n) {
    int64_t rest = n, at = 0, step = 1;
    for (size_t i = 0; i < own.size(); ++i) {  // the innermost dimension first
      const int64_t size = rows[rows.size() - 1 - i], mine = own[own.size() - 1 - i];
      at += mine == 1 ? 0 : rest % size * step;
      rest /= size;
      step *= mine;
    }
    sum[at] += static_cast<double>(slope[n]);
  }
  return torch::stable::to(sums, temperature.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_embedding_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& codebook, double temperature,
    const OptionalTensor& row_temperature, const OptionalTensor& mask, const OptionalTensor& mask_embedding,
    const OptionalTensor& seed, const OptionalTensor& row_ids, const Tensor& row_max, const Tensor& row_sum,
    const Tensor& soft, std::vector<bool> wanted) {
  const Prepared prepared =
      prepare(logits, codebook, temperature, row_temperature, mask, mask_embedding, seed, row_ids);
  const SoftEmbedding& s = prepared.call;
  STD_TORCH_CHECK(wanted.size() == 4 && grad.numel() == s.rows * s.width && soft.numel() == s.rows * s.width &&
                      soft.scalar_type() == prepared.compute && row_max.numel() == s.rows &&
                      row_max.scalar_type() == ScalarType::Double && row_sum.numel() == s.rows &&
                      row_sum.scalar_type() == prepared.compute,
                  "softdimo: the saved tensors do not fit the logits");
  const Tensor upstream = torch::stable::contiguous(torch::stable::to(grad, codebook.scalar_type()));
  const Tensor wide = torch::stable::contiguous(soft);
  const Tensor tops = torch::stable::contiguous(row_max), sums = torch::stable::contiguous(row_sum);
  const bool wants_temperature = wanted[2] && row_temperature.has_value();
  const bool wants_mask = wanted[3] && mask.has_value();
  Tensor dlogits = wanted[0] ? output(logits, leading_shape(logits, 0), logits.scalar_type()) : nothing(logits);
  Tensor dcodebook = nothing(codebook), dtemperature = nothing(logits), dmask = nothing(logits);

  if (wanted[0] || wanted[1] || wants_temperature) {
    const Cut cut = backward_cut(s);
    const size_t partial = prepared.compute == ScalarType::Double ? sizeof(RowPartial<double>) : sizeof(RowPartial<float>);
    Tensor delta = torch::stable::new_empty(logits, {s.rows}, prepared.compute);
    Tensor partials = output(logits, {cut.tiles * s.rows * static_cast<int64_t>(partial)}, ScalarType::Byte);
    Tensor parts = wanted[1] ? output(logits, {cut.splits, s.groups, s.vocabulary, s.width},
                                      sums_in_double(s) ? ScalarType::Double : prepared.compute)
                             : nothing(logits);
    Tensor slopes = torch::stable::new_empty(logits, {wants_temperature ? s.rows : 0}, prepared.compute);
    const double* top = static_cast<const double*>(tops.const_data_ptr());
    const Backward job{s, upstream.const_data_ptr(), top, sums.const_data_ptr(), wide.const_data_ptr(),
                       delta.mutable_data_ptr(), cut.tile, cut.splits,
                       partials.mutable_data_ptr(), wanted[0] ? dlogits.mutable_data_ptr() : nullptr,
                       wanted[1] ? parts.mutable_data_ptr() : nullptr,
                       wants_temperature ? slopes.mutable_data_ptr() : nullptr};
    parallel_rows(s.rows, [&](int64_t begin, int64_t end) { prepared.kernels.row_dots(job, begin, end); });
    parallel(s.groups * cut.splits * cut.tiles,
             [&](int64_t begin, int64_t end) { prepared.kernels.backward(job, begin, end); });
    parallel_rows(s.rows, [&](int64_t begin, int64_t end) { prepared.kernels.finish_rows(job, begin, end); });
    if (wanted[1]) dcodebook = reduced(parts, cut.splits, codebook);
    if (wants_temperature) {
      dtemperature = prepared.compute == ScalarType::Double
                         ? temperature_gradient<double>(slopes, logits, *row_temperature)
                         : temperature_gradient<float>(slopes, logits, *row_temperature);
    }
  }
  if (wants_mask) dmask = mask_embedding_gradient(prepared, upstream, *mask_embedding);
  return {dlogits, dcodebook, dtemperature, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) {
  m.impl("soft_embedding", TORCH_BOX(&soft_embedding));
  m.impl("soft_embedding_backward", TORCH_BOX(&soft_embedding_backward));
}

}  // namespace softdimo::cpu
