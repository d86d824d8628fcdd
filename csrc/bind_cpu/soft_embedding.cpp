// soft_embedding on CPUs: allocation, layout, threads.

#include "bind_cpu/tensors.h"
#include "softdimo/cpu/soft_embedding.h"
#include "softdimo/cpu/soft_embedding_tiny.h"

namespace softdimo::cpu {
namespace {

// How a call computes.
struct Settings {
  ScalarType compute;
  bool bfloat16;        // products of bfloat16
  bool high_precision;  // in two terms
};

// The kernels of a call's products.
template <class Kernels>
const Kernels& choose(const ByProduct<Kernels>& table, const SoftEmbedding& s, const Settings& settings) {
  if (settings.compute == ScalarType::Double) return table.float64;
  if (sums_in_double(s)) return table.float32_sums_in_double;
  if (settings.bfloat16) return settings.high_precision ? table.bfloat16_two_terms : table.bfloat16;
  return table.float32;
}

const ForwardKernels& forward_kernels(const SoftEmbedding& s, const Settings& settings) {
  return choose<ForwardKernels>(SOFTDIMO_PRODUCT_TABLE(soft_embedding_forward_table), s, settings);
}
const BackwardKernels& backward_kernels(const SoftEmbedding& s, const Settings& settings) {
  return choose<BackwardKernels>(SOFTDIMO_PRODUCT_TABLE(soft_embedding_backward_table), s, settings);
}
const SoftEmbeddingTinyTable& tiny_kernels() { return SOFTDIMO_TABLE(soft_embedding_tiny_table); }
const RowKernels& row_kernels(ScalarType type) {
  const SoftEmbeddingRowTable& table = SOFTDIMO_TABLE(soft_embedding_row_table);
  return type == ScalarType::Double ? table.float64 : table.float32;
}

// Whether the kernels for tiny vocabularies take the call, apart from hard values and gradients of the temperature.
bool takes_tiny(const SoftEmbedding& s, const Settings& settings) {
  return settings.compute == ScalarType::Float && is_tiny(s) && !s.noise && s.row_threshold == nullptr;
}

// A call with everything it points at.
struct Prepared {
  SoftEmbedding call{};
  Settings settings;
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
                 const OptionalTensor& mask_embedding, const OptionalTensor& seed, const OptionalTensor& row_ids,
                 bool high_precision) {
  check_shapes(logits, codebook, mask, mask_embedding, row_ids);
  Prepared prepared;
  const bool wide = is_double(logits) || is_double(codebook) || is_double(row_temperature) || is_double(mask_embedding);
  const ScalarType compute = wide ? ScalarType::Double : ScalarType::Float;
  const bool half = codebook.scalar_type() == ScalarType::BFloat16 && active_isa() >= Isa::avx512_bf16;
  prepared.settings = {compute, half, high_precision};

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
        wide ? row_temperatures<double>(logits, *row_temperature, compute)
             : row_temperatures<float>(logits, *row_temperature, compute));
  }
  if (mask.has_value()) {
    s.mask = prepared.keep<bool>(as_contiguous(*mask));
    s.mask_embedding = prepared.keep<void>(as_contiguous(*mask_embedding, compute));
  }
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->numel() == 2 && seed->scalar_type() == ScalarType::Long, "softdimo: seed must be int64 [2]");
    const int64_t* pair = prepared.keep<int64_t>(as_contiguous(*seed));
    s.noise = true;
    s.seed = static_cast<uint64_t>(pair[0]);
    s.offset = static_cast<uint32_t>(pair[1]);
    if (row_ids.has_value()) s.row_ids = prepared.keep<int64_t>(as_contiguous(*row_ids));
  }
  return prepared;
}

// Writes the codebook as the kernels' products take it, into kernels.packed_bytes.
template <class Kernels>
void pack_codebook(SoftEmbedding& s, const Kernels& kernels, void* packed) {
  parallel_rows(s.rows > 0 ? s.groups * s.vocabulary : 0,
                [&](int64_t begin, int64_t end) { kernels.pack(s, packed, begin, end); });
  s.packed_codebook = packed;
}

// Blocks small enough that every thread has a few; a row's result does not depend on its block.
int64_t forward_block_rows(const SoftEmbedding& s, bool bfloat16) {
  const int64_t tasks = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t step = bfloat16 ? 32 : 14, most = bfloat16 ? kBlockRows : kWideRows;
  return std::clamp<int64_t>(s.rows / std::max<int64_t>(tasks, 1) / step * step, step, most);
}

