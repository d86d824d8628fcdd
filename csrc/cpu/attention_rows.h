// Rows of [B, H, L, width] tensors: which take part, how they are read into scratch memory and written from it.
#pragma once

#include "softdimo/cpu/masked_attention.h"

#include "gemm.h"
#include "prefetch.h"
#include "scratch.h"
#include "transpose.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

SOFTDIMO_ALWAYS_INLINE int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Rows in scratch memory.
template <class Entry>
struct Block {
  Entry* data;
  int64_t row;  // stride
  int64_t count;
  int64_t width;
};

// Sums over keys take this many at a time: one long chain would round each term at the size of the whole.
constexpr int64_t kKeysPerSum = 16;

// Even parts of `count` in steps of 32, none larger than `most`.
struct Parts {
  int64_t count, size;
};
inline Parts cut(int64_t count, int64_t most) {
  const int64_t parts = count > 0 ? (count + most - 1) / most : 1;
  return {parts, rounded_up((count + parts - 1) / parts, 32)};
}

// Collects the numbers in [begin, end) that take part.
inline int64_t taking_part(const RowMask& mask, int64_t batch, int64_t begin, int64_t end, int64_t* found) {
  const bool* row = mask.data == nullptr ? nullptr : mask.data + batch * mask.stride[0];
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    found[count] = i;
    count += row == nullptr || row[i * mask.stride[1]] ? 1 : 0;
  }
  return count;
}

// Where a task is.
struct Place {
  int64_t batch, head, index;
};
inline Place place_of(const MaskedAttention& a, int64_t head) { return {head / a.heads, head % a.heads, head}; }

template <class P>
void read_block(const Heads& tensor, const Place& at, const int64_t* numbers, typename P::Number scale,
                const Block<typename P::Entry>& block) {
  for (int64_t i = 0; i < block.count; ++i) {
    P::read(tensor, tensor.offset(at.batch, at.head, numbers[i]), block.width, scale, block.data + i * block.row);
  }
  P::finish(block);
}

// Rows that are read soon, for products to fetch meanwhile: a head's inputs come from memory, or from other caches.
class Ahead {
 public:
  Ahead(int64_t most_rows, int64_t bytes) : rows_(most_rows), bytes_(bytes) {}

  void clear() { begin_ = end_ = 0; }
  void add(const Heads& tensor, const Place& at, const int64_t* numbers, int64_t count) {
    const char* head = static_cast<const char*>(tensor.data) + tensor.offset(at.batch, at.head, 0) * size_of(tensor.type);
    const int64_t step = tensor.stride[2] * size_of(tensor.type);
    for (int64_t i = 0; i < count; ++i) rows_[end_++] = head + numbers[i] * step;
  }
  // The first of `parts` equal shares of what is left.
  Prefetch share(int64_t parts) {
    const int64_t count = parts > 1 ? (end_ - begin_ + parts - 1) / parts : end_ - begin_;
    begin_ += count;
    return {rows_.get() + begin_ - count, count, bytes_};
  }

 private:
  Scratch<const void*> rows_;
  int64_t bytes_, begin_ = 0, end_ = 0;
};

// Bytes of the longest row of keys, values and queries.
inline int64_t row_bytes(const MaskedAttention& a) {
  const int64_t key = a.width * size_of(a.key.type), query = a.width * size_of(a.query.type);
  const int64_t value = a.value_width * size_of(a.value.type), longer = key > query ? key : query;
  return value > longer ? value : longer;
}

// Zeros in the rows of [begin, end) that are not among `numbers`.
inline void clear_others(const int64_t* numbers, int64_t count, int64_t begin, int64_t end, int64_t row_bytes, char* out) {
  for (int64_t i = begin, next = 0; i < end; ++i) {
    if (next < count && numbers[next] == i) {
      ++next;
    } else {
      std::memset(out + i * row_bytes, 0, static_cast<size_t>(row_bytes));
    }
  }
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
