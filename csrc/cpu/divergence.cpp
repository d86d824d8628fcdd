// Divergences between two rows of logits on CPUs, forward and backward; compiled once per instruction set.
//
//   p = softmax(a / S), q = softmax(b / T); a: the teacher's logits, guided where asked for; b: the model's
//   r = log p - log q
//   KL(p || q) = sum p r                    gradient to b / T: q - p;  to a / S: p (r - KL(p || q))
//   KL(q || p) = -sum q r                   the same with p and q exchanged
//
// With R rows, V entries, s bytes per logit and c = 2 tensors of logits (3 with guidance):
//   forward   c s R V bytes read, 2 R V exponentials (4 for rows that nearly agree)
//   backward  c s R V bytes read, s R V written for each gradient, 2 R V exponentials for each (1 where only the
//             divergence of its own side from the other is wanted)
//   floor     max(bytes / copy rate, vector operations / 2 a cycle): 25 a vector of entries in the forward, 24 in the
//             backward; float32 waits for the memory, bfloat16 for the processor
//
// One task = a range of rows. A row passes in chunks that stay in the first cache, twice in the forward (maxima;
// sums), once in the backward, which recomputes p and q from the saved maxima and sums. Meanwhile the next row is
// fetched. A row's result depends on that row alone.
//
// Rows whose p and q differ clearly ("direct") take p - q as it is, and r through d = a / S - b / T about the maxima,
// whose means under p and q say everything: KL(p || q) = E_p d - c with c = log(sum_p / sum_q). Which rows these are,
// sums of p and q over blocks of 8 vectors decide: where they differ, p and q do. In the others these differences
// would cancel; they are read once more ("centred"), and every term is formed from the entry's own r:
//
//   p - q = p (r - g),   p r - (p - q) = p g,   -q r + (p - q) = (p - q) r - p g,   g = r + expm1(-r) = r^2 (1/2 - ...)
//
// with r from exact differences of logits. The rounding of c is taken back so that p - q sums to zero.
// In a row with an entry > 1/2 the gradient of that entry is minus the sum of the others.

#include "softdimo/cpu/divergence.h"

#include "divergence_backward.h"
#include "divergence_forward.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

template <class T>
void forward(const DivergenceForward& f, int64_t begin, int64_t end) {
  const Divergence& s = f.call;
  Room<T> room;
  Scales<T> scales(s);
  Row<T> next = find_row<T>(s, row_index(s, begin));
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row = next;
    if (i + 1 < end) next = find_row<T>(s, row_index(s, i + 1));
    static_cast<T*>(f.value)[row.index] = forward_row(s, scales, row, next, room, f.statistics[row.index]);
  }
}

template <class T>
void backward(const DivergenceBackward& b, int64_t begin, int64_t end) {
  const Divergence& s = b.call;
  Room<T> room;
  Scales<T> scales(s);
  Row<T> next = find_row<T>(s, row_index(s, begin));
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row = next;
    if (i + 1 < end) next = find_row<T>(s, row_index(s, i + 1));
    backward_row(b, scales, row, next, room);
  }
}

template <class T>
constexpr DivergenceKernels kKernels = {forward<T>, backward<T>};

}  // namespace

const DivergenceTable& divergence_table() {
  static constexpr DivergenceTable table = {kKernels<float>, kKernels<double>};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