// Finds what truncation keeps of each row and tells the call; two empty tensors where nothing is truncated.
std::tuple<Tensor, Tensor> truncated(Prepared& prepared, const Tensor& logits, std::optional<int64_t> top_k,
                                     std::optional<double> top_p) {
  const bool truncates = top_k.has_value() || top_p.has_value();
  const Shape shape = truncates ? leading_shape(logits) : Shape{0};
  Tensor threshold = torch::stable::new_empty(logits, shape, prepared.settings.compute);
  Tensor last = torch::stable::new_empty(logits, shape, ScalarType::Long);
  if (!truncates) return {threshold, last};
  SoftEmbedding& s = prepared.call;
  const Truncate job{s, top_k.value_or(0), top_p.value_or(1.0), threshold.mutable_data_ptr(),
                     static_cast<int64_t*>(last.mutable_data_ptr())};
  parallel(s.rows, [&](int64_t begin, int64_t end) { row_kernels(prepared.settings.compute).truncate(job, begin, end); });
  s.row_threshold = job.row_threshold;
  s.row_last = job.row_last;
  return {threshold, last};
}

void run_forward(Forward job, const Settings& settings, const Tensor& like) {
  const SoftEmbedding& s = job.call;
  Workspace room;
  const auto pack = [&](const auto& kernels) {
    const int64_t packed = room.add(kernels.packed_bytes(s));
    room.allocate(like);
    pack_codebook(job.call, kernels, room.at(packed));
  };
  if (takes_tiny(s, settings) && !job.hard) {
    pack(tiny_kernels());
    return parallel_entries((s.rows + kTinyRows - 1) / kTinyRows, kTinyRows * s.vocabulary,
                            [&](int64_t begin, int64_t end) { tiny_kernels().forward(job, begin, end); });
  }
  const ForwardKernels& kernels = forward_kernels(s, settings);
  const int64_t positions = s.rows / s.groups;
  job.block_rows = forward_block_rows(s, settings.bfloat16);
  pack(kernels);
  parallel(s.groups * ((positions + job.block_rows - 1) / job.block_rows),
           [&](int64_t begin, int64_t end) { kernels.forward(job, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_embedding(
    const Tensor& logits, const Tensor& codebook, double temperature, const OptionalTensor& row_temperature,
    const OptionalTensor& mask, const OptionalTensor& mask_embedding, const OptionalTensor& seed,
    const OptionalTensor& row_ids, std::optional<int64_t> top_k, std::optional<double> top_p, bool high_precision,
    bool hard) {
  Prepared prepared =
      prepare(logits, codebook, temperature, row_temperature, mask, mask_embedding, seed, row_ids, high_precision);
  const SoftEmbedding& s = prepared.call;
  const ScalarType compute = prepared.settings.compute;
  const auto [threshold, last] = truncated(prepared, logits, top_k, top_p);
  const Shape rows = leading_shape(logits), shape = with(rows, s.width);
  Tensor value = output(codebook, shape, codebook.scalar_type());
  Tensor row_max = output(logits, rows, ScalarType::Double), row_sum = output(logits, rows, compute);
  const bool keeps_soft = hard || codebook.scalar_type() != compute;
  Tensor soft = keeps_soft ? output(logits, shape, compute) : torch::stable::new_empty(logits, {0}, compute);
  const Forward job{s, hard, 0, value.mutable_data_ptr(), static_cast<double*>(row_max.mutable_data_ptr()),
                    row_sum.mutable_data_ptr(), keeps_soft ? soft.mutable_data_ptr() : nullptr};
  run_forward(job, prepared.settings, logits);
  return {value, row_max, row_sum, soft, threshold, last};
}

// How the backward is cut into tasks: by shapes alone, so that sums over rows form the same tree on any machine.
struct Cut {
  int64_t tile, tiles, splits;
};

Cut backward_cut(const SoftEmbedding& s) {
  constexpr int64_t kTasks = 16, kLeastRows = 4 * kWideRows, kMostPartialBytes = int64_t{32} << 20;
  const int64_t tile = std::min<int64_t>(s.width > 256 ? 128 : kVocabularyChunk, (s.vocabulary + 3) / 4 * 4);
  const int64_t tiles = (s.vocabulary + tile - 1) / tile;
  const int64_t table_bytes = s.groups * s.vocabulary * s.width * static_cast<int64_t>(sizeof(double));
  const int64_t by_rows = s.rows / s.groups / kLeastRows, by_memory = kMostPartialBytes / table_bytes;
  const int64_t splits = std::min({kTasks / (tiles * s.groups), by_rows, by_memory});
  return {tile, tiles, std::max<int64_t>(splits, 1)};
}

Tensor reduced(const Tensor& parts, int64_t count, const Tensor& like) {
  Tensor out = output(like, leading_shape(like, 0), like.scalar_type());
  const RowKernels& kernels = row_kernels(parts.scalar_type());
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
    row_kernels(prepared.settings.compute).mask_gradient(s, grad.const_data_ptr(), sums, begin, end);
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

// What the forward saved of each row, checked.
struct Saved {
  Tensor row_max, row_sum, soft, row_threshold, row_last;
};

Saved check_saved(Prepared& prepared, const Tensor& row_max, const Tensor& row_sum, const Tensor& soft,
                  const Tensor& row_threshold, const Tensor& row_last) {
  SoftEmbedding& s = prepared.call;
  const ScalarType compute = prepared.settings.compute;
  const auto fits = [](const Tensor& tensor, int64_t count, ScalarType type) {
    return tensor.numel() == count && tensor.scalar_type() == type;
  };
  const bool truncates = row_threshold.numel() > 0;
  STD_TORCH_CHECK(fits(row_max, s.rows, ScalarType::Double) && fits(row_sum, s.rows, compute) &&
                      fits(soft, s.rows * s.width, compute) &&
                      fits(row_threshold, truncates ? s.rows : 0, compute) &&
                      fits(row_last, truncates ? s.rows : 0, ScalarType::Long),
                  "softdimo: the saved tensors do not fit the logits");
  Saved saved{as_contiguous(row_max), as_contiguous(row_sum), as_contiguous(soft), as_contiguous(row_threshold),
              as_contiguous(row_last)};
  if (truncates) {
    s.row_threshold = saved.row_threshold.const_data_ptr();
    s.row_last = static_cast<const int64_t*>(saved.row_last.const_data_ptr());
  }
  return saved;
}

// Gradients to logits and codebook, and along the temperature by rows: each where it is wanted.
struct Gradients {
  OptionalTensor dlogits, dcodebook, slopes;
};

void* data_of(OptionalTensor& tensor) { return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr; }

Backward backward_job(const SoftEmbedding& s, const Tensor& upstream, const Saved& saved) {
  Backward job{};
  job.call = s;
  job.grad = upstream.const_data_ptr();
  job.row_max = static_cast<const double*>(saved.row_max.const_data_ptr());
  job.row_sum = saved.row_sum.const_data_ptr();
  job.soft = saved.soft.const_data_ptr();
  return job;
}

Gradients run_tiny_backward(Backward job, const Tensor& logits, const Tensor& codebook, bool wants_logits,
                            bool wants_codebook) {
  constexpr int64_t kSplitRows = 512, kMostSplits = 64;
  const SoftEmbedding& s = job.call;
  job.splits = std::clamp<int64_t>(s.rows / kSplitRows, 1, kMostSplits);
  Gradients out;
  if (wants_logits) out.dlogits = output(logits, leading_shape(logits, 0), logits.scalar_type());
  if (wants_codebook) {
    out.dcodebook = output(logits, {job.splits, s.groups, s.vocabulary, s.width}, ScalarType::Double);
  }
  job.dlogits = data_of(out.dlogits);
  job.dcodebook = data_of(out.dcodebook);
  Workspace room;
  const int64_t packed = room.add(tiny_kernels().packed_bytes(s));
  room.allocate(logits);
  pack_codebook(job.call, tiny_kernels(), room.at(packed));
  parallel(job.splits, [&](int64_t begin, int64_t end) { tiny_kernels().backward(job, begin, end); });
  if (wants_codebook) out.dcodebook = reduced(*out.dcodebook, job.splits, codebook);
  return out;
}

Gradients run_backward(Backward job, const Settings& settings, const Tensor& logits, const Tensor& codebook,
                       bool wants_logits, bool wants_codebook, bool wants_temperature) {
  const SoftEmbedding& s = job.call;
  if (takes_tiny(s, settings) && !wants_temperature) {
    return run_tiny_backward(job, logits, codebook, wants_logits, wants_codebook);
  }
  const ScalarType compute = settings.compute;
  const BackwardKernels& kernels = backward_kernels(s, settings);
  const Cut cut = backward_cut(s);
  const ScalarType sums = sums_in_double(s) ? ScalarType::Double : compute;
  const bool in_place = cut.splits == 1 && codebook.scalar_type() == sums;  // nothing left to reduce
  Gradients out;
  if (wants_logits) out.dlogits = output(logits, leading_shape(logits, 0), logits.scalar_type());
  if (wants_codebook) {
    out.dcodebook = in_place ? output(codebook, leading_shape(codebook, 0), sums)
                             : output(logits, {cut.splits, s.groups, s.vocabulary, s.width}, sums);
  }
  if (wants_temperature) out.slopes = torch::stable::new_empty(logits, {s.rows}, compute);
  job.block_rows = settings.bfloat16 ? kBlockRows : kWideRows;
  job.tile = cut.tile;
  job.splits = cut.splits;
  job.dlogits = data_of(out.dlogits);
  job.dcodebook = data_of(out.dcodebook);
  job.dtemperature = data_of(out.slopes);

  const bool wide = compute == ScalarType::Double;
  const int64_t partial_bytes = wide ? sizeof(RowPartial<double>) : sizeof(RowPartial<float>);
  Workspace room;
  const int64_t packed = room.add(kernels.packed_bytes(s)), delta = room.add(s.rows * (wide ? 8 : 4));
  const int64_t partials = room.add(cut.tiles * s.rows * partial_bytes), grads = room.add(kernels.upstream_bytes(job));
  room.allocate(logits);
  pack_codebook(job.call, kernels, room.at(packed));
  job.delta = room.at(delta);
  job.partials = room.at(partials);
  job.upstream = room.at(grads);
  parallel(s.groups * cut.splits * split_blocks(job),
           [&](int64_t begin, int64_t end) { kernels.pack_upstream(job, begin, end); });
  parallel(s.groups * cut.splits * cut.tiles,
           [&](int64_t begin, int64_t end) { kernels.backward(job, begin, end); });
  parallel_rows(s.rows, [&](int64_t begin, int64_t end) { row_kernels(compute).finish_rows(job, begin, end); });
  if (wants_codebook && !in_place) out.dcodebook = reduced(*out.dcodebook, cut.splits, codebook);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_embedding_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& codebook, double temperature,
    const OptionalTensor& row_temperature, const OptionalTensor& mask, const OptionalTensor& mask_embedding,
    const OptionalTensor& seed, const OptionalTensor& row_ids, std::optional<int64_t>, std::optional<double>,
    bool high_precision, const Tensor& row_max, const Tensor& row_sum, const Tensor& soft, const Tensor& row_threshold,
    const Tensor& row_last, std::vector<bool> wanted) {
  Prepared prepared =
      prepare(logits, codebook, temperature, row_temperature, mask, mask_embedding, seed, row_ids, high_precision);
  const SoftEmbedding& s = prepared.call;
  const Saved saved = check_saved(prepared, row_max, row_sum, soft, row_threshold, row_last);
  STD_TORCH_CHECK(wanted.size() == 4 && grad.numel() == s.rows * s.width, "softdimo: the gradient does not fit");
  const Tensor upstream = as_contiguous(grad, codebook.scalar_type());
  const bool wants_temperature = wanted[2] && row_temperature.has_value();
  Gradients found;
  if (wanted[0] || wanted[1] || wants_temperature) {
    found = run_backward(backward_job(s, upstream, saved), prepared.settings, logits, codebook, wanted[0], wanted[1],
                         wants_temperature);
  }
  OptionalTensor dtemperature, dmask;
  if (wants_temperature) {
    dtemperature = prepared.settings.compute == ScalarType::Double
                       ? temperature_gradient<double>(*found.slopes, logits, *row_temperature)
                       : temperature_gradient<float>(*found.slopes, logits, *row_temperature);
  }
  if (wanted[3] && mask.has_value()) dmask = mask_embedding_gradient(prepared, upstream, *mask_embedding);
  const auto or_nothing = [&](OptionalTensor& tensor) {
    return tensor.has_value() ? std::move(*tensor) : nothing(logits);
  };
  return {or_nothing(found.dlogits), or_nothing(found.dcodebook), or_nothing(dtemperature), or_nothing(dmask)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CPU, m) {
  m.impl("soft_embedding", TORCH_BOX(&soft_embedding));
  m.impl("soft_embedding_backward", TORCH_BOX(&soft_embedding_backward));
}

}  // namespace softdimo::cpu
