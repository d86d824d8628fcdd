// exp(distance / t) for distances from a maximum, without a division per element.
#pragma once

#include "simd.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// For distance <= 0: within 1 ulp or so of the float32 closest to exp(distance / t); 0 below the normal range, NaN for
// NaN and for t = NaN.
//
// distance = (n ln 2 + r) t. The multiples of ln 2 are taken off in units of the distance, where t ln 2 is a sum of
// two and the first product exact; only the small rest is divided by t.
template <class T>
class ScaledExp;

template <>
class ScaledExp<float> {
 public:
  SOFTDIMO_ALWAYS_INLINE explicit ScaledExp(float t) : t_(t), moderate_(t > 1e-30f && t < 1e30f) {
    const double step = static_cast<double>(t) * 0.69314718055994531;
    high_ = bits<float>(bits<uint32_t>(static_cast<float>(step)) & 0xFFFFFF00u);  // 16 bits
    low_ = static_cast<float>(step - static_cast<double>(high_));
    inverse_ = 1.0f / t;
    steps_ = static_cast<float>(1.0 / step);
    lowest_ = -87.0f * t;
  }

  SOFTDIMO_ALWAYS_INLINE Vec<float> operator()(Vec<float> distance) const {
    if (!moderate_) return exp_nonpositive(distance / t_);
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Vec<float> shifted = distance * steps_ + kMagic;
    const Vec<float> n = shifted - kMagic;
    const Vec<float> r = ((distance - n * high_) - n * low_) * inverse_;
    Vec<float> poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
    poly = poly * r + 8.3334519073e-3f;
    poly = poly * r + 4.1665795894e-2f;
    poly = poly * r + 1.6666665459e-1f;
    poly = poly * r + 5.0000001201e-1f;
    poly = poly * (r * r) + r + 1.0f;
    const Vec<float> scale = (Vec<float>)(((UintVec)shifted + 127u) << 23);  // 2^n; the magic bits shift out
    return distance < lowest_ ? Vec<float>{} : poly * scale;
  }

  // x / t, within 1 ulp.
  SOFTDIMO_ALWAYS_INLINE Vec<float> over_t(Vec<float> x) const { return moderate_ ? x * inverse_ : x / t_; }

 private:
  float t_, high_, low_, inverse_, steps_, lowest_;
  bool moderate_;
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
