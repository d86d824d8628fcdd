// Checks the conversions of rows of one instruction set against the conversions of single numbers: prints
// what is wrong.

#include <cstdio>
#include <vector>

#include "cpu/convert.h"

namespace {

using namespace softdimo;
using namespace softdimo::cpu::SOFTDIMO_ISA;

int failures = 0;

void check(bool good, const char* what, uint32_t value) {
  if (good) return;
  if (++failures < 20) std::printf("%s: %08x\n", what, value);
}

bool is_nan(float f) { return f != f; }
bool is_nan16(uint16_t h) { return (h & 0x7FFF) > 0x7C00; }

void check_widening() {
  constexpr int64_t kCount = 65536;
  std::vector<uint16_t> halves(kCount);
  for (int64_t i = 0; i < kCount; ++i) halves[static_cast<size_t>(i)] = static_cast<uint16_t>(i);
  std::vector<float> brain(kCount), half(kCount);
  std::vector<double> wide(kCount);
  widen(halves.data(), DType::bfloat16, 0, kCount, brain.data());
  widen(halves.data(), DType::float16, 0, kCount, half.data());
  widen(halves.data(), DType::float16, 0, kCount, wide.data());
  for (int64_t i = 0; i < kCount; ++i) {
    const uint16_t h = static_cast<uint16_t>(i);
    check(bits<uint32_t>(brain[i]) == bits<uint32_t>(from_bfloat16(h)), "widening bfloat16", h);
    const bool nan = is_nan16(h);
    check(nan ? is_nan(half[i]) : bits<uint32_t>(half[i]) == bits<uint32_t>(from_float16(h)), "widening float16", h);
    check(nan ? wide[i] != wide[i] : wide[i] == static_cast<double>(half[i]), "widening float16 to double", h);
  }
}

// A spread of all floats: every exponent, both signs, ties, subnormal numbers, infinity, NaN.
std::vector<float> floats() {
  std::vector<float> out;
  for (uint64_t u = 0; u < (uint64_t{1} << 32); u += 20011) out.push_back(bits<float>(static_cast<uint32_t>(u)));
  for (uint32_t h = 0; h < 65536; ++h) {
    for (uint32_t low : {0u, 1u, 0x0FFFu, 0x1000u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      out.push_back(bits<float>((h << 16) | low));
    }
  }
  return out;
}

void check_narrowing() {
  const std::vector<float> in = floats();
  std::vector<uint16_t> brain(in.size()), half(in.size());
  narrow(in.data(), static_cast<int64_t>(in.size()), brain.data(), DType::bfloat16, 0);
  narrow(in.data(), static_cast<int64_t>(in.size()), half.data(), DType::float16, 0);
  for (size_t i = 0; i < in.size(); ++i) {
    const uint32_t u = bits<uint32_t>(in[i]);
    check(brain[i] == to_bfloat16(in[i]), "narrowing to bfloat16", u);
    check(is_nan(in[i]) ? is_nan16(half[i]) : half[i] == to_float16(in[i]), "narrowing to float16", u);
  }
}

// Rows of every length and alignment, written through the caches and past them, are the same; nothing else is written.
void check_streaming(DType dtype) {
  constexpr int64_t kMost = 100, kRoom = 256;
  std::vector<float> in(kMost);
  for (int64_t i = 0; i < kMost; ++i) in[static_cast<size_t>(i)] = static_cast<float>(i) * 0.37f - 11.0f;
  for (int64_t first = 0; first < 70; ++first) {
    for (int64_t n = 0; n <= kMost; n += n < 40 ? 1 : 13) {
      std::vector<char> plain(kRoom * 8, 0x55), streamed(kRoom * 8, 0x55);
      narrow(in.data(), n, plain.data(), dtype, first);
      narrow_streaming(in.data(), n, streamed.data(), dtype, first);
      finish_streaming();
      check(plain == streamed, "streaming", static_cast<uint32_t>(first * 1000 + n));
    }
  }
}

}  // namespace

int main() {
  check_widening();
  check_narrowing();
  for (DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16}) check_streaming(dtype);
  return failures > 0;
}
