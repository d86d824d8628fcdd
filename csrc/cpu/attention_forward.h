// Forward of masked_attention; masked_attention.cpp says what it computes.
#pragma once

#include <cmath>

#include "attention_products.h"
#include "scratch.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

constexpr int64_t kForwardKeys = 512, kForwardRows = 96;

template <class P>
struct ForwardScratch {
  using T = typename P::Number;
  using E = typename P::Entry;
  ForwardScratch(const MaskedAttention& a, int64_t chunk)
      : most_keys(smaller(rounded_up(a.keys, 32), kForwardKeys)),
        slabs(a.keys > kForwardKeys ? (chunk + kForwardRows - 1) / kForwardRows : 1),
        slab(rounded_up(a.value_width, 32) * kScoreRow),
        keys(P::block_size(most_keys, a.width)),
        values(P::block_size(most_keys, a.value_width)),
        queries(P::block_size(kForwardRows, a.width)),
        values_across(P::across_size(most_keys, a.value_width)),
        queries_across(P::across_size(kForwardRows, a.width)),
        weights(P::weights_size(most_keys, kForwardRows)),
        scores(most_keys * kScoreRow),
        output(slabs * slab),
        lines(kLanes<T> * rounded_up(a.value_width, 32)),
        top(rounded_up(chunk, 32)),
        sum(rounded_up(chunk, 32)),
        shrink(kForwardRows),
        kept(a.keys),
        wanted(chunk),
        ahead(2 * chunk + kForwardRows + 2 * a.keys, row_bytes(a)) {}

  static constexpr int64_t kScoreRow = kForwardRows + kPad;
  int64_t most_keys, slabs, slab;
  Scratch<E> keys, values, queries, values_across, queries_across, weights;
  Scratch<T> scores, output, lines, top, sum, shrink;
  Scratch<int64_t> kept, wanted;
  Ahead ahead;
};

// Scores of one vector of queries become exp(s - max); updates their running maximum and sum, and says by how much
// what was summed before shrinks.
template <class P, class T = typename P::Number>
void weigh(const T* scores, int64_t row, int64_t keys, T scale, const typename P::Weights& weights, int64_t query,
           T* top, T* sum, T* shrink) {
  Vec<T> best = load(top), second = best;
  for (int64_t j = 0; j + 1 < keys; j += 2) {
    const Vec<T> even = P::scaled(load(scores + j * row), scale), odd = P::scaled(load(scores + (j + 1) * row), scale);
    best = even > best ? even : best;
    second = odd > second ? odd : second;
  }
  const Vec<T> last = P::scaled(load(scores + (keys - 1) * row), scale);
  best = last > best ? last : best;
  best = second > best ? second : best;
  const Vec<T> shift = best == T(-HUGE_VAL) ? Vec<T>{} : best;  // no score above -inf yet: all weights are zero
  Vec<T> total{};
  for (int64_t begin = 0; begin < keys; begin += kKeysPerSum) {
    Vec<T> part{};
    for (int64_t j = begin; j < smaller(begin + kKeysPerSum, keys); j += 2) {
      const bool both = j + 1 < keys;
      const Vec<T> even = P::weight(load(scores + j * row), scale, shift);
      const Vec<T> odd = both ? P::weight(load(scores + (j + 1) * row), scale, shift) : Vec<T>{};
      part += weights.template put<false, true>(j, query, even, odd, both);
    }
    total += part;
  }
  const Vec<T> factor = exp_nonpositive(load(top) - shift);
  store(sum, load(sum) * factor + total);
  store(top, best);
  store(shrink, factor);
}

// One block of keys with one block of wanted queries [first, first + rows): adds to their output [d_v, queries].
template <class P>
void forward_block(const AttentionForward& f, const Place& at, ForwardScratch<P>& x,
                   const Block<typename P::Entry>& keys, typename P::Left values, int64_t first, int64_t rows,
                   typename P::Number* output, bool add, int64_t products_left) {
  using T = typename P::Number;
  const MaskedAttention& a = f.call;
  const T scale = static_cast<T>(a.scale);
  const int64_t row = x.kScoreRow, lanes = rounded_up(rows, kLanes<T>);
  const Block<typename P::Entry> queries{x.queries.get(), P::row_stride(a.width), rows, a.width};
  read_block<P>(a.query, at, x.wanted.get() + first, P::kScalesQueries ? scale : T(1), queries);
  const auto right = P::right_across(queries, x.queries_across.get());
  P::multiply(keys.count, rows, a.width, P::left(keys), right, x.scores.get(), row, false,
              x.ahead.share(products_left));
  const typename P::Weights weights = P::weights(x.scores.get(), row, keys.count, rows, x.weights.get());
  for (int64_t m = 0; m < lanes; m += kLanes<T>) {
    weigh<P>(x.scores.get() + m, row, keys.count, scale, weights, m, x.top.get() + first + m, x.sum.get() + first + m,
             x.shrink.get() + m);
    for (int64_t d = 0; d < a.value_width && add; ++d) {
      store(output + d * row + m, load(output + d * row + m) * load(x.shrink.get() + m));
    }
  }
  P::multiply(a.value_width, rows, keys.count, values, weights.right(rows, keys.count), output, row, add,
              x.ahead.share(products_left - 1));
}

