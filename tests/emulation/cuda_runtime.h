// The part of <cuda_runtime.h> that the kernels use, on top of cuda_emulation.h. Found instead of CUDA's own.
#pragma once

#include "cuda_emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (::emulation::machine().current->thread)
#define blockIdx (::emulation::machine().block)
#define blockDim (::emulation::machine().block_size)
#define gridDim (::emulation::machine().grid_size)

// ---------------------------------------------------------------------------------------------------
// host

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline cudaError_t cudaGetLastError() {
  const int error = emulation::machine().last_error;
  emulation::machine().last_error = 0;
  return static_cast<cudaError_t>(error);
}

// ---------------------------------------------------------------------------------------------------
// vectors

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---------------------------------------------------------------------------------------------------
// memory and bits

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    throw std::logic_error("a load of " + std::to_string(sizeof(T)) + " bytes from an address that is not aligned");
  }
  const auto& may_read = emulation::machine().may_read;
  if (may_read && !may_read(address, sizeof(T))) {
    throw std::logic_error("a load from memory that the kernel has no business with");
  }
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (bits & 31));
}

// ---------------------------------------------------------------------------------------------------
// synchronisation; the default arguments name the caller's line

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::block_barrier({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::exchange(mask, 0, {"__syncwarp", file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const emulation::Table& table = emulation::exchange(mask, value, {"__shfl_sync", file, line});
  const int lane = emulation::machine().current->lane();
  return table.get<T>((lane & ~(width - 1)) | (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const emulation::Table& table = emulation::exchange(mask, value, {"__shfl_xor_sync", file, line});
  const int lane = emulation::machine().current->lane(), source = lane ^ lanes;
  return source < (lane & ~(width - 1)) + width ? table.get<T>(source) : value;
}

// A lane whose source is past its group's end gets its own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const emulation::Table& table = emulation::exchange(mask, value, {"__shfl_down_sync", file, line});
  const int lane = emulation::machine().current->lane(), source = lane + static_cast<int>(distance);
  return source < (lane & ~(width - 1)) + width ? table.get<T>(source) : value;
}
