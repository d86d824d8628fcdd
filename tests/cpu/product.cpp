// Checks the matrix products of one instruction set against sums in double: prints what is wrong.

#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/gemm_bf16.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using namespace softdimo;
using namespace softdimo::cpu::SOFTDIMO_ISA;

constexpr float kGuard = 12345.0f;
int failures = 0;

void check(bool good, const char* what, int64_t m, int64_t n, int64_t k) {
  if (good) return;
  ++failures;
  std::printf("%s: M %ld, N %ld, K %ld\n", what, static_cast<long>(m), static_cast<long>(n), static_cast<long>(k));
}

// Reproducible values in [-1, 1), of a few sizes.
std::vector<float> values(int64_t count, uint32_t seed) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = seed * 2654435761u + 1;
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f * (state % 7 == 0 ? 1e-3f : 1.0f);
  }
  return out;
}

// What a product writes into: rows of `stride`, guards everywhere.
struct Output {
  int64_t stride;
  std::vector<float> c;
  Output(int64_t rows, int64_t columns) : stride(columns + 5), c(static_cast<size_t>((rows + 1) * stride), kGuard) {}
};

// |c - sum| <= tolerance * sum of sizes, guards intact beyond `written` columns.
void check_output(const Output& out, const std::vector<float>& a, const std::vector<float>& b, int64_t m, int64_t n,
                  int64_t k, int64_t written, double start, double tolerance) {
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = start, size = std::fabs(start);
      for (int64_t l = 0; l < k; ++l) {
        const double term = static_cast<double>(a[i * k + l]) * static_cast<double>(b[l * n + j]);
        sum += term;
        size += std::fabs(term);
      }
      worst = std::fmax(worst, std::fabs(out.c[i * out.stride + j] - sum) / (size + 1e-30));
    }
    const float* guards = &out.c[i * out.stride];
    for (int64_t j = written; j < out.stride; ++j) check(guards[j] == kGuard, "wrote beyond N", m, n, k);
  }
  for (int64_t j = 0; j < out.stride; ++j) check(out.c[m * out.stride + j] == kGuard, "wrote beyond M", m, n, k);
  check(worst <= tolerance, "wrong sums", m, n, k);
}

bool same_row(const Output& whole, int64_t row, const Output& alone, int64_t n) {
  return std::memcmp(&whole.c[row * whole.stride], alone.c.data(), static_cast<size_t>(n) * sizeof(float)) == 0;
}

template <class Multiply>
void check_product(Multiply multiply, const std::vector<float>& a, const std::vector<float>& b, int64_t m, int64_t n,
                   int64_t k, int64_t written, double tolerance) {
  const std::vector<const void*> wanted = {a.data(), b.data()};
  Prefetch prefetch(wanted.data(), 2, 1000);
  Output out(m, written), sum(m, written);
  multiply(0, m, out, false, &prefetch);
  check_output(out, a, b, m, n, k, written, 0.0, tolerance);
  for (int64_t i = 0; i < m; ++i) std::fill_n(&sum.c[i * sum.stride], written, 3.0f);
  multiply(0, m, sum, true, nullptr);
  check_output(sum, a, b, m, n, k, written, 3.0, tolerance);
  for (int64_t row = 0; row < m; row += 5) {
    Output alone(1, written);
    multiply(row, 1, alone, false, nullptr);
    check(same_row(out, row, alone, n), "a row's bits depend on others", m, n, k);
  }
}

void check_float(int64_t m, int64_t n, int64_t k) {
  const std::vector<float> a = values(m * k, 1), b = values(k * n, 2);
  const int64_t width = panel_width<float>(n), wide = padded<float>(n);
  std::vector<float> packed(static_cast<size_t>(wide * k));
  for (int64_t l = 0; l < k; ++l) {
    for (int64_t j = 0; j < n; ++j) packed[(j / width * k + l) * width + j % width] = b[l * n + j];
  }
  check_product(
      [&](int64_t row, int64_t rows, Output& out, bool add, Prefetch* prefetch) {
        gemm<float>(rows, wide, k, {a.data() + row * k, k, 1}, packed.data(), k * width, width, out.c.data(),
                    out.stride, add, prefetch);
      },
      a, b, m, n, k, wide, 1e-6);
}

#ifdef __AVX512BF16__

std::vector<float> rounded(std::vector<float> in) {
  for (float& x : in) x = from_bfloat16(to_bfloat16(x));
  return in;
}