// Output and statistics of wanted queries [first, first + rows).
template <class P>
void write_output(const AttentionForward& f, const Place& at, ForwardScratch<P>& x, int64_t first, int64_t rows,
                  const typename P::Number* output) {
  using T = typename P::Number;
  const MaskedAttention& a = f.call;
  T* inverse = x.shrink.get();
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = at.index * a.queries + x.wanted[first + m];
    static_cast<T*>(f.row_max)[row] = x.top[first + m];
    static_cast<T*>(f.row_sum)[row] = x.sum[first + m];
    inverse[m] = T(1) / x.sum[first + m];
  }
  P::write_columns(output, x.kScoreRow, a.value_width, x.wanted.get() + first, rows, inverse, x.lines.get(), f.output,
                a.query.type, at.index * a.queries);
}

template <class P>
void forward_task(const AttentionForward& f, const Place& at, const Place* next, int64_t begin, int64_t end,
                  ForwardScratch<P>& x) {
  using T = typename P::Number;
  const MaskedAttention& a = f.call;
  const int64_t kept = taking_part(a.key_mask, at.batch, 0, a.keys, x.kept.get());
  const int64_t rows = kept > 0 ? taking_part(a.query_mask, at.batch, begin, end, x.wanted.get()) : 0;
  const int64_t first_row = at.index * a.queries;
  const auto clear = [&](int64_t bytes, void* out) {
    clear_others(x.wanted.get(), rows, begin, end, bytes, static_cast<char*>(out) + first_row * bytes);
  };
  clear(a.value_width * size_of(a.query.type), f.output);
  clear(sizeof(T), f.row_max);
  clear(sizeof(T), f.row_sum);
  if (rows == 0) return;
  for (int64_t m = 0; m < rounded_up(rows, kLanes<T>); ++m) {
    x.top[m] = -HUGE_VAL;
    x.sum[m] = 0;
  }
  x.ahead.clear();
  const int64_t first_rows = smaller(rows, kForwardRows);
  const int64_t out_row = a.value_width, out_head = a.queries * out_row;
  const Heads output{f.output, a.query.type, {a.heads * out_head, out_head, out_row}};
  for (int64_t m = 0; m < rows; m += kForwardRows) {
    const int64_t last = smaller(m + kForwardRows, rows);
    x.ahead.add(output, at, x.wanted.get() + m, last - m);
    x.ahead.add(a.query, at, x.wanted.get() + last, smaller(kForwardRows, rows - last));
  }
  if (next != nullptr) {
    x.ahead.add(a.key, *next, x.kept.get(), kept);
    x.ahead.add(a.value, *next, x.kept.get(), kept);
    x.ahead.add(a.query, *next, x.wanted.get(), first_rows);
  }
  const Parts parts = cut(kept, kForwardKeys);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t first_key = part * parts.size, count = smaller(parts.size, kept - first_key);
    const Block<typename P::Entry> keys{x.keys.get(), P::row_stride(a.width), count, a.width};
    const Block<typename P::Entry> values{x.values.get(), P::row_stride(a.value_width), count, a.value_width};
    read_block<P>(a.key, at, x.kept.get() + first_key, T(1), keys);
    read_block<P>(a.value, at, x.kept.get() + first_key, T(1), values);
    const auto across = P::left_across(values, x.values_across.get());
    for (int64_t m = 0; m < rows; m += kForwardRows) {
      T* output = x.output.get() + (parts.count > 1 ? m / kForwardRows * x.slab : 0);
      const int64_t block = smaller(kForwardRows, rows - m);
      const int64_t products_left = part > 0 ? 1 : 2 * ((rows - m + kForwardRows - 1) / kForwardRows);
      forward_block<P>(f, at, x, keys, across, m, block, output, part > 0, products_left);
      if (part + 1 == parts.count) write_output<P>(f, at, x, m, block, output);
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
