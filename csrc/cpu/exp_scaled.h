// exp(distance / t) for distances from a maximum, without a division per element.
#pragma once

#include "simd.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// For distance <= 0: within 1 ulp or so of the float32 closest to exp(distance / t); 0 below the normal range, NaN for
// NaN and for t = NaN.
//
// distance = (n ln 2 + r) t. The multiples of ln 2 are taken off in units of the distance, where t ln 2 is a sum of
// two and the first product exact; the polynomial of the small rest r t has 1 / t in its coefficients.
template <class T>
class ScaledExp;

// Where 1 / t and its powers are normal: 14 operations a vector, 12 with AVX-512.
class ModerateExp {
 public:
  SOFTDIMO_ALWAYS_INLINE explicit ModerateExp(float t) {
    const double step = static_cast<double>(t) * 0.69314718055994531;
    high_ = bits<float>(bits<uint32_t>(static_cast<float>(step)) & 0xFFFFFF00u);  // 16 bits
    low_ = static_cast<float>(step - static_cast<double>(high_));
    inverse_ = 1.0f / t;
    steps_ = inverse_ * 1.44269504f;
    lowest_ = -87.0f * t;
    const float square = inverse_ * inverse_;  // exp(x) = 1 + x + x^2 (...), within 4e-9 of its size
    second_ = square * 4.9999994040e-1f;
    third_ = square * inverse_ * 1.6666521132e-1f;
    fourth_ = square * square * 4.1668388993e-2f;
    fifth_ = square * square * inverse_ * 8.3687156439e-3f;
    sixth_ = square * square * square * 1.3814602280e-3f;
  }

  SOFTDIMO_ALWAYS_INLINE Vec<float> operator()(Vec<float> distance) const {
    constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Vec<float> shifted = distance * steps_ + kMagic;
    const Vec<float> n = shifted - kMagic;
    const Vec<float> r = (distance - n * high_) - n * low_;
    Vec<float> poly = r * sixth_ + fifth_;
    poly = poly * r + fourth_;
    poly = poly * r + third_;
    poly = poly * r + second_;
    poly = poly * r + inverse_;
    poly = poly * r + 1.0f;
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)distance, _mm512_set1_ps(lowest_), _CMP_NLT_UQ);
    return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)poly, (__m512)n);
#else
    const Vec<float> scale = (Vec<float>)((UintVec)shifted << 23);  // 2^n: 127 is its bias; the magic bits shift out
    return distance < lowest_ ? Vec<float>{} : poly * scale;
#endif
  }

  // x / t, within 1 ulp.
  SOFTDIMO_ALWAYS_INLINE Vec<float> over_t(Vec<float> x) const { return x * inverse_; }

 private:
  float high_, low_, inverse_, steps_, lowest_, second_, third_, fourth_, fifth_, sixth_;
};

template <>
class ScaledExp<float> {
 public:
  SOFTDIMO_ALWAYS_INLINE explicit ScaledExp(float t) : t_(t), is_moderate_(t > 1e-5f && t < 1e5f), moderate_(t) {}

  SOFTDIMO_ALWAYS_INLINE Vec<float> operator()(Vec<float> distance) const {
    return is_moderate_ ? moderate_(distance) : exp_nonpositive(distance / t_);
  }

  // x / t, within 1 ulp.
  SOFTDIMO_ALWAYS_INLINE Vec<float> over_t(Vec<float> x) const { return is_moderate_ ? moderate_.over_t(x) : x / t_; }

  // body(exp), once, with the kind of exponential at hand: no branch is left inside.
  template <class Body>
  SOFTDIMO_ALWAYS_INLINE void with_kind(const Body& body) const {
    is_moderate_ ? body(moderate_) : body(*this);
  }

 private:
  float t_;
  bool is_moderate_;
  ModerateExp moderate_;
};

template <>
class ScaledExp<double> {
 public:
  SOFTDIMO_ALWAYS_INLINE explicit ScaledExp(double t) : t_(t) {}
  SOFTDIMO_ALWAYS_INLINE Vec<double> operator()(Vec<double> distance) const {
    return exp_nonpositive(t_ == 1.0 ? distance : distance / t_);
  }
  SOFTDIMO_ALWAYS_INLINE Vec<double> over_t(Vec<double> x) const { return x / t_; }

 private:
  double t_;
};

}  // namespace softdimo::cpu::SOFTDIMO_ISA
