// Backward of masked_attention; masked_attention.cpp says what it computes.
#pragma once

#include "attention_products.h"
#include "scratch.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

constexpr int64_t kBackwardKeys = 1024, kBackwardRows = 96;

// Of each wanted query: what turns scores into weights, and sum_j p dp about `shift`, the dp of a weight over 1/2.
template <class T>
struct Statistics {
  T *top, *inverse, *shift, *total, *mass;

  Statistics(T* data, int64_t size)
      : top(data), inverse(data + size), shift(data + 2 * size), total(data + 3 * size), mass(data + 4 * size) {}
};

template <class P>
struct BackwardScratch {
  using T = typename P::Number;
  using E = typename P::Entry;
  explicit BackwardScratch(const MaskedAttention& a)
      : most_keys(smaller(rounded_up(a.keys, 32), kBackwardKeys)),
        slabs(a.keys > kBackwardKeys ? (a.queries + kBackwardRows - 1) / kBackwardRows : 1),
        slab(rounded_up(a.width, 32) * kScoreRow),
        keys(P::block_size(most_keys, a.width)),
        values(P::block_size(most_keys, a.value_width)),
        keys_across(P::across_size(most_keys, a.width)),
        queries(P::block_size(kBackwardRows, a.width)),
        grads(P::block_size(kBackwardRows, a.value_width)),
        queries_across(P::across_size(kBackwardRows, a.width)),
        grads_across(P::across_size(kBackwardRows, a.value_width)),
        queries_right(P::right_size(kBackwardRows, a.width)),
        grads_right(P::right_size(kBackwardRows, a.value_width)),
        weights(P::weights_size(most_keys, kBackwardRows)),
        slopes(P::weights_size(most_keys, kBackwardRows)),
        scores(most_keys * kScoreRow),
        dweights(most_keys * kScoreRow),
        dquery(slabs * slab),
        dkey(most_keys * (padded<T>(a.width) + kPad)),
        dvalue(most_keys * (padded<T>(a.value_width) + kPad)),
        lines(kLanes<T> * rounded_up(a.width, 32)),
        rows(5 * rounded_up(a.queries, 32)),
        factors(kBackwardRows),
        chosen(a.keys, a.queries),
        ahead(2 * a.queries + 2 * kBackwardRows + 2 * a.keys, row_bytes(a)),
        most_queries(rounded_up(a.queries, 32)) {
    for (int64_t i = 0; i < kBackwardRows; ++i) factors[i] = P::kScalesQueries ? static_cast<T>(a.scale) : T(1);
  }

  Statistics<T> statistics() const { return {rows.get(), most_queries}; }
  T* dquery_slab(int64_t query) const { return dquery.get() + (slabs > 1 ? query / kBackwardRows * slab : 0); }

  static constexpr int64_t kScoreRow = kBackwardRows + kPad;
  int64_t most_keys, slabs, slab;
  Scratch<E> keys, values, keys_across, queries, grads, queries_across, grads_across, queries_right, grads_right;
  Scratch<E> weights, slopes;
  Scratch<T> scores, dweights, dquery, dkey, dvalue, lines, rows, factors;
  TakingPart chosen;
  Ahead ahead;
  int64_t most_queries;
};

// One vector of queries: weights from scores, kept in their place, and, where wanted, the sums of Statistics.
template <class P, class T = typename P::Number>
void weigh_again(T* scores, const T* dweights, int64_t row, int64_t keys, T scale, const Statistics<T>& x,
                 int64_t query, bool sums) {
  const Vec<T> top = load(x.top + query), inverse = load(x.inverse + query);
  const auto dominated = inverse > T(0.5);
  Vec<T> shift = load(x.shift + query), total = load(x.total + query), mass = load(x.mass + query);
  for (int64_t begin = 0; begin < keys; begin += kKeysPerSum) {
    Vec<T> part{}, part_mass{};
    for (int64_t j = begin; j < smaller(begin + kKeysPerSum, keys); ++j) {
      const Vec<T> score = load(scores + j * row), s = P::scaled(score, scale);
      const Vec<T> p = P::weight(score, scale, top) * inverse;
      store(scores + j * row, p);
      if (!sums) continue;
      const Vec<T> slope = load(dweights + j * row);
      const auto peak = (s == top) & dominated;
      const Vec<T> other = peak ? Vec<T>{} : p;
      shift = peak ? slope : shift;
      part += other * slope;
      part_mass += other;
    }
    total += part;
    mass += part_mass;
  }
  store(x.shift + query, shift);
  store(x.total + query, total);
  store(x.mass + query, mass);
}

