// Forward of masked_attention; masked_attention.cpp says what it computes.
#pragma once

#include <cmath>

#include "attention_products.h"
#include "scratch.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

constexpr int64_t kForwardKeys = 512;

template <class P>
struct ForwardScratch {
  using T = typename P::Number;
  using E = typename P::Entry;
  ForwardScratch(const MaskedAttention& a, int64_t chunk)
      : most_keys(smaller(rounded_up(a.keys, 32), kForwardKeys)),
        slabs(a.keys > kForwardKeys ? (chunk + kRows - 1) / kRows : 0),
        score_row(most_keys + kPad),
        output_row(rounded_up(a.value_width, 32) + kPad),
        keys(P::block_size(most_keys, a.width)),
        values(P::block_size(most_keys, a.value_width)),
        queries(P::block_size(kRows, a.width)),
        keys_across(P::across_size(most_keys, a.width)),
        values_right(P::right_size(most_keys, a.value_width)),
        weights(P::weight_rows_size(kRows, most_keys)),
        scores(kRows * (score_row > output_row ? score_row : output_row)),
        output((slabs > 0 ? slabs : 1) * kRows * output_row),
        top(rounded_up(chunk, 32)),
        sum(rounded_up(chunk, 32)),
        shrink(rounded_up(kRows, kLanes<T>)),
        chosen(a.keys, chunk),
        ahead(2 * chunk + kRows + 2 * a.keys, row_bytes(a)) {}

  // Of the block that starts with this query. Where it can be, in the place of its scores: that is in the cache.
  T* output_of(int64_t query) const {
    if (slabs > 0) return output.get() + query * output_row;
    return P::kCopiesWeights ? scores.get() : output.get();
  }

  static constexpr int64_t kRows = P::kForwardRows;
  int64_t most_keys, slabs, score_row, output_row;
  Scratch<E> keys, values, queries, keys_across, values_right, weights;
  Scratch<T> scores, output, top, sum, shrink;
  TakingPart chosen;
  Ahead ahead;
};

// The largest of a row, or, of scores that a negative scale turns around, the smallest; NaN only where all are.
template <class T, bool kLargest>
SOFTDIMO_ALWAYS_INLINE Vec<T> extremes(const T* row, int64_t count) {
  constexpr T kLeast = kLargest ? -HUGE_VAL : HUGE_VAL;
  const auto further = [](Vec<T> a, Vec<T> b) { return (kLargest ? a > b : a < b) ? a : b; };
  Vec<T> best = splat(kLeast), second = best;
  int64_t j = 0;
  for (; j + 2 * kLanes<T> <= count; j += 2 * kLanes<T>) {
    best = further(load(row + j), best);
    second = further(load(row + j + kLanes<T>), second);
  }
  for (; j < count; j += kLanes<T>) {
    const Vec<T> last = load(row + j);
    best = further(count - j < kLanes<T> ? first_lanes_or<T>(last, count - j, splat<T>(kLeast)) : last, best);
  }
  return further(second, best);
}

// Scores of kLanes rows, of which `rows` count, become weights exp(s - max); updates the running maxima and sums of the
// rows, and says by how much what was summed before shrinks.
template <class P, class T = typename P::Number>
void weigh(T* scores, int64_t row, int64_t rows, int64_t keys, T scale, typename P::Entry* weights, int64_t weights_row,
           T* top, T* sum, T* shrink) {
  constexpr int kLane = kLanes<T>;
  Vec<T> part[kLane];
  for (int64_t m = 0; m < kLane; ++m) {
    const T* from = scores + smaller(m, rows - 1) * row;
    const bool turned = scale < T(0) && !P::kScalesQueries;
    part[m] = P::scaled(turned ? extremes<T, false>(from, keys) : extremes<T, true>(from, keys), scale);
  }
  fold_rows<T>(part, [](Vec<T> a, Vec<T> b) { return a > b ? a : b; });
  const Vec<T> found = part[0], before = load(top), best = found > before ? found : before;
  // No score above -inf yet: all weights are zero.
  alignas(64) T shift[kLane];
  store(shift, best == T(-HUGE_VAL) ? Vec<T>{} : best);
  for (int64_t m = 0; m < kLane; ++m) {
    part[m] = m < rows ? P::weigh_row(scores + m * row, keys, scale, shift[m], weights + m * weights_row) : Vec<T>{};
  }
  fold_rows<T>(part, [](Vec<T> a, Vec<T> b) { return a + b; });
  const Vec<T> factor = exp_nonpositive(before - load(shift));
  store(sum, load(sum) * factor + part[0]);
  store(top, best);
  store(shrink, factor);
}