std::vector<float> transposed(const std::vector<float>& in, int64_t rows, int64_t columns) {
  std::vector<float> out(in.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = in[i * columns + j];
  }
  return out;
}

// Every third element is used: neither stride is 1.
std::vector<float> spread(const std::vector<float>& in) {
  std::vector<float> out(in.size() * 3, kGuard);
  for (size_t i = 0; i < in.size(); ++i) out[3 * i] = in[i];
  return out;
}

void check_packing_right(const std::vector<float>& b, const std::vector<Bfloat16>& packed, int64_t n, int64_t k) {
  const std::vector<float> across = transposed(b, k, n), apart = spread(b);
  const Table tables[] = {{across.data(), DType::float32, 0, 1, k}, {apart.data(), DType::float32, 0, 3 * n, 3}};
  std::vector<Bfloat16> other(packed.size(), 0x7FC0);
  for (const Table& table : tables) {
    const int64_t steps = padded_depth(k) / kDepthStep;
    pack_right(table, k, n, steps / 2, steps, other.data());
    pack_right(table, k, n, 0, steps / 2, other.data());
    check(other == packed, "packing B from other strides", 0, n, k);
  }
  std::vector<Bfloat16> pairs(packed.size(), 0x7FC0);
  for (int64_t l = 0; l < k; l += 2) {
    pack_right_pair(&b[l * n], l + 1 < k ? &b[(l + 1) * n] : nullptr, n, k, l / 2, pairs.data());
  }
  clear_pairs(n, k, pairs.data());
  check(pairs == packed, "packing B from pairs of rows", 0, n, k);
}

void check_packing_left(const std::vector<float>& a, const std::vector<Bfloat16>& packed, int64_t m, int64_t k,
                        int64_t a_row) {
  const std::vector<float> across = transposed(a, m, k);
  std::vector<Bfloat16> other(packed.size());
  pack_left({across.data(), DType::float32, 0, 1, m}, m, k, other.data(), a_row);
  check(other == packed, "packing A from columns", m, 0, k);
  std::vector<Bfloat16> rows(packed.size());
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0, size = 0;
    for (int64_t l = 0; l < k; ++l) {
      const double value = from_bfloat16(to_bfloat16(a[i * k + l]));
      sum += value;
      size += std::fabs(value);
    }
    const float total = pack_left_row(&a[i * k], k, &rows[i * a_row]);
    check(std::fabs(total - sum) <= 1e-6 * size, "a packed row's sum", m, 0, k);
  }
  check(rows == packed, "packing A row by row", m, 0, k);
}

void check_bfloat16(int64_t m, int64_t n, int64_t k) {
  const std::vector<float> a = values(m * k, 1), b = values(k * n, 2);
  const int64_t a_row = padded_depth(k) + kLeftPad, wide = padded_columns(n);
  std::vector<Bfloat16> left(static_cast<size_t>(m * a_row)), right(static_cast<size_t>(right_size(k, n)), 0x7FC0);
  pack_left({a.data(), DType::float32, 0, k, 1}, m, k, left.data(), a_row);
  pack_right({b.data(), DType::float32, 0, n, 1}, k, n, 0, padded_depth(k) / kDepthStep, right.data());
  check_packing_left(a, left, m, k, a_row);
  check_packing_right(b, right, n, k);
  const ProductScope scope;
  check_product(
      [&](int64_t row, int64_t rows, Output& out, bool add, Prefetch* prefetch) {
        gemm_bf16(rows, wide, k, left.data() + row * a_row, a_row, right.data(), right_panel(k), out.c.data(),
                  out.stride, add, prefetch);
      },
      rounded(a), rounded(b), m, n, k, wide, 1e-6);
}

#endif

}  // namespace

int main() {
#ifdef __AMX_BF16__
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 1;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif
  const int64_t sizes[][3] = {{1, 1, 1},    {1, 16, 32},  {3, 7, 5},     {14, 32, 64}, {16, 48, 33},
                              {17, 33, 31}, {31, 64, 96}, {33, 80, 130}, {64, 31, 1},  {75, 96, 300}};
  for (const auto& size : sizes) {
    check_float(size[0], size[1], size[2]);
#ifdef __AVX512BF16__
    check_bfloat16(size[0], size[1], size[2]);
#endif
  }
  return failures > 0;
}