// One vector of queries: weights and the gradients of scores, as operands.
template <class P, class T = typename P::Number>
void keep_operands(const T* scores, const T* dweights, int64_t row, int64_t keys, T scale, const Statistics<T>& x,
                   int64_t query, int64_t lane, const typename P::Weights& weights, const typename P::Weights& slopes) {
  const Vec<T> shift = load(x.shift + query), centre = load(x.total + query) - shift * load(x.mass + query);
  const T factor = P::kScalesQueries ? T(1) : scale;
  for (int64_t j = 0; j < keys; j += 2) {
    const bool both = j + 1 < keys;
    const int64_t next = both ? j + 1 : j;
    const Vec<T> even = load(scores + j * row), odd = load(scores + next * row);
    if constexpr (P::kCopiesWeights) weights.template put<true, false>(j, lane, even, odd, both);
    const Vec<T> first = even * ((load(dweights + j * row) - shift) - centre) * factor;
    const Vec<T> second = odd * ((load(dweights + next * row) - shift) - centre) * factor;
    slopes.template put<true, true>(j, lane, first, second, both);
  }
}

// What one block of keys needs in scratch memory, and where it stands among the keys that take part.
template <class P>
struct KeyBlock {
  Block<typename P::Entry> keys, values;
  typename P::Left keys_across;
  int64_t first;
  bool earlier;  // blocks came before: the queries' gradients are added to
};

// One block of keys with one block of wanted queries [first, first + rows): the sums of Statistics, or the gradients.
template <class P>
void backward_block(const AttentionBackward& b, const Place& at, BackwardScratch<P>& x, const KeyBlock<P>& block,
                    int64_t first, int64_t rows, bool sums, bool gradients, int64_t blocks_left) {
  using T = typename P::Number;
  const MaskedAttention& a = b.call;
  const T scale = static_cast<T>(a.scale);
  const int64_t row = x.kScoreRow, keys = block.keys.count;
  const int64_t dkey_row = padded<T>(a.width) + kPad, dvalue_row = padded<T>(a.value_width) + kPad;
  const bool slopes_wanted = b.dquery != nullptr || b.dkey != nullptr;
  const Block<typename P::Entry> queries{x.queries.get(), P::row_stride(a.width), rows, a.width};
  const Block<typename P::Entry> grads{x.grads.get(), P::row_stride(a.value_width), rows, a.value_width};
  read_block<P>(a.query, at, x.chosen.wanted.get() + first, P::kScalesQueries ? scale : T(1), queries);
  read_block<P>(b.grad, at, x.chosen.wanted.get() + first, T(1), grads);
  T *scores = x.scores.get(), *dweights = x.dweights.get();
  P::multiply(keys, rows, a.width, P::left(block.keys), P::right_across(queries, x.queries_across.get()), scores, row,
              false, x.ahead.share(2 * blocks_left));
  if (slopes_wanted) {
    P::multiply(keys, rows, a.value_width, P::left(block.values), P::right_across(grads, x.grads_across.get()),
                dweights, row, false, x.ahead.share(2 * blocks_left - 1));
  }
  const Statistics<T> statistics = x.statistics();
  const typename P::Weights weights = P::weights(scores, row, keys, rows, x.weights.get());
  const typename P::Weights slopes = P::weights(dweights, row, keys, rows, x.slopes.get());
  for (int64_t m = 0; m < rounded_up(rows, kLanes<T>); m += kLanes<T>) {
    weigh_again<P>(scores + m, dweights + m, row, keys, scale, statistics, first + m, sums && slopes_wanted);
    if (gradients) {
      keep_operands<P>(scores + m, dweights + m, row, keys, scale, statistics, first + m, m, weights, slopes);
    }
  }
  if (!gradients) return;
  const Prefetch nothing(nullptr, 0, 0);
  if (b.dvalue != nullptr) {
    P::multiply(keys, a.value_width, rows, weights.left(rows, keys), P::right(grads, x.grads_right.get()), x.dvalue.get(),
                dvalue_row, first > 0, nothing);
  }
  if (b.dkey != nullptr) {
    P::multiply(keys, a.width, rows, slopes.left(rows, keys), P::right(queries, x.queries_right.get()), x.dkey.get(), dkey_row,
                first > 0, nothing);
  }
  if (b.dquery != nullptr) {
    P::multiply(a.width, rows, keys, block.keys_across, slopes.right(rows, keys), x.dquery_slab(first), row,
                block.earlier, nothing);
  }
}

template <class P>
KeyBlock<P> read_keys(const MaskedAttention& a, const Place& at, BackwardScratch<P>& x, int64_t first,
                      int64_t count) {
  using T = typename P::Number;
  KeyBlock<P> block{{x.keys.get(), P::row_stride(a.width), count, a.width},
                    {x.values.get(), P::row_stride(a.value_width), count, a.value_width},
                    {},
                    first,
                    first > 0};
  read_block<P>(a.key, at, x.chosen.kept.get() + first, T(1), block.keys);
  read_block<P>(a.value, at, x.chosen.kept.get() + first, T(1), block.values);
  block.keys_across = P::left_across(block.keys, x.keys_across.get());
  return block;
}

// Rows of a key block's gradient, [keys, width], to their places.
template <class T>
void write_rows(const T* from, int64_t from_row, int64_t width, const int64_t* numbers, int64_t count, void* out,
                DType type, int64_t first_row) {
  for (int64_t i = 0; i < count; ++i) {
    narrow(from + i * from_row, width, out, type, (first_row + numbers[i]) * width);
  }
}