// What one block of keys needs in scratch memory.
template <class P>
struct ForwardKeys {
  typename P::Right keys, values;
  int64_t count;
};

template <class P>
ForwardKeys<P> read_keys(const MaskedAttention& a, const Place& at, ForwardScratch<P>& x, int64_t first,
                         int64_t count) {
  using T = typename P::Number;
  const Block<typename P::Entry> keys{x.keys.get(), P::row_stride(a.width), count, a.width};
  const Block<typename P::Entry> values{x.values.get(), P::row_stride(a.value_width), count, a.value_width};
  read_block<P>(a.key, at, x.chosen.kept.get() + first, T(1), keys);
  read_block<P>(a.value, at, x.chosen.kept.get() + first, T(1), values);
  return {P::right_across(keys, x.keys_across.get()), P::right(values, x.values_right.get()), count};
}

// One block of keys with one block of wanted queries [first, first + rows): adds to their output [rows, d_v].
template <class P>
void forward_block(const AttentionForward& f, const Place& at, ForwardScratch<P>& x, const ForwardKeys<P>& block,
                   int64_t first, int64_t rows, typename P::Number* output, bool add, int64_t products_left) {
  using T = typename P::Number;
  const MaskedAttention& a = f.call;
  const T scale = static_cast<T>(a.scale);
  const int64_t row = x.score_row, keys = block.count;
  const Block<typename P::Entry> queries{x.queries.get(), P::row_stride(a.width), rows, a.width};
  read_block<P>(a.query, at, x.chosen.wanted.get() + first, P::kScalesQueries ? scale : T(1), queries);
  T* const scores = x.scores.get();
  P::multiply(rows, keys, a.width, P::left(queries), block.keys, scores, row, false,
              x.ahead.share(products_left));
  const Block<typename P::Entry> weights = P::weight_rows(scores, row, rows, keys, x.weights.get());
  for (int64_t m = 0; m < rows; m += kLanes<T>) {
    weigh<P>(scores + m * row, row, smaller(kLanes<T>, rows - m), keys, scale, weights.data + m * weights.row,
             weights.row, x.top.get() + first + m, x.sum.get() + first + m, x.shrink.get() + m);
  }
  for (int64_t m = 0; m < rows && add; ++m) {
    for (int64_t d = 0; d < a.value_width; ++d) output[m * x.output_row + d] *= x.shrink[m];
  }
  P::multiply(rows, a.value_width, keys, P::left(weights), block.values, output, x.output_row, add,
              x.ahead.share(products_left - 1));
}

// Output and statistics of wanted queries [first, first + rows).
template <class P>
void write_output(const AttentionForward& f, const Place& at, const ForwardScratch<P>& x, int64_t first, int64_t rows,
                  typename P::Number* output) {
  using T = typename P::Number;
  const MaskedAttention& a = f.call;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = at.index * a.queries + x.chosen.wanted[first + m];
    static_cast<T*>(f.row_max)[row] = x.top[first + m];
    static_cast<T*>(f.row_sum)[row] = x.sum[first + m];
    P::write_row(output + m * x.output_row, a.value_width, T(1) / x.sum[first + m], f.output, a.query.type,
                 row * a.value_width);
  }
}

