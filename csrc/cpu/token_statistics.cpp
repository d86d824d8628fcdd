// token_statistics on CPUs; compiled once per instruction set.
//
//   log_normalizer = top / T + log(1 + rest)      entropy = log(1 + rest) + (sum exp(s) (-s)) / (1 + rest)
//   max_prob       = 1 / (1 + rest)               s = (z - top) / T, rest without the maximum (row_statistics.h)
//
// No term of the entropy is negative: nothing cancels. One read of the logits, N V exponentials.

#include "softdimo/cpu/token_statistics.h"

#include "row_statistics.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

template <class T>
T row_temperature(const TokenStatistics& s, int64_t row) {
  return s.row_temperature != nullptr ? static_cast<const T*>(s.row_temperature)[row] : static_cast<T>(s.temperature);
}

template <class T>
void statistics(const TokenStatistics& s, int64_t begin, int64_t end) {
  T* out[] = {static_cast<T*>(s.log_normalizer), static_cast<T*>(s.entropy), static_cast<T*>(s.max_prob)};
  alignas(64) T chunk[kRowChunk];
  for (int64_t n = begin; n < end; ++n) {
    if (s.mask != nullptr && !s.mask[n]) {
      for (T* value : out) value[n] = T(0);
      continue;
    }
    const RowReader<T> row{s.logits, s.logits_type, s.logits_rows.offset(n), s.vocabulary,
                           s.logits_rows.offset(smaller(n + 1, end - 1)), chunk};
    const T t = row_temperature<T>(s, n);
    const RowTop<T> top = row_top(row);
    const bool broken = !(top.value - top.value == T(0)) || !(t > T(0));
    const RowSums sums = broken ? RowSums{NAN, NAN} : row_sums<T, true>(row, top, t);
    const double log_total = ::log1p(sums.rest);
    out[0][n] = static_cast<T>(static_cast<double>(top.value) / static_cast<double>(t) + log_total);
    out[1][n] = static_cast<T>(log_total + sums.moment / (1 + sums.rest));
    out[2][n] = static_cast<T>(1 / (1 + sums.rest));
  }
}

}  // namespace

const TokenStatisticsTable& token_statistics_table() {
  static constexpr TokenStatisticsTable table = {statistics<float>, statistics<double>};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
