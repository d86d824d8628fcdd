// Reads and writes rows of float32, bfloat16 or float16, eight entries (an octet) at a time. The element type is known
// when running: kernels that take several tensors of mixed types are compiled once.
//
//   columns    0 ....... 7 | 8 ...... 15 | ...        16 bits: an octet is one word of 16 bytes, float32: two
//              octet 0       octet 1       ...
//
// Octet j is columns [8 j, 8 j + 8) wherever the row starts in memory, so what a thread computes follows from the row's
// contents alone. Rows on a 16-byte boundary are read and written in 128-bit words. Other rows are read in the aligned
// words around the octet, shifted (as in row_reader.cuh), and written entry by entry. Octets at a row's ends are read
// and written entry by entry wherever a word would leave the row.
#pragma once

#include <cstdint>

#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/row_reader.cuh"
#include "softdimo/dtype.h"

namespace softdimo::cuda {

constexpr int kOctet = 8;

__device__ __forceinline__ int octets_of(int columns) { return (columns + kOctet - 1) / kOctet; }

// The bytes of an octet; 16-bit types leave `high` alone.
struct OctetBytes {
  uint4 low, high;
};

class OctetReader {
 public:
  // Nothing to read: a tensor that is not there.
  __device__ __forceinline__ OctetReader() : row_(nullptr), columns_(0), type_(DType::float32) {}

  __device__ __forceinline__ OctetReader(const void* first, DType type, int64_t stride, int64_t row, int columns)
      : row_(static_cast<const char*>(first) + row * stride * (type == DType::float32 ? 4 : 2)),
        columns_(columns),
        type_(type) {}

  __device__ __forceinline__ bool aligned() const { return misplaced() == 0; }

  // Octet j of an aligned row, all of which is inside.
  __device__ __forceinline__ OctetBytes load_aligned(int j) const {
    const uint4* word = reinterpret_cast<const uint4*>(row_);
    if (type_ != DType::float32) return {__ldg(word + j), {}};
    return {__ldg(word + 2 * j), __ldg(word + 2 * j + 1)};
  }

  // Any octet of any row; -inf past the row's end.
  __device__ __forceinline__ OctetBytes load(int j) const {
    const int words = type_ == DType::float32 ? 2 : 1;
    const int before = misplaced(), per_word = kOctet / words, offset = before * per_word / 16;
    if (before == 0 && (j + 1) * kOctet <= columns_) return load_aligned(j);
    // Of a row that is not aligned one word more is read, which starts in the row only from the second octet on.
    if (j == 0 || (words * (j + 1) + 1) * per_word - offset > columns_) return load_entries(j);
    const uint4* word = reinterpret_cast<const uint4*>(row_ - before) + words * j;
    const uint4 first = __ldg(word), second = __ldg(word + 1);
    const unsigned bytes = static_cast<unsigned>(before);
    if (words == 1) return {shift_bytes(first, second, bytes), {}};
    return {shift_bytes(first, second, bytes), shift_bytes(second, __ldg(word + 2), bytes)};
  }

  __device__ __forceinline__ void unpack(const OctetBytes& bytes, float (&values)[kOctet]) const {
    const uint32_t word[8] = {bytes.low.x,  bytes.low.y,  bytes.low.z,  bytes.low.w,
                              bytes.high.x, bytes.high.y, bytes.high.z, bytes.high.w};
    if (type_ == DType::float32) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = __uint_as_float(word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kOctet / 2; ++i) {
        const float2 pair =
            type_ == DType::bfloat16 ? unpack_pair<__nv_bfloat16>(word[i]) : unpack_pair<__half>(word[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    }
  }

 private:
  // Bytes between the 16-byte boundary at or before the row, and the row.
  __device__ __forceinline__ int misplaced() const { return static_cast<int>(reinterpret_cast<uintptr_t>(row_) % 16); }

  __device__ __forceinline__ OctetBytes load_entries(int j) const {
    uint32_t word[8] = {};
    if (type_ == DType::float32) {
      const uint32_t* row = reinterpret_cast<const uint32_t*>(row_);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) word[i] = j * kOctet + i < columns_ ? __ldg(row + j * kOctet + i) : 0xff800000u;
    } else {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(row_);
      const uint32_t infinity = type_ == DType::bfloat16 ? 0xff80u : 0xfc00u;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const uint32_t entry = j * kOctet + i < columns_ ? __ldg(row + j * kOctet + i) : infinity;
        word[i / 2] |= entry << 16 * (i % 2);
      }
    }
    return {make_uint4(word[0], word[1], word[2], word[3]), make_uint4(word[4], word[5], word[6], word[7])};
  }

  const char* row_;
  int columns_;
  DType type_;
};

// Writes a row of a contiguous [rows, columns] output.
class OctetWriter {
 public:
  __device__ __forceinline__ OctetWriter(void* first, DType type, int64_t row, int columns)
      : row_(first == nullptr ? nullptr
                              : static_cast<char*>(first) + row * columns * (type == DType::float32 ? 4 : 2)),
        columns_(columns),
        type_(type) {}

  // Whether there is such an output.
  __device__ __forceinline__ bool wanted() const { return row_ != nullptr; }

  __device__ __forceinline__ void store(int j, const float (&values)[kOctet]) const {
    const bool whole = reinterpret_cast<uintptr_t>(row_) % 16 == 0 && (j + 1) * kOctet <= columns_;
    uint4* word = reinterpret_cast<uint4*>(row_);
    if (type_ == DType::float32) {
      if (whole) {
        word[2 * j] = make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                                 __float_as_uint(values[3]));
        word[2 * j + 1] = make_uint4(__float_as_uint(values[4]), __float_as_uint(values[5]),
                                     __float_as_uint(values[6]), __float_as_uint(values[7]));
        return;
      }
      float* row = reinterpret_cast<float*>(row_) + j * kOctet;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (j * kOctet + i < columns_) row[i] = values[i];
      }
      return;
    }
    uint32_t pair[kOctet / 2];
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) pair[i] = pack(values[2 * i], values[2 * i + 1]);
    if (whole) {
      word[j] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
      return;
    }
    uint16_t* row = reinterpret_cast<uint16_t*>(row_) + j * kOctet;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (j * kOctet + i < columns_) row[i] = static_cast<uint16_t>(pair[i / 2] >> 16 * (i % 2));
    }
  }

  __device__ __forceinline__ void store_entry(int column, float value) const {
    if (type_ == DType::float32) {
      reinterpret_cast<float*>(row_)[column] = value;
    } else {
      reinterpret_cast<uint16_t*>(row_)[column] = static_cast<uint16_t>(pack(value, value));
    }
  }

 private:
  __device__ __forceinline__ uint32_t pack(float low, float high) const {
    return type_ == DType::bfloat16 ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
  }

  char* row_;
  int columns_;
  DType type_;
};

}  // namespace softdimo::cuda
