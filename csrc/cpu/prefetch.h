// Memory wanted next, fetched into the second-level cache while a product keeps the multipliers busy.
#pragma once

#include <cstdint>

#include "softdimo/dtype.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

class Prefetch {
 public:
  // The first `bytes` bytes at each of `count` addresses; the array of addresses must outlive the product.
  // A hint: any address may be given, and a last, partly used line may be left out.
  Prefetch(const void* const* rows, int64_t count, int64_t bytes)
      : rows_(rows), per_row_((bytes + kLine - 1) / kLine), lines_(count * per_row_) {}

  // For products: spreads the lines evenly over `steps` calls of step().
  void start(int64_t steps) {
    steps_ = steps;
    owed_ = 0;
  }
  SOFTDIMO_ALWAYS_INLINE void step() {
    int64_t owed = owed_ + lines_, line = line_;  // members are memory, which would make a chain of every line
    const void* const* rows = rows_;
    for (; owed >= steps_; owed -= steps_) {
      __builtin_prefetch(static_cast<const char*>(*rows) + line * kLine, 0, 2);
      if (++line == per_row_) {
        line = 0;
        ++rows;
      }
    }
    owed_ = owed;
    line_ = line;
    rows_ = rows;
  }

 private:
  static constexpr int64_t kLine = 64;
  const void* const* rows_;
  int64_t per_row_, lines_;
  int64_t line_ = 0, steps_ = 1, owed_ = 0;
};

}  // namespace softdimo::cpu::SOFTDIMO_ISA
