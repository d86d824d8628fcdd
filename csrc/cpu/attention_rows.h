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

// The first `count` lanes, at least none, and another's others.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> first_lanes_or(Vec<T> v, int64_t count, Vec<T> other) {
  decltype(v < v) lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < static_cast<decltype(lane[0] + 0)>(count) ? v : other;
}

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

// The keys, and the queries in [begin, end), of a sample that take part: none unless there are both.
class TakingPart {
 public:
  TakingPart(int64_t most_keys, int64_t most_queries) : kept(most_keys), wanted(most_queries) {}

  void find(const MaskedAttention& a, int64_t batch, int64_t begin, int64_t end) {
    if (batch == batch_ && begin == begin_) return;  // the head before was of the same sample
    batch_ = batch;
    begin_ = begin;
    keys = taking_part(a.key_mask, batch, 0, a.keys, kept.get());
    rows = keys > 0 ? taking_part(a.query_mask, batch, begin, end, wanted.get()) : 0;
    keys = rows > 0 ? keys : 0;
  }

  Scratch<int64_t> kept, wanted;
  int64_t keys = 0, rows = 0;

 private:
  int64_t batch_ = -1, begin_ = -1;
};

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
inline void clear_others(const int64_t* numbers, int64_t count, int64_t begin, int64_t end, int64_t row_bytes,
                         char* out) {
  if (count == end - begin) return;
  constexpr int64_t kStep = SOFTDIMO_SIMD_BYTES;  // a constant: no call
  for (int64_t i = begin, next = 0; i < end; ++i) {
    if (next < count && numbers[next] == i) {
      ++next;
      continue;
    }
    char* const row = out + i * row_bytes;
    int64_t done = 0;
    for (; done + kStep <= row_bytes; done += kStep) std::memset(row + done, 0, kStep);
    if (done < row_bytes) std::memset(row + done, 0, static_cast<size_t>(row_bytes - done));
  }
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
