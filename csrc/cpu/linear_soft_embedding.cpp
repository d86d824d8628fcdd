// linear_soft_embedding on CPUs, forward and backward; compiled once per instruction set.
//
//   forward   z = W h + b,  p = softmax(z / T),  e = sum_v p[v] E[v]
//   backward  dp = E g,  dz = p (dp - g . e) / T;  dE[v] = sum p[v] g,  dW[v] = sum dz[v] h,  db = sum dz,  dh = dz W
//
// With R rows, V entries, H columns of the weight and D of the codebook:
//   forward   2 R V (H + D) FLOP, R V exponentials
//   backward  2 R V (2 H + 2 D) FLOP, and 2 R V H more where logits were not kept
//   floor     FLOP / multiply-add rate + exponentials / exp rate
//
// Forward, one task = a block of rows, whose hidden^T is packed once: for each slice of the vocabulary
//
//     W[slice] hidden^T -> z [slice, rows] -> p~ = exp((z - running max) / T) -> C [rows, D] += p~^T E[slice]
//
// Backward, one block of rows after the other, each in phases that all threads share. A slice of the vocabulary has one
// owner, so that no sum depends on the number of threads:
//
//     slices           z and dp = E[slice] G^T -> p, dz [slice, rows];  dE[slice] += p G
//     finish_rows      the entry with p > 1/2 gets minus the sum of the other dz
//     weight_gradient  dW[slice] += dz hidden           hidden_gradient  dh[:, columns] = dz^T W[:, columns]
//
// Where hidden, weight and codebook are bfloat16 and the processor multiplies bfloat16, all products do; z, p, dz and
// all sums stay float32, and p and dz are rounded as they enter a product.
//
// Only a block's dz exists at any time. Rows are summed in chains of fixed length, so the size of a block, which
// follows from the memory that the threads may use, does not change a bit. Tile registers take up a sum exactly where
// they left it: there one product takes all rows of a block.
//
// As in soft_embedding: max and sum are saved apart, g . e uses the wide e, products with a narrow codebook are summed
// in double, the slope along the temperature is taken about the mean of z.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the intrinsics' own undefined vectors (GCC 105593)
#endif

#include "softdimo/cpu/linear_soft_embedding.h"

#include "linear_soft_embedding_backward.h"
#include "linear_soft_embedding_forward.h"
#include "linear_soft_embedding_sums.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

template <class T>
constexpr LinearSoftEmbeddingKernels kLinearKernels = {
    forward<T>,         load_rows<T>,     slices<T>,      finish_rows<T>,  weight_gradient<T>,
    hidden_gradient<T>, bias_gradient<T>, narrow_sums<T>, mask_gradient<T>};

}  // namespace

const LinearSoftEmbeddingTable& linear_soft_embedding_table() {
  static constexpr LinearSoftEmbeddingTable table = {kHasHalf<float>, kFreeCuts, kLinearKernels<float>,
                                                     kLinearKernels<double>};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