// Zeros in the output and the statistics of queries [begin, end), but for the output of wanted ones.
template <class P>
void clear_unwanted(const AttentionForward& f, const Place& at, const ForwardScratch<P>& x, int64_t begin,
                    int64_t end) {
  using T = typename P::Number;
  const int64_t first = at.index * f.call.queries, bytes = f.call.value_width * size_of(f.call.query.type);
  clear_others(x.chosen.wanted.get(), x.chosen.rows, begin, end, bytes, static_cast<char*>(f.output) + first * bytes);
  void* const statistics[] = {f.row_max, f.row_sum};
  for (void* statistic : statistics) {
    std::memset(static_cast<T*>(statistic) + first + begin, 0, static_cast<size_t>(end - begin) * sizeof(T));
  }
}

template <class P>
void forward_task(const AttentionForward& f, const Place& at, const Place* next, int64_t begin, int64_t end,
                  ForwardScratch<P>& x) {
  using T = typename P::Number;
  const MaskedAttention& a = f.call;
  x.chosen.find(a, at.batch, begin, end);
  const int64_t kept = x.chosen.keys, rows = x.chosen.rows;
  clear_unwanted(f, at, x, begin, end);
  if (rows == 0) return;
  for (int64_t m = 0; m < rounded_up(rows, kLanes<T>); ++m) {
    x.top[m] = -HUGE_VAL;
    x.sum[m] = 0;
  }
  x.ahead.clear();
  const int64_t first_rows = smaller(rows, P::kForwardRows);
  const int64_t out_row = a.value_width, out_head = a.queries * out_row;
  const Heads output{f.output, a.query.type, {a.heads * out_head, out_head, out_row}};
  for (int64_t m = 0; m < rows; m += P::kForwardRows) {
    const int64_t last = smaller(m + P::kForwardRows, rows);
    x.ahead.add(output, at, x.chosen.wanted.get() + m, last - m);
    x.ahead.add(a.query, at, x.chosen.wanted.get() + last, smaller(P::kForwardRows, rows - last));
  }
  if (next != nullptr) {
    x.ahead.add(a.key, *next, x.chosen.kept.get(), kept);
    x.ahead.add(a.value, *next, x.chosen.kept.get(), kept);
    x.ahead.add(a.query, *next, x.chosen.wanted.get(), first_rows);
  }
  const Parts parts = cut(kept, kForwardKeys);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t first_key = part * parts.size, count = smaller(parts.size, kept - first_key);
    const ForwardKeys<P> block = read_keys<P>(a, at, x, first_key, count);
    for (int64_t m = 0; m < rows; m += P::kForwardRows) {
      T* const output = x.output_of(m);
      const int64_t size = smaller(P::kForwardRows, rows - m);
      const int64_t products_left = part > 0 ? 1 : 2 * ((rows - m + P::kForwardRows - 1) / P::kForwardRows);
      forward_block<P>(f, at, x, block, m, size, output, part > 0, products_left);
      if (part + 1 == parts.count) write_output<P>(f, at, x, m, size, output);
    }
  }
}

template <class P>
void forward(const AttentionForward& f, int64_t begin, int64_t end) {
  const MaskedAttention& a = f.call;
  const typename P::Scope scope;
  ForwardScratch<P> scratch(a, f.chunk);
  const int64_t chunks = (a.queries + f.chunk - 1) / f.chunk;
  for (int64_t task = begin; task < end; ++task) {
    const Place at = place_of(a, task / chunks), next = place_of(a, at.index + 1);
    // The next head reads the same rows where it is of the same sample.
    const bool known = chunks == 1 && task + 1 < end && next.batch == at.batch;
    const int64_t first = task % chunks * f.chunk;
    forward_task<P>(f, at, known ? &next : nullptr, first, smaller(first + f.chunk, a.queries), scratch);
  }
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
