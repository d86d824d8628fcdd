// sample_tokens on CPUs; compiled once per instruction set.
//
//   token = argmax_v key[v],  key[v] = (z[v] - max z) / T - log(-log(1 - u[v])),  u from Philox
//
// A row is read once from memory and swept twice in the cache (its maximum, then its keys). With R rows, V entries and
// s bytes per logit: s R V bytes, R V random words; no logarithm is needed for an entry that cannot win:
//
//     key <= (z - max) / T - log u                                   because -log(1 - u) >= u
//         <= (z - max) / T + log(2) (159 - bits(2^32 u) / 2^23)      because 1 + f <= 2^f for f in [0, 1]
//
// where bits() is the float's bit pattern read as an integer. This bound, the score, costs one conversion and one
// multiply-add, and lies less than 0.06 above the key of an entry that could win. A chunk of scores is kept; the best
// of them gets its exact key first, and then every entry whose score is not below the best exact key: one or two a row.
// The winner is that of the exact keys, and of equal keys the lowest index.
//
// The log-probability takes one more sweep: -log1p(sum over the others of p / p[token]), exact for p near 1.

#include "softdimo/cpu/sample_tokens.h"

#include <cmath>

#include "random.h"
#include "scratch.h"
#include "simd.h"
#include "truncation.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

constexpr int64_t kScoreChunk = 1024;  // entries scored at a time: a multiple of kUniformStep
constexpr float kUnit = 12102203.0f;   // 2^23 / log 2: a score counts in units of log 2 / 2^23
constexpr float kOrigin = 1333788672.0f;  // 159 * 2^23
constexpr float kSlack = 2048.0f;  // 1.7e-4: above all rounding in scores and keys of entries that could win

template <class T>
struct Row {
  const T* z;  // -inf where dropped, and beyond the entries
  T top, t;
  uint64_t id;
  bool truncated;
  const char* next;  // the next row: fetched while this one is scored
  int64_t item;      // bytes of one of its logits
};

template <class T>
struct Best {
  T key;
  int64_t at;
};

// A score that is reached by every entry whose key is not below this one.
SOFTDIMO_ALWAYS_INLINE float score_of(double key) {
  return static_cast<float>(key * static_cast<double>(kUnit)) - kOrigin - kSlack;
}

SOFTDIMO_ALWAYS_INLINE Vec<float> distances(const float* z, float top) { return load(z) - top; }
SOFTDIMO_ALWAYS_INLINE Vec<float> distances(const double* z, double top) {
  float distance[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) distance[i] = static_cast<float>(z[i] - top);
  return load(distance);
}

// A chunk's scores, and 2^32 u.
struct Chunk {
  alignas(64) float score[kScoreChunk];
  alignas(64) float word[kScoreChunk];
};

// Whether truncation left none of kUniformStep entries.
template <class T>
bool all_dropped(const T* z) {
  Vec<T> best = load(z);
  for (int64_t v = kLanes<T>; v < kUniformStep; v += kLanes<T>) best = load(z + v) > best ? load(z + v) : best;
  return lane_bits(best > static_cast<T>(-HUGE_VAL)) == 0;
}

// Scores entries [first, first + count), rounded up to kUniformStep; returns the best.
template <class T>
float score_chunk(const Row<T> row, const RoundKeys& keys, uint32_t offset, int64_t first, int64_t count,
                  Chunk& chunk) {
  const double slope = 1.0 / static_cast<double>(row.t);
  const float factor = static_cast<float>(slope < 1e30 ? slope : 1e30) * kUnit;  // finite: a bound stays a bound
  Vec<float> best = splat(-HUGE_VALF);
  for (int64_t v = 0; v < count; v += kUniformStep) {
    for (int64_t byte = 0; byte < kUniformStep * row.item; byte += 64) {
      __builtin_prefetch(row.next + (first + v) * row.item + byte, 0, 2);
    }
    if (row.truncated && all_dropped(row.z + first + v)) {  // then no random words are needed
      store(chunk.score + v, splat(-HUGE_VALF));
      store(chunk.score + v + kLanes<float>, splat(-HUGE_VALF));
      continue;
    }
    const WordVecs words = philox_words(keys, row.id, static_cast<uint32_t>((first + v) / 4), offset);
    const UintVec halves[2] = {words.first, words.second};
    for (int half = 0; half < 2; ++half) {
      const int64_t at = v + half * kLanes<float>;
      const Vec<float> word = float_word(halves[half]);
      const Vec<float> pattern = __builtin_convertvector((IntVec)word, Vec<float>);
      const Vec<float> score = distances(row.z + first + at, row.top) * factor - pattern;
      best = score > best ? score : best;
      store(chunk.word + at, word);
      store(chunk.score + at, score);
    }
  }
  return lane_max<float>(best);
}

// The keys of the chosen lanes, as the specification rounds them.
SOFTDIMO_ALWAYS_INLINE void exact_keys(const Row<float>& row, int64_t first, Vec<float> u, uint32_t, float* key) {
  store(key, (load(row.z + first) - row.top) / row.t + gumbel(u).high);
}
SOFTDIMO_ALWAYS_INLINE void exact_keys(const Row<double>& row, int64_t first, Vec<float> u, uint32_t lanes,
                                       double* key) {
  for (int i = 0; i < kLanes<float>; ++i) {
    if ((lanes >> i & 1) == 0) continue;
    key[i] = (row.z[first + i] - row.top) / row.t - ::log(-::log1p(-static_cast<double>(u[i])));
  }
}

