// masked_attention on CPUs: what the binding tells the kernels, and the table of kernels of one instruction set.
//
//   o[b, h, i] = sum_j softmax_j(scale q[b, h, i] . k[b, h, j]) v[b, h, j]
//
// over the keys j that take part. "T" below is the compute type: float, or double when any input is double.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu {

// A tensor [B, H, L, width] whose last dimension is contiguous; the others have any strides.
struct Heads {
  const void* data;
  DType type;
  int64_t stride[3];

  SOFTDIMO_ALWAYS_INLINE int64_t offset(int64_t batch, int64_t head, int64_t row) const {
    return batch * stride[0] + head * stride[1] + row * stride[2];
  }
};

// A mask [B, L]: true takes part. Null data: all do.
struct RowMask {
  const bool* data;
  int64_t stride[2];
};

struct MaskedAttention {
  int64_t batch, heads, queries, keys, width, value_width;
  double scale;
  Heads query, key, value;
  RowMask key_mask, query_mask;
};

struct AttentionForward {
  MaskedAttention call;
  int64_t chunk;  // query rows of one task
  void* output;   // [B, H, Lq, d_v] contiguous in the query's type
  void* row_max;  // T [B, H, Lq]: max of the scaled scores; zero in rows that are not wanted or have no key
  void* row_sum;  // T [B, H, Lq]: sum exp(score - max); likewise
};

struct AttentionBackward {
  MaskedAttention call;
  Heads grad;  // [B, H, Lq, d_v]
  const void* row_max;
  const void* row_sum;
  void* dquery;  // contiguous, in the input's type; null when not wanted
  void* dkey;
  void* dvalue;
};

// Kernels take a range of tasks; tasks are independent and may run in any order and on any thread.
struct MaskedAttentionKernels {
  void (*forward)(const AttentionForward&, int64_t begin, int64_t end);    // over B x H x chunks of queries
  void (*backward)(const AttentionBackward&, int64_t begin, int64_t end);  // over B x H
};

struct MaskedAttentionTable {
  MaskedAttentionKernels float32;
  MaskedAttentionKernels float64;
  MaskedAttentionKernels bfloat16;  // products of bfloat16; null where the instruction set has none
};

SOFTDIMO_DECLARE_TABLE(MaskedAttentionTable, masked_attention_table)

}  // namespace softdimo::cpu
