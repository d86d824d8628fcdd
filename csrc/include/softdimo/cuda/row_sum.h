// Launcher of row_sum: one float per row, to their sum or mean. What operators with a reduction end with.
#pragma once

#include <cstdint>

namespace softdimo::cuda {

// Rows that one block adds up.
constexpr int64_t kRowSumSegment = int64_t{1} << 15;

struct RowSumPartial {
  double total;
  int64_t count;
};

// How many RowSumPartial of workspace the launcher needs: none for rows of a single block.
constexpr int64_t row_sum_partials(int64_t rows) {
  return rows <= kRowSumSegment ? 0 : (rows + kRowSumSegment - 1) / kRowSumSegment;
}

struct RowSumParams {
  const float* values;  // [rows], 0 where not counted
  const float* value;   // not null: *value stands for their sum
  int64_t rows;
  const uint8_t* mask;  // 0: not counted. Null: every row counts
  int64_t mask_stride;
  bool mean;  // divide by the number of counted rows, or by 1 where there is none
  RowSumPartial* partials;
  float* result;
};

// Queues the kernels on `stream` (a cudaStream_t) of the current device and returns cudaSuccess (0) or the error of
// the launch. Neither allocates nor waits.
extern "C" int softdimo_row_sum(const RowSumParams* params, void* stream);

}  // namespace softdimo::cuda