// Gives exact keys to the entries of the chunk whose score reaches `least`, and takes them out of the chunk.
template <class T>
void try_entries(const Row<T>& row, int64_t first, int64_t count, float least, Chunk& chunk, Best<T>& best) {
  for (int64_t v = 0; v < count; v += kLanes<float>) {
    const Vec<float> score = load(chunk.score + v);
    uint32_t lanes = lane_bits(score >= least);
    if (lanes == 0) continue;
    T key[kLanes<float>];
    exact_keys(row, first + v, scaled_uniform(load(chunk.word + v)), lanes, key);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      const int64_t at = first + v + i;
      chunk.score[v + i] = -HUGE_VALF;
      if (key[i] > best.key || (key[i] == best.key && at < best.at)) best = {key[i], at};
    }
  }
}

// -1 where no key is finite: truncated, at a temperature so small that logits / temperature overflow.
template <class T>
int64_t best_entry(const SampleTokens& s, const RoundKeys& keys, const Row<T>& row) {
  Chunk chunk;
  Best<T> best{static_cast<T>(-HUGE_VAL), -1};
  for (int64_t first = 0; first < s.vocabulary; first += kScoreChunk) {
    const int64_t count = smaller(kScoreChunk, s.vocabulary - first);
    const float top = score_chunk(row, keys, s.offset, first, count, chunk);
    if (top == -HUGE_VALF || (best.at >= 0 && top < score_of(best.key))) continue;
    try_entries(row, first, count, top, chunk, best);
    try_entries(row, first, count, score_of(best.key), chunk, best);
  }
  return best.at;
}

// max z, or NaN where there is one.
template <class T>
T row_top(const T* z, int64_t count) {
  Vec<T> best = splat(static_cast<T>(-HUGE_VAL)), missing{};
  for (int64_t v = 0; v < count; v += kLanes<T>) {
    const Vec<T> next = load(z + v);
    best = next > best ? next : best;
    missing = next == next ? missing : next;
  }
  return lane_max<T>(best) + lane_sum<T>(missing);
}

// The log-probability of the entry drawn, which is taken out of z. Sums are in T within a part, then in double.
template <class T>
T log_probability(T* z, int64_t count, T top, T t, int64_t token) {
  constexpr int64_t kPart = 32 * kLanes<T>;
  const T slope = T(1) / t;
  const double drawn = static_cast<double>((z[token] - top) * slope);
  z[token] = static_cast<T>(-HUGE_VAL);
  double others = 0;
  for (int64_t first = 0; first < count; first += kPart) {
    Vec<T> sum{};
    for (int64_t v = first; v < smaller(first + kPart, count); v += kLanes<T>) {
      sum += exp_nonpositive((load(z + v) - top) * slope);
    }
    others += static_cast<double>(lane_sum<T>(sum));
  }
  return static_cast<T>(-::log1p(others * ::exp(-drawn)));
}

// Sets the entries that truncation drops to -inf.
template <class T>
void truncate_entries(const SampleTokens& s, T t, T* z, T* x, T* scratch) {
  if (t == T(1)) x = z;  // a division costs as much as the noise
  for (int64_t v = 0; v < whole_vectors<T>(s.vocabulary) && x != z; v += kLanes<T>) store(x + v, load(z + v) / t);
  drop_entries(truncate_row(x, s.vocabulary, s.top_k, s.top_p, scratch), x, 0, s.vocabulary, z);
}

template <class T>
void draw(const SampleTokens& s, int64_t begin, int64_t end) {
  const bool truncates = s.top_k > 0 || s.top_p < 1;
  const int64_t wide = (s.vocabulary + kUniformStep - 1) / kUniformStep * kUniformStep;
  const Scratch<T> z(wide), x(truncates ? wide : 0), scratch(truncates ? truncation_scratch<T>(s.vocabulary) : 0);
  const RoundKeys keys = round_keys(s.seed);
  for (int64_t v = s.vocabulary; v < wide; ++v) z[v] = static_cast<T>(-HUGE_VAL);
  for (int64_t n = begin; n < end; ++n) {
    const T t = s.row_temperature != nullptr ? static_cast<const T*>(s.row_temperature)[n] : T(s.temperature);
    widen(s.logits, s.logits_type, s.logits_rows.offset(n), s.vocabulary, z.get());
    const T top = row_top(z.get(), wide);
    const bool valid = top - top == T(0) && t == t;
    int64_t token = -1;
    if (valid) {
      if (truncates) truncate_entries(s, t, z.get(), x.get(), scratch.get());
      const int64_t id = s.row_ids != nullptr ? s.row_ids[n] : n;
      const int64_t item = size_of(s.logits_type);
      const char* next = static_cast<const char*>(s.logits) + s.logits_rows.offset(n + 1 < end ? n + 1 : n) * item;
      token = best_entry(s, keys, Row<T>{z.get(), top, t, static_cast<uint64_t>(id), truncates, next, item});
    }
    s.tokens[n] = token;
    if (s.log_prob == nullptr) continue;
    static_cast<T*>(s.log_prob)[n] =
        token >= 0 ? log_probability(z.get(), wide, top, t, token) : static_cast<T>(std::nan(""));
  }
}

template <class T>
constexpr SampleTokensKernels kKernels = {draw<T>};

}  // namespace

const SampleTokensTable& sample_tokens_table() {
  static constexpr SampleTokensTable table = {kKernels<float>, kKernels<double>};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
