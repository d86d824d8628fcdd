// masked_attention on CPUs, forward and backward; compiled once per instruction set.
//
//   forward   s = scale q k^T,  p = exp(s - max) / sum,  o = p v
//   backward  s = scale k q^T,  dv = p g,  dp = v g^T,  ds = p (dp - sum_j p dp),  dk = scale ds q,  dq^T = scale k^T ds
//
// Forward, scores are held as [queries, keys]: keys are transposed once a head, while queries, values, weights and the
// output are operands, or rows of the result, as they lie. Maxima and sums of a vector's worth of rows cross lanes
// together. Backward, scores are held as [keys, queries]: each query has a lane of its own, and the products commute,
// so that a score has the same bits as in the forward. Keys that take part are gathered as they are read, queries that
// are wanted likewise; the others are never read and cost nothing.
//
// With R wanted queries and K keys that take part, of width d (values: d_v), per batch item and head:
//   forward   2 R K (d + d_v) FLOP, R K exponentials
//   backward  R K (6 d + 4 d_v) FLOP, R K exponentials; beyond kBackwardKeys keys 2 R K (d + d_v) FLOP more
//   floor     FLOP / multiply-add rate + exponentials / exp rate; the inputs are read once, far below it
//
// Forward, one task = a chunk of queries of one head. Keys pass in blocks of at most kForwardKeys with a running
// maximum. Backward, one task = one head, so that every gradient has one owner and no sum depends on threads.
//
// Nearly one-hot rows stay exact: max and sum are saved apart; where a weight exceeds 1/2, its own dp is subtracted from
// the others before they are summed, so that its ds is minus the sum of the others.

#include "softdimo/cpu/masked_attention.h"

#include "attention_backward.h"
#include "attention_bf16.h"
#include "attention_forward.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

namespace {

template <class P>
constexpr MaskedAttentionKernels kKernels = {forward<P>, backward<P>};

}  // namespace

const MaskedAttentionTable& masked_attention_table() {
#ifdef __AVX512BF16__
  static constexpr MaskedAttentionTable table = {kKernels<Plain<float>>, kKernels<Plain<double>>, kKernels<Rounded>};
#else
  static constexpr MaskedAttentionTable table = {kKernels<Plain<float>>, kKernels<Plain<double>>, {}};
#endif
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
