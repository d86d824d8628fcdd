// soft_embedding on CPUs: what has no products. Which entries of a row are kept, before the forward; after the
// backward, what is left once every slice of the vocabulary is done.

#include "scratch.h"
#include "soft_embedding_rows.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// Finds which entries of each row are kept.
template <class T>
void truncate(const Truncate& job, int64_t begin, int64_t end) {
  const SoftEmbedding& s = job.call;
  const int64_t count = s.vocabulary;
  const Scratch<T> x(whole_vectors<T>(count)), scratch(truncation_scratch<T>(count));
  for (int64_t row = begin; row < end; ++row) {
    Kept<T> kept{T(0), 0};
    if (!is_masked(s, row)) {
      const T t = row_temperature<T>(s, row);
      widen(s.logits, s.logits_type, s.logits_rows.offset(row), count, x.get());
      for (int64_t v = 0; v < count; ++v) x[v] = x[v] / t;
      for (int64_t v = count; v < whole_vectors<T>(count); ++v) x[v] = static_cast<T>(-HUGE_VAL);
      kept = truncate_row<T>(x.get(), count, job.top_k, job.top_p, scratch.get());
    }
    static_cast<T*>(job.row_threshold)[row] = kept.threshold;
    job.row_last[row] = kept.last;
  }
}

// The row's slope, sum of dlogits (y - mean y), from slices that took it about their own means.
template <class T>
double merged_slope(const RowPartial<T>* partial, int64_t tiles, int64_t step) {
  double mass = 0, moment = 0, slope = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const RowPartial<T>& slice = partial[i * step];
    mass += slice.mass;
    moment += static_cast<double>(slice.mass) * slice.centre;
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const RowPartial<T>& slice = partial[i * step];
    slope += slice.slope + (slice.centre - moment / mass) * slice.residual;
  }
  return slope;
}

// Merges the slices of each row in index order: the dominant entry's gradient and the temperature's.
template <class T>
void finish_rows(const Backward& b, int64_t begin, int64_t end) {
  const SoftEmbedding& s = b.call;
  const int64_t tiles = (s.vocabulary + b.tile - 1) / b.tile;
  for (int64_t row = begin; row < end; ++row) {
    const RowPartial<T>* partial = static_cast<const RowPartial<T>*>(b.partials) + row;
    const bool masked = is_masked(s, row);
    const bool peaked = !masked && T(1) / static_cast<const T*>(b.row_sum)[row] > T(0.5);
    double others = 0;
    int64_t peak = -1;
    for (int64_t i = 0; i < tiles && peaked; ++i) {
      others += partial[i * s.rows].others;
      if (partial[i * s.rows].peak >= 0) peak = partial[i * s.rows].peak;
    }
    if (b.dlogits != nullptr && peak >= 0) {
      const double value = -others;
      narrow(&value, 1, b.dlogits, s.logits_type, row * s.vocabulary + peak);
    }
    if (b.dtemperature != nullptr) {
      const double slope = masked ? 0.0 : merged_slope(partial, tiles, s.rows);
      static_cast<T*>(b.dtemperature)[row] = masked ? T(0) : static_cast<T>(-slope / row_temperature<T>(s, row));
    }
  }
}

template <class T>
void reduce(const void* parts, int64_t count, int64_t n, void* out, DType type, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 256;
  double sum[kRun];
  for (int64_t i = begin; i < end; i += kRun) {
    const int64_t length = smaller(kRun, end - i);
    for (int64_t j = 0; j < length; ++j) sum[j] = 0;
    for (int64_t part = 0; part < count; ++part) {
      const T* source = static_cast<const T*>(parts) + part * n + i;
      for (int64_t j = 0; j < length; ++j) sum[j] += source[j];
    }
    narrow(sum, length, out, type, i);
  }
}

template <class T>
void mask_gradient(const SoftEmbedding& s, const void* grad, double* chunks, int64_t begin, int64_t end) {
  const int64_t positions = s.rows / s.groups, size = s.groups * s.width;
  const Scratch<T> g(s.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sum = chunks + chunk * size;
    for (int64_t i = 0; i < size; ++i) sum[i] = 0;
    const int64_t last = smaller((chunk + 1) * kMaskChunk, positions) * s.groups;
    for (int64_t row = chunk * kMaskChunk * s.groups; row < last; ++row) {
      if (!is_masked(s, row)) continue;
      widen(grad, s.codebook_type, row * s.width, s.width, g.get());
      double* target = sum + row % s.groups * s.width;
      for (int64_t d = 0; d < s.width; ++d) target[d] += g[d];
    }
  }
}

template <class T>
constexpr RowKernels kKernels = {truncate<T>, finish_rows<T>, reduce<T>, mask_gradient<T>};

}  // namespace

const SoftEmbeddingRowTable& soft_embedding_row_table() {
  static constexpr SoftEmbeddingRowTable table = {kKernels<double>, kKernels<float>};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
