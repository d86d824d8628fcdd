// Reads a row of a matrix in chunks of 16 bytes.
//
//   columns    0 ........ W-1 | W ....... 2W-1 | ...            W = 16 / sizeof(T)
//              chunk 0          chunk 1          ...
//
// Chunk j is columns [jW, (j+1)W) wherever the row starts in memory, so what a thread adds up, and in which order,
// follows from the row's contents alone and not from its place in the batch. A row that starts on a 16-byte boundary
// gives a chunk in one 128-bit load. Any other row (every second row of a [N, 1025] matrix, say) gives it by two
// aligned 128-bit loads, of which the second is the next thread's first and comes from L1, and a shift:
//
//   memory     |----word j----|---word j+1---|
//   row           |----chunk j---|                offset_ elements into word j
//
// Neither kind of load leaves the row: chunks at its ends are read element by element.
//
// Where only each entry by itself matters, chunks may start `before` columns before the row instead: then chunk j is
// word j of a RowWriter whose row starts that far into its first word, and both are aligned where both rows are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace softdimo::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// The two 16-bit numbers of a word, the lower address first.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word);

template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t word) {
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16))));
}

// The 16 bytes that start `bytes` after the beginning of `low`, which `high` follows in memory. Only constant
// indices: a register array with a run-time index would move to local memory.
__device__ __forceinline__ uint4 shift_bytes(const uint4& low, const uint4& high, unsigned bytes) {
  uint32_t word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (bytes & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) word[i] = word[i + 2];
  }
  if (bytes & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) word[i] = word[i + 1];
  }
  const unsigned bits = 8 * (bytes & 3);
  return make_uint4(__funnelshift_r(word[0], word[1], bits), __funnelshift_r(word[1], word[2], bits),
                    __funnelshift_r(word[2], word[3], bits), __funnelshift_r(word[3], word[4], bits));
}

template <typename T>
class RowReader {
 public:
  static constexpr int kChunk = 16 / sizeof(T);

  __device__ __forceinline__ RowReader(const T* row, int columns, int before = 0)
      : row_(row - before),
        before_(before),
        columns_(before + columns),
        offset_(static_cast<int>(reinterpret_cast<uintptr_t>(row_) % 16 / sizeof(T))),
        words_(reinterpret_cast<const uint4*>(row_ - offset_)) {}

  __device__ __forceinline__ int chunks() const { return (columns_ + kChunk - 1) / kChunk; }

  __device__ __forceinline__ bool aligned() const { return offset_ == 0; }

  // Whether load() may read chunk j.
  template <bool kAligned>
  __device__ __forceinline__ bool inside(int j) const {
    const int first = kAligned ? j * kChunk : j * kChunk - offset_;
    return first >= before_ && first + (kAligned ? kChunk : 2 * kChunk) <= columns_;
  }

  // The bytes of a chunk that is inside; kAligned is aligned(), known when compiling.
  template <bool kAligned>
  __device__ __forceinline__ uint4 load(int j) const {
    if (kAligned) return __ldg(words_ + j);
    return shift_bytes(__ldg(words_ + j), __ldg(words_ + j + 1), static_cast<unsigned>(offset_ * sizeof(T)));
  }

  // Any chunk, element by element; `fill` outside of the row.
  __device__ __forceinline__ void load_elements(int j, float fill, float (&values)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int column = j * kChunk + i;
      values[i] = column >= before_ && column < columns_ ? to_float(__ldg(row_ + column)) : fill;
    }
  }

  __device__ static __forceinline__ void unpack(const uint4& bytes, float (&values)[kChunk]) {
    const uint32_t word[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        values[i] = __uint_as_float(word[i]);
      } else {
        const float2 pair = unpack_pair<T>(word[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    }
  }

 private:
  const T* row_;        // where chunk 0 starts
  int before_;          // of its columns, those before the row
  int columns_;         // of all chunks
  int offset_;          // elements between the 16-byte boundary at or before chunk 0, and chunk 0
  const uint4* words_;  // that boundary
};

// One thread's chunks of [0, chunks), in order: visit(j, values, whole), where a chunk that is not whole has `fill`
// outside of the row. Several are in flight while all of them are inside. kAligned is aligned(), known when compiling.
template <bool kAligned, int kThreads, typename T, typename Visit>
__device__ __forceinline__ void each_chunk(const RowReader<T>& row, int thread, int chunks, float fill,
                                           const Visit& visit) {
  constexpr int kInFlight = kAligned ? 4 : 2;
  constexpr int kChunk = RowReader<T>::kChunk;
  float values[kChunk];
  int j = thread;
  while (j < chunks) {
    if (row.template inside<kAligned>(j) && row.template inside<kAligned>(j + (kInFlight - 1) * kThreads)) {
      uint4 loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) loaded[i] = row.template load<kAligned>(j + i * kThreads);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        RowReader<T>::unpack(loaded[i], values);
        visit(j + i * kThreads, values, true);
      }
      j += kInFlight * kThreads;
    } else {
      if (row.template inside<kAligned>(j)) {
        RowReader<T>::unpack(row.template load<kAligned>(j), values);
      } else {
        row.load_elements(j, fill, values);
      }
      visit(j, values, false);
      j += kThreads;
    }
  }
}

}  // namespace softdimo::cuda
