// Tiny vocabularies: the packed codebook, and sums of vectors by lane.
#pragma once

#include "row_statistics.h"
#include "scratch.h"
#include "soft_embedding_rows.h"
#include "softdimo/cpu/soft_embedding_tiny.h"
#include "transpose.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

constexpr int64_t kLane = kLanes<float>;

// Entries of a row, in whole vectors.
SOFTDIMO_ALWAYS_INLINE int64_t whole_row(const SoftEmbedding& s) { return (s.vocabulary + kLane - 1) / kLane * kLane; }

// The codebook, packed as [G, D, whole_row] with zeros beyond V: one group's.
SOFTDIMO_ALWAYS_INLINE const float* packed_columns(const SoftEmbedding& s, int64_t group) {
  return static_cast<const float*>(s.packed_codebook) + group * s.width * whole_row(s);
}

// A row of logits as floats, then -inf; in place where it lies so, else as a copy in `stage` of whole_row.
SOFTDIMO_ALWAYS_INLINE const float* read_row(const SoftEmbedding& s, int64_t row, float* stage) {
  return RowReader<float>{s.logits, s.logits_type, s.logits_rows.offset(row), s.vocabulary, 0, stage}.read(
      0, s.vocabulary);
}

// Asks for a row of logits that is wanted soon.
SOFTDIMO_ALWAYS_INLINE void prefetch_row(const SoftEmbedding& s, int64_t row) {
  const int64_t bytes = s.vocabulary * size_of(s.logits_type);
  const char* logits = logits_at(s, row, 0);
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(logits + i);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// body(Count<N>, first entry) for pieces of 8, then of 4, 2 and 1 vectors: what a piece holds stays in registers.
template <class Body>
SOFTDIMO_ALWAYS_INLINE void each_piece(int64_t entries, const Body& body) {
  int64_t v = 0;
  for (; v + 8 * kLane <= entries; v += 8 * kLane) body(Count<8>{}, v);
  if (v + 4 * kLane <= entries) body(Count<4>{}, v), v += 4 * kLane;
  if (v + 2 * kLane <= entries) body(Count<2>{}, v), v += 2 * kLane;
  if (v < entries) body(Count<1>{}, v);
}

SOFTDIMO_ALWAYS_INLINE Vec<float> greater(Vec<float> a, Vec<float> b) { return a > b ? a : b; }  // b where a is NaN

// Lane i of the result is all lanes of vectors[i] combined: every round joins two lanes of each vector, and leaves half
// as many vectors that hold twice as many rows.
template <class Join>
SOFTDIMO_ALWAYS_INLINE Vec<float> fold(const Vec<float>* vectors, const Join& join) {
  using All = typename FirstIndices<kLane>::type;
  Vec<float> part[kLane];
#pragma GCC unroll 16
  for (int i = 0; i < kLane; ++i) part[i] = vectors[i];
#pragma GCC unroll 4
  for (int half = kLane / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      part[i] = join(zip<float, 0>(part[i], part[i + half], All{}),
                     zip<float, kLane / 2>(part[i], part[i + half], All{}));
    }
  }
  return part[0];
}

// fold() of `count` vectors, a multiple of kLane.
template <class Join>
SOFTDIMO_ALWAYS_INLINE void fold_all(const Vec<float>* vectors, int64_t count, const Join& join, float* out) {
  for (int64_t i = 0; i < count; i += kLane) store(out + i, fold(vectors + i, join));
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
