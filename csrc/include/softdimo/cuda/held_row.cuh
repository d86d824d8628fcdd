// A row that is swept several times. It is read from memory once and then lies in shared memory (kResident), or is
// read again in every sweep, from caches where they hold it.
//
//   chunk (16 bytes)     0          1         ...  kThreads-1 | kThreads ...
//   thread               0          1         ...  kThreads-1 | 0 ...
//
// A thread sweeps the chunks that it stored itself, so that no barrier is needed; shared memory holds them in the
// row's own element type, aligned wherever the row is in memory, with minus infinity past its end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"

namespace softdimo::cuda {

template <typename T>
constexpr uint32_t kMinusInfinityBits = 0xff800000u;
template <>
constexpr uint32_t kMinusInfinityBits<__nv_bfloat16> = 0xff80u;
template <>
constexpr uint32_t kMinusInfinityBits<__half> = 0xfc00u;

// The maximum of many chunks: NaN if there is one. Two numbers at a time where a word holds two.
template <typename T>
class Maximum {
 public:
  __device__ __forceinline__ void add(const uint4& bytes) {
    word_ = larger(word_, larger(larger(bytes.x, bytes.y), larger(bytes.z, bytes.w)));
  }
  __device__ __forceinline__ float value() const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word_);
    } else {
      const float2 pair = unpack_pair<T>(word_);
      return ptx::max_or_nan(pair.x, pair.y);
    }
  }

 private:
  __device__ static __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return ptx::max_or_nan_bf16(a, b);
    } else if constexpr (std::is_same_v<T, __half>) {
      return ptx::max_or_nan_f16(a, b);
    } else {
      return __float_as_uint(ptx::max_or_nan(__uint_as_float(a), __uint_as_float(b)));
    }
  }

  uint32_t word_ = kMinusInfinityBits<T> * (sizeof(T) == 2 ? 0x10001u : 1u);
};

template <typename T, int kThreads, bool kResident>
class HeldRow {
 public:
  static constexpr int kChunk = RowReader<T>::kChunk;

  // held: room for every chunk, if the row is to be resident.
  __device__ __forceinline__ HeldRow(const T* row, int columns, uint4* held)
      : reader_(row, columns), row_(row), columns_(columns), held_(held) {}

  __device__ __forceinline__ int columns() const { return columns_; }
  __device__ __forceinline__ int chunks() const { return reader_.chunks(); }

  // Reads the thread's chunks, several at a time, keeps them, and returns their maximum: NaN if there is one.
  __device__ __forceinline__ float fill(int thread) const {
    return reader_.aligned() ? fill_from<true>(thread) : fill_from<false>(thread);
  }

  // One of the thread's chunks; minus infinity past the row's end.
  __device__ __forceinline__ void load(int j, float (&z)[kChunk]) const {
    if constexpr (kResident) {
      RowReader<T>::unpack(held_[j], z);
    } else if (reader_.aligned() && reader_.template inside<true>(j)) {
      RowReader<T>::unpack(reader_.template load<true>(j), z);
    } else if (!reader_.aligned() && reader_.template inside<false>(j)) {
      RowReader<T>::unpack(reader_.template load<false>(j), z);
    } else {
      reader_.load_elements(j, -INFINITY, z);
    }
  }

  // visit(z, v) for the thread's entries in chunks [first, last], and for padding, which is minus infinity.
  template <typename Visit>
  __device__ __forceinline__ void sweep(int thread, int first, int last, const Visit& visit) const {
    float z[kChunk];
#pragma unroll 1
    for (int j = first + ((thread - first) & (kThreads - 1)); j <= last; j += kThreads) {
      load(j, z);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) visit(z[i], j * kChunk + i);
    }
  }

 private:
  template <bool kAligned>
  __device__ __forceinline__ float fill_from(int thread) const {
    constexpr int kInFlight = kAligned ? 4 : 2;
    const int chunks = reader_.chunks();
    Maximum<T> top;
    const auto keep = [&](int j, const uint4& bytes) {
      if constexpr (kResident) held_[j] = bytes;
      top.add(bytes);
    };
    int j = thread;
    while (j < chunks) {
      if (reader_.template inside<kAligned>(j) && reader_.template inside<kAligned>(j + (kInFlight - 1) * kThreads)) {
        uint4 loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) loaded[i] = reader_.template load<kAligned>(j + i * kThreads);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) keep(j + i * kThreads, loaded[i]);
        j += kInFlight * kThreads;
      } else {
        keep(j, reader_.template inside<kAligned>(j) ? reader_.template load<kAligned>(j) : elements(j));
        j += kThreads;
      }
    }
    return top.value();
  }

  __device__ __forceinline__ uint32_t element(int column) const {
    if (column >= columns_) return kMinusInfinityBits<T>;
    if constexpr (sizeof(T) == 4) {
      return __ldg(reinterpret_cast<const uint32_t*>(row_) + column);
    } else {
      return __ldg(reinterpret_cast<const unsigned short*>(row_) + column);
    }
  }

  // The bytes of any chunk, element by element.
  __device__ __forceinline__ uint4 elements(int j) const {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = j * kChunk + i * kChunk / 4;
      word[i] = element(column);
      if constexpr (sizeof(T) == 2) word[i] |= element(column + 1) << 16;
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }

  RowReader<T> reader_;
  const T* row_;
  int columns_;
  uint4* held_;
};

}  // namespace softdimo::cuda