// Loads the saved statistics of the wanted rows; lanes beyond them get weights of zero.
template <class P>
void load_statistics(const AttentionBackward& b, const Place& at, BackwardScratch<P>& x, int64_t rows) {
  using T = typename P::Number;
  const Statistics<T> s = x.statistics();
  for (int64_t m = 0; m < rounded_up(rows, kLanes<T>); ++m) {
    const int64_t row = at.index * b.call.queries + (m < rows ? x.chosen.wanted[m] : 0);
    s.top[m] = m < rows ? static_cast<const T*>(b.row_max)[row] : T(0);
    s.inverse[m] = m < rows ? T(1) / static_cast<const T*>(b.row_sum)[row] : T(0);
    s.shift[m] = s.total[m] = s.mass[m] = T(0);
  }
}

template <class P>
void clear_gradients(const AttentionBackward& b, const Place& at, BackwardScratch<P>& x, int64_t kept,
                     int64_t rows) {
  const MaskedAttention& a = b.call;
  const auto clear = [&](void* out, const int64_t* numbers, int64_t count, int64_t length, int64_t row_bytes) {
    if (out == nullptr) return;
    clear_others(numbers, count, 0, length, row_bytes, static_cast<char*>(out) + at.index * length * row_bytes);
  };
  clear(b.dquery, x.chosen.wanted.get(), rows, a.queries, a.width * size_of(a.query.type));
  clear(b.dkey, x.chosen.kept.get(), kept, a.keys, a.width * size_of(a.key.type));
  clear(b.dvalue, x.chosen.kept.get(), kept, a.keys, a.value_width * size_of(a.value.type));
}

template <class P>
void backward_task(const AttentionBackward& b, const Place& at, const Place* next, BackwardScratch<P>& x) {
  using T = typename P::Number;
  const MaskedAttention& a = b.call;
  x.chosen.find(a, at.batch, 0, a.queries);
  const int64_t kept = x.chosen.keys, rows = x.chosen.rows;
  clear_gradients<P>(b, at, x, kept, rows);
  if (rows == 0) return;
  load_statistics<P>(b, at, x, rows);
  const int64_t first_rows = smaller(rows, kBackwardRows);
  x.ahead.clear();
  for (int64_t m = first_rows; m < rows; m += kBackwardRows) {
    const int64_t count = smaller(kBackwardRows, rows - m);
    x.ahead.add(a.query, at, x.chosen.wanted.get() + m, count);
    x.ahead.add(b.grad, at, x.chosen.wanted.get() + m, count);
  }
  if (next != nullptr) {
    x.ahead.add(a.key, *next, x.chosen.kept.get(), kept);
    x.ahead.add(a.value, *next, x.chosen.kept.get(), kept);
    x.ahead.add(a.query, *next, x.chosen.wanted.get(), first_rows);
    x.ahead.add(b.grad, *next, x.chosen.wanted.get(), first_rows);
  }
  const Parts parts = cut(kept, kBackwardKeys);
  const auto pass = [&](int64_t part, bool sums, bool gradients) {
    const int64_t first = part * parts.size, count = smaller(parts.size, kept - first);
    const KeyBlock<P> block = read_keys<P>(a, at, x, first, count);
    for (int64_t m = 0; m < rows; m += kBackwardRows) {
      const int64_t size = smaller(kBackwardRows, rows - m);
      const int64_t blocks_left = part > 0 ? 1 : (rows - m + kBackwardRows - 1) / kBackwardRows;
      backward_block<P>(b, at, x, block, m, size, sums, gradients, blocks_left);
      if (!gradients || part + 1 < parts.count || b.dquery == nullptr) continue;
      P::write_columns(x.dquery_slab(m), x.kScoreRow, a.width, x.chosen.wanted.get() + m, size, x.factors.get(),
                       x.lines.get(), b.dquery, a.query.type, at.index * a.queries);
    }
    const int64_t* numbers = x.chosen.kept.get() + first;
    if (gradients && b.dkey != nullptr) {
      write_rows(x.dkey.get(), padded<T>(a.width) + kPad, a.width, numbers, count, b.dkey, a.key.type, at.index * a.keys);
    }
    if (gradients && b.dvalue != nullptr) {
      write_rows(x.dvalue.get(), padded<T>(a.value_width) + kPad, a.value_width, numbers, count, b.dvalue,
                 a.value.type, at.index * a.keys);
    }
  };
  for (int64_t part = 0; part < parts.count && parts.count > 1; ++part) pass(part, true, false);
  for (int64_t part = 0; part < parts.count; ++part) pass(part, parts.count == 1, true);
}

template <class P>
void backward(const AttentionBackward& b, int64_t begin, int64_t end) {
  const typename P::Scope scope;
  BackwardScratch<P> scratch(b.call);
  for (int64_t head = begin; head < end; ++head) {
    const Place at = place_of(b.call, head), next = place_of(b.call, head + 1);
    const bool known = head + 1 < end && next.batch == at.batch;  // and so of the same rows
    backward_task<P>(b, at, known ? &next : nullptr, scratch);
  }
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
