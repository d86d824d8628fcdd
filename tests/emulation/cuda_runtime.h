// The part of <cuda_runtime.h> that the kernels use, on top of cuda_emulation.h. Found instead of CUDA's own.
#pragma once

#include "cuda_emulation.h"
#include "emulated_launch.h"
#include "emulated_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::emulation::machine().current->thread)
#define blockIdx (::emulation::machine().block)
#define blockDim (::emulation::machine().block_size)
#define gridDim (::emulation::machine().grid_size)

// ---------------------------------------------------------------------------------------------------
// host

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() {
  const int error = emulation::machine().last_error;
  emulation::machine().last_error = 0;
  return static_cast<cudaError_t>(error);
}

// Of a kernel: launches of it may then have that much dynamic shared memory.
template <typename... Arguments>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Arguments...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > static_cast<int>(emulation::kMostShared)) return cudaErrorInvalidValue;
  emulation::machine().dynamic_limit[emulation::address_of(kernel)] = bytes;
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------
// vectors

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---------------------------------------------------------------------------------------------------
// memory

template <typename T>
T __ldg(const T* address) {
  return emulation::load(address);
}

template <typename T>
T __ldcs(const T* address) {
  return emulation::load(address);
}

template <typename T>
void __stwb(T* address, T value) {
  emulation::store(address, value);
}

template <typename T>
void __stcs(T* address, T value) {
  emulation::store(address, value);
}

// ---------------------------------------------------------------------------------------------------
// bits and arithmetic

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

inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }

using std::max;
using std::min;

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

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

// A lane whose source is past its group's end, or before its start, gets its own value.
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const emulation::Table& table = emulation::exchange(mask, value, {"__shfl_up_sync", file, line});
  const int lane = emulation::machine().current->lane(), source = lane - static_cast<int>(distance);
  return source >= (lane & ~(width - 1)) ? table.get<T>(source) : value;
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const emulation::Table& table = emulation::exchange(mask, value, {"__shfl_down_sync", file, line});
  const int lane = emulation::machine().current->lane(), source = lane + static_cast<int>(distance);
  return source < (lane & ~(width - 1)) + width ? table.get<T>(source) : value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const emulation::Table& table = emulation::exchange(mask, predicate, {"__ballot_sync", file, line});
  unsigned votes = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) {
    if (table.lanes >> lane & 1 && table.get<int>(lane) != 0) votes |= 1u << lane;
  }
  return votes;
}

inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
