// Exact selection in a row without a sort: the entry at which the weight of the entries before it reaches a target.
//
// Entries are ordered by keys, integers that order as the entries do. A sweep adds up the weights by one digit of the
// key, 16 buckets of 4 bits, the highest digit first and within what the digits before left over; the bucket where
// the target is reached is the next digit. With unit weights that is the k-th largest, with probabilities the last
// entry of the shortest prefix of a given mass.
//
//   bucket   0 | thread 0 | thread 1 | ...        each thread adds to its own column of the table, in shared memory;
//   bucket   1 | thread 0 | thread 1 | ...        columns are then added up in double precision, in an order that
//   ...                                           depends on kThreads alone
//
// There is no atomic: sums of weights come out the same every time, integers and floats alike.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "softdimo/cuda/row_group.cuh"
#include "softdimo/cuda/row_reader.cuh"

namespace softdimo::cuda {

constexpr int kDigitBits = 4;
constexpr int kBuckets = 1 << kDigitBits;

// Low bits of the float that the element type never uses: they are no part of a key.
template <typename T>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<__nv_bfloat16> = 16;
template <>
constexpr int kSpareBits<__half> = 12;

template <typename T>
constexpr int kKeyBits = 32 - kSpareBits<T>;

// Orders as the numbers do, -0 below 0.
template <typename T>
__device__ __forceinline__ uint32_t key_of(float z) {
  const uint32_t bits = __float_as_uint(z);
  return (bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u)) >> kSpareBits<T>;
}

template <typename T>
__device__ __forceinline__ float value_of(uint32_t key) {
  uint32_t ordered = key << kSpareBits<T>;
  if (ordered >> 31) return __uint_as_float(ordered ^ 0x80000000u);
  ordered |= (1u << kSpareBits<T>) - 1;  // the spare bits of a negative number are ones here
  return __uint_as_float(~ordered);
}

// Between the first and the last number whose key is `prefix` above `bit`. It may hold -0 where it should not.
template <typename T>
struct KeyRange {
  float low = -INFINITY, high = INFINITY;

  __device__ __forceinline__ KeyRange(int bit, uint32_t prefix) {
    if (bit >= kKeyBits<T>) return;
    const float first = value_of<T>(prefix << bit), last = value_of<T>((prefix << bit) | ((1u << bit) - 1));
    if (first == first) low = first;  // keys beyond those of infinity are NaN
    if (last == last) high = last;
  }
  __device__ __forceinline__ bool may_hold(float z) const { return (z >= low) & (z <= high); }
};

struct Selected {
  uint32_t key;
  double total;  // weight of all entries
};

// What the weight is to reach: a number plus a share of the weight of all entries.
struct Target {
  double number;
  double share;
};

template <int kThreads, int kBlock>
class RadixSelect {
 public:
  // Shared memory of a row, in bytes: its table, and the sums of the buckets.
  static constexpr int kBytes = kBuckets * (kThreads * static_cast<int>(sizeof(float)) + static_cast<int>(sizeof(double)));

  __device__ __forceinline__ RadixSelect(const RowGroup<kThreads, kBlock>& group, unsigned char* shared)
      : group_(group),
        sums_(reinterpret_cast<double*>(shared)),
        column_(reinterpret_cast<float*>(shared + kBuckets * sizeof(double)) + group.thread()) {}

  // The smallest key such that the entries above it weigh less than the target; of the thread's entries, and of the
  // other threads of the row, who all get the result. sweep(shift, prefix, add) calls add(key, weight()) for every
  // entry whose key begins with `prefix` above bit `shift` + kDigitBits, and for any others.
  template <typename Sweep>
  __device__ __forceinline__ Selected find(int bits, const Target& target, const Sweep& sweep) const {
    Selected selected{0, 0.0};
    double above = 0.0, wanted = target.number;
#pragma unroll 1
    for (int shift = bits - kDigitBits; shift >= 0; shift -= kDigitBits) {
#pragma unroll
      for (int bucket = 0; bucket < kBuckets; ++bucket) column_[bucket * kThreads] = 0.0f;
      const uint32_t prefix = selected.key;
      sweep(shift, prefix, [&](uint32_t key, const auto& weight) {
        const uint32_t digits = key >> shift;
        if (digits >> kDigitBits == prefix) column_[digits % kBuckets * kThreads] += weight();
      });
      add_columns();
      if (shift == bits - kDigitBits) {
#pragma unroll
        for (int bucket = 0; bucket < kBuckets; ++bucket) selected.total += sums_[bucket];
        wanted += target.share * selected.total;
      }
      selected.key = prefix << kDigitBits | static_cast<uint32_t>(next_digit(wanted, above));
    }
    return selected;
  }

 private:
  // The lowest bucket with something in it whose entries above weigh less than wanted; at least the highest one.
  __device__ __forceinline__ int next_digit(double wanted, double& above) const {
    int digit = 0;
    double over = above, chosen = above;
    bool found = false;
#pragma unroll
    for (int bucket = kBuckets - 1; bucket >= 0; --bucket) {
      const double sum = sums_[bucket];
      if (sum > 0.0 && (!found || over < wanted)) {
        digit = bucket;
        chosen = over;
        found = true;
      }
      over += sum;
    }
    above = chosen;
    return digit;
  }

  // sums_ of every bucket, from all columns. Threads start at different columns so that they meet different banks.
  __device__ __forceinline__ void add_columns() const {
    constexpr int kParts = kThreads / kBuckets;  // threads for a bucket
    static_assert(kParts >= 1, "a thread for every bucket");
    const int thread = group_.thread(), bucket = thread / kParts, part = thread % kParts;
    group_.barrier();
    const float* row = column_ - thread + bucket * kThreads + part;
    double sum = 0.0;
#pragma unroll 4
    for (int i = 0; i < kBuckets; ++i) sum += static_cast<double>(row[(i + bucket) % kBuckets * kParts]);
    sum = group_.among(kParts, sum, [](double a, double b) { return a + b; });
    if (part == 0) sums_[bucket] = sum;
    group_.barrier();
  }

  const RowGroup<kThreads, kBlock>& group_;
  double* sums_;
  float* column_;
};

}  // namespace softdimo::cuda
