// ldmatrix and mma.sync. The last lane to come does the work of the whole warp.
#pragma once

#include "cuda_runtime.h"
#include "emulated_memory.h"

namespace emulation {

// r[i] = two neighbours of matrix i, or of its transpose; lane 8 i + row points to the matrix's row.
template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t (&r)[kMatrices], const void* shared_row, Place place) {
  struct Registers {
    uint32_t r[kMatrices];
  };
  struct Operand {
    const void* row;
    Registers registers;
  };
  const auto load = [&](Table& table) {
    uint16_t element[kMatrices][8][8];
    for (int i = 0; i < 8 * kMatrices; ++i) {
      const void* row = table.get<const void*>(i);
      check_shared_16("a matrix's row", row);
      banks().matrix_row(place, i, row);
      std::memcpy(element[i / 8][i % 8], row, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      Registers registers;
      for (int i = 0; i < kMatrices; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4);
        const uint32_t low = kTransposed ? element[i][column][row] : element[i][row][column];
        const uint32_t high = kTransposed ? element[i][column + 1][row] : element[i][row][column + 1];
        registers.r[i] = high << 16 | low;
      }
      table.set(lane, Operand{nullptr, registers});
    }
  };
  const Table& table = collective(~0u, Operand{shared_row, {}}, place, load);
  const Registers registers = table.get<Operand>(machine().current->lane()).registers;
  std::memcpy(r, registers.r, sizeof(r));
}

// Towards zero, as tensor cores cut their sums off.
inline float cut_off(double value) {
  const float nearest = static_cast<float>(value);
  if (!(std::fabs(static_cast<double>(nearest)) > std::fabs(value)) || std::isinf(nearest)) return nearest;
  return __uint_as_float(__float_as_uint(nearest) - 1);
}

struct MatrixFragments {
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
};

// d += a b for fragments laid out as csrc/include/softdimo/cuda/ptx.cuh says. Groups of eight products are added to d
// at a time; `to_float` converts the 16 bits of an element.
template <typename ToFloat>
void multiply(Table& table, const ToFloat& to_float) {
  double a[16][16], b[8][16];  // b by columns
  MatrixFragments fragments[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    fragments[lane] = table.get<MatrixFragments>(lane);
    const int g = lane / 4, q = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const auto element = [&](uint32_t word) { return to_float(static_cast<uint16_t>(word >> 16 * half)); };
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * q + i / 2 * 8 + half] = element(fragments[lane].a[i]);
      for (int i = 0; i < 2; ++i) b[g][2 * q + i * 8 + half] = element(fragments[lane].b[i]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      float& d = fragments[lane].d[i];
      for (int start = 0; start < 16; start += 8) {
        double sum = 0.0;
        for (int k = start; k < start + 8; ++k) sum += a[row][k] * b[column][k];
        d = cut_off(d + sum);
      }
    }
    table.set(lane, fragments[lane]);
  }
}

template <typename ToFloat>
void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place,
                       const ToFloat& to_float) {
  const MatrixFragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const Table& table = collective(~0u, mine, place, [&](Table& all) { multiply(all, to_float); });
  const MatrixFragments result = table.get<MatrixFragments>(machine().current->lane());
  std::memcpy(d, result.d, sizeof(d));
}

}  // namespace emulation
