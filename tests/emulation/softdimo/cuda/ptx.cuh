// Twin of csrc/include/softdimo/cuda/ptx.cuh.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "emulated_matrix.h"
#include "emulated_memory.h"

// The caller's line, for reports.
#define SOFTDIMO_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace softdimo::cuda::ptx {

// The device may be off by 2 ulp; this is always off, up or down by the argument's last bit, except at 0.
inline float exp2_approx(float x) {
  if (x == 0.0f) return 1.0f;
  const double error = __float_as_uint(x) & 1 ? 0x1p-22 : -0x1p-22;
  const float y = static_cast<float>(std::exp2(static_cast<double>(x)) * (1.0 + error));
  return y < 0x1p-126f ? 0.0f : y;
}

// Off by 2^-22, as the device may be, and up or down by the argument's last bit.
inline float log2_approx(float x) {
  if (std::fabs(x) < 0x1p-126f) return -INFINITY;
  const double error = __float_as_uint(x) & 1 ? 0x1p-22 : -0x1p-22;
  const double y = std::log2(static_cast<double>(x));
  return static_cast<float>(x > 0.5f && x < 2.0f ? y + error : y * (1.0 + error));
}

// Off by 2^-23, up or down by the argument's last bit.
inline float reciprocal_approx(float x) {
  const double error = __float_as_uint(x) & 1 ? 0x1p-23 : -0x1p-23;
  return static_cast<float>((1.0 + error) / static_cast<double>(x));
}

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t{__float2bfloat16_rn(high).bits} << 16 | __float2bfloat16_rn(low).bits;
}

inline uint32_t pack_f16(float low, float high) {
  return uint32_t{__float2half_rn(high).bits} << 16 | __float2half_rn(low).bits;
}

// Of the bits of each half, by what they mean.
template <typename Meaning>
uint32_t larger_halves(uint32_t a, uint32_t b, const Meaning& meaning) {
  const auto larger = [&](unsigned first, unsigned second) {
    const float x = meaning(static_cast<uint16_t>(first)), y = meaning(static_cast<uint16_t>(second));
    return uint32_t{std::isnan(x) || y > x ? second : first};
  };
  return larger(a >> 16, b >> 16) << 16 | larger(a & 0xffffu, b & 0xffffu);
}

inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  return larger_halves(a, b, [](uint16_t bits) { return __bfloat162float({bits}); });
}

inline uint32_t max_f16x2(uint32_t a, uint32_t b) {
  return larger_halves(a, b, [](uint16_t bits) { return __half2float({bits}); });
}

inline uint32_t max_or_nan_bf16(uint32_t a, uint32_t b) {
  const float low = max_or_nan(__uint_as_float(a << 16), __uint_as_float(b << 16));
  return pack_bf16(low, max_or_nan(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u)));
}

inline uint32_t max_or_nan_f16(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t word, int shift) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> shift)));
  };
  return pack_f16(max_or_nan(half(a, 0), half(b, 0)), max_or_nan(half(a, 16), half(b, 16)));
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SOFTDIMO_CALLER) {
  ::emulation::multiply_matrices(d, a, b, {"mma", file, line},
                                 [](uint16_t bits) { return __bfloat162float({bits}); });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SOFTDIMO_CALLER) {
  ::emulation::multiply_matrices(d, a, b, {"mma", file, line}, [](uint16_t bits) { return __half2float({bits}); });
}

inline void load_matrix_x1(uint32_t& r, const void* shared_row, SOFTDIMO_CALLER) {
  uint32_t registers[1];
  ::emulation::load_matrices<1, false>(registers, shared_row, {"ldmatrix", file, line});
  r = registers[0];
}

inline void load_matrix_x1_transposed(uint32_t& r, const void* shared_row, SOFTDIMO_CALLER) {
  uint32_t registers[1];
  ::emulation::load_matrices<1, true>(registers, shared_row, {"ldmatrix", file, line});
  r = registers[0];
}

inline void load_matrix_x2(uint32_t (&r)[2], const void* shared_row, SOFTDIMO_CALLER) {
  ::emulation::load_matrices<2, false>(r, shared_row, {"ldmatrix", file, line});
}

inline void load_matrix_x2_transposed(uint32_t (&r)[2], const void* shared_row, SOFTDIMO_CALLER) {
  ::emulation::load_matrices<2, true>(r, shared_row, {"ldmatrix", file, line});
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* shared_row, SOFTDIMO_CALLER) {
  ::emulation::load_matrices<4, false>(r, shared_row, {"ldmatrix", file, line});
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row, SOFTDIMO_CALLER) {
  ::emulation::load_matrices<4, true>(r, shared_row, {"ldmatrix", file, line});
}

inline void prefetch_l2(const void* global) { ::emulation::check_readable(global, 1); }

inline void copy_async_16(void* shared, const void* global, int bytes, SOFTDIMO_CALLER) {
  ::emulation::start_copy_16(shared, global, bytes, {"cp.async", file, line});
}

inline void commit_copies() { ::emulation::commit_copies(); }

template <int kPending>
void wait_copies() {
  ::emulation::wait_copies(kPending);
}

}  // namespace softdimo::cuda::ptx

#undef SOFTDIMO_CALLER
