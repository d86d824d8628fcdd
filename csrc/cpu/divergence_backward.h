// The gradients of the divergence of two rows of logits. See divergence.cpp.
#pragma once

#include "divergence_entry.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// The gradient to one side's logits, times the upstream gradient over the temperature. `own` and `other` are this
// side's and the other's probabilities (direct: before their normalisation).
//   direct    own (slope (d - mean) + constant) - other rest    d: own less other, as binary logarithms
//   centred   (own slope) (r - mean) + (p - q) rest
template <class T>
struct Side {
  T constant, slope, mean, rest;
  bool peaked;  // one entry holds more than 1/2
};

// own_weight: that of the divergence whose gradient is sign x own (ratio - mean). What rounding takes from one number
// of a direct row, another gives back: the gradients sum to zero.
template <class T>
Side<T> make_side(const RowStatistics& row, double own_sum, double other_sum, double mean, double own_weight,
                  double other_weight, double factor, double sign) {
  Side<T> side{};
  side.peaked = own_sum < 2;
  if (row.direct != 0) {
    const double binary_mean = sign * mean * kLog2E;
    side.slope = static_cast<T>(own_weight * factor / (kLog2E * own_sum));
    side.mean = static_cast<T>(binary_mean);
    const double shifted = static_cast<double>(side.slope) * (binary_mean - static_cast<double>(side.mean));
    side.constant = static_cast<T>(other_weight * factor / own_sum - shifted);
    side.rest = static_cast<T>((static_cast<double>(side.constant) + shifted) * own_sum / other_sum);
    return side;
  }
  // An infinite divergence has no such gradient: inf - inf, over the whole row.
  if (own_weight != 0) side.mean = static_cast<T>(is_finite(mean) ? sign * mean : kNothing<double>);
  side.slope = static_cast<T>(sign * own_weight * factor);
  side.rest = static_cast<T>(sign * other_weight * factor);
  return side;
}

template <class T>
Side<T> teacher_side(const Divergence& s, const RowStatistics& row, double upstream) {
  return make_side<T>(row, row.teacher_sum, row.model_sum, row.teacher_mean, s.forward_weight, s.reverse_weight,
                      upstream / s.teacher_temperature, 1.0);
}

template <class T>
Side<T> model_side(const Divergence& s, const RowStatistics& row, double upstream) {
  return make_side<T>(row, row.model_sum, row.teacher_sum, row.model_mean, s.reverse_weight, s.forward_weight,
                      upstream / s.model_temperature, -1.0);
}

// Which of the divergences are wanted: KL(own || other), KL(other || own), both.
enum class Wanted { own, other, both };

template <Wanted kWanted, class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> direct_gradient(const Side<T>& side, const Scale<T>& own, const Scale<T>& other,
                                              Vec<T> a, Vec<T> b) {
  const Vec<T> x = binary_below_top(a, own), y = binary_below_top(b, other), u = exp2_below(x);
  if constexpr (kWanted == Wanted::other) {
    return u * side.constant - exp2_below(y) * side.rest;
  } else {
    const Vec<T> d = binary_difference<kWanted == Wanted::both, T>(x, y);
    const Vec<T> gradient = u * (side.slope * (d - side.mean) + side.constant);
    if constexpr (kWanted == Wanted::own) return gradient;
    else return gradient - exp2_below(y) * side.rest;
  }
}

template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> centred_gradient(const Side<T>& side, Vec<T> own, const Entry<T>& e) {
  return own * side.slope * (e.ratio - side.mean) + e.difference * side.rest;
}

// One side's gradient on its way.
template <class T>
struct Outgoing {
  Side<T> side;
  bool to_teacher;
  const Gradient* target;
  int64_t peak = -1;  // where in the row its greatest entry is, in peaked rows
  Total<T> others{};  // the sum of the other entries' gradients, in peaked rows
};

// A chunk seen from one side: its logits, the other's, and where its gradient goes.
template <class E>
struct SideChunk {
  const E *own, *other;
  E* out;
  int64_t first, end;  // first: the index in the row of the chunk's first entry
};

// The gradients of a chunk of a direct row; returns the sum of all but the greatest entries'. By value: what is
// written might otherwise be what is read.
template <Wanted kWanted, bool kPeaked, class T, class E>
Vec<T> direct_chunk(const Side<T> side, const Scale<T> own, const Scale<T> other, const SideChunk<E> chunk,
                    const Ahead<T, E> ahead) {
  Vec<T> others{};
  for (int64_t v = 0; v < chunk.end; v += kPair<T>) {
    ahead.prefetch(chunk.first + v);
    const Pair<T> a = load_pair(chunk.own + v), b = load_pair(chunk.other + v);
    const Pair<T> gradient{direct_gradient<kWanted>(side, own, other, a.first, b.first),
                           direct_gradient<kWanted>(side, own, other, a.second, b.second)};
    store_pair(chunk.out + v, gradient);
    if constexpr (kPeaked) {
      others += a.first == own.top ? Vec<T>{} : gradient.first;
      others += a.second == own.top ? Vec<T>{} : gradient.second;
    }
  }
  return others;
}

template <bool kPeaked, class T, class E>
Vec<T> direct_chunk(const Divergence& s, const Outgoing<T>& to, const Centred<T>& c, const SideChunk<E>& chunk,
                    const Ahead<T, E>& ahead) {
  const Scale<T>&own = to.to_teacher ? c.teacher : c.model, &other = to.to_teacher ? c.model : c.teacher;
  const double own_weight = to.to_teacher ? s.forward_weight : s.reverse_weight;
  const double other_weight = to.to_teacher ? s.reverse_weight : s.forward_weight;
  if (own_weight == 0) return direct_chunk<Wanted::other, kPeaked>(to.side, own, other, chunk, ahead);
  if (other_weight == 0) return direct_chunk<Wanted::own, kPeaked>(to.side, own, other, chunk, ahead);
  return direct_chunk<Wanted::both, kPeaked>(to.side, own, other, chunk, ahead);
}

template <class T>
Vec<T> centred_chunk(const Outgoing<T>& to, const Centred<T>& c, const SideChunk<T>& chunk, const Ahead<T, T>& ahead) {
  Vec<T> others{};
  const T* const teacher = to.to_teacher ? chunk.own : chunk.other;
  const T* const model = to.to_teacher ? chunk.other : chunk.own;
  const T top = to.to_teacher ? c.teacher.top : c.model.top;
  for (int64_t v = 0; v < chunk.end; v += kLanes<T>) {
    if (v % kPair<T> == 0) ahead.prefetch(chunk.first + v);
    const Entry<T> e = centred_entry(c, load(teacher + v), load(model + v));
    const Vec<T> gradient = centred_gradient(to.side, to.to_teacher ? e.p : e.q, e);
    others += load(chunk.own + v) == top ? Vec<T>{} : gradient;
    store(chunk.out + v, gradient);
  }
  return others;
}

template <class T, class E>
Vec<T> chunk_gradients(const Divergence& s, bool direct, const Outgoing<T>& to, const Centred<T>& c,
                       const SideChunk<E>& chunk, const Ahead<T, E>& ahead) {
  if constexpr (sizeof(E) == sizeof(T)) {
    if (!direct) return centred_chunk(to, c, chunk, ahead);
  }
  return to.side.peaked ? direct_chunk<true>(s, to, c, chunk, ahead) : direct_chunk<false>(s, to, c, chunk, ahead);
}

SOFTDIMO_ALWAYS_INLINE float as_number(Half h) { return from_bfloat16(h); }
SOFTDIMO_ALWAYS_INLINE float as_number(float x) { return x; }
SOFTDIMO_ALWAYS_INLINE double as_number(double x) { return x; }

// The index in the row of its top, where that is in the chunk.
template <class T, class E>
void find_peak(const E* logits, int64_t first, int64_t count, T top, int64_t* peak) {
  if (*peak >= 0) return;
  int at = -1;
  for (int v = 0; v < static_cast<int>(count); ++v) at = as_number(logits[v]) == top ? v : at;
  if (at >= 0) *peak = first + at;
}

// The guided logits u + s (c - u) hand s times their gradient to c and 1 - s times to u.
template <class T>
void write_guided(const DivergenceBackward& b, T guidance, int64_t at, int64_t count, const T* values, T* scaled) {
  const Gradient* outs[] = {&b.teacher, &b.uncond};
  const T shares[] = {guidance, T(1) - guidance};
  for (int i = 0; i < 2; ++i) {
    if (outs[i]->data == nullptr) continue;
    for (int64_t v = 0; v < count; ++v) scaled[v] = values[v] * shares[i];
    narrow(scaled, count, outs[i]->data, outs[i]->type, at);
  }
}

// Whether the teacher's gradient is shared with the unconditional logits.
template <class T>
SOFTDIMO_ALWAYS_INLINE bool guided(const DivergenceBackward& b, const Row<T>& row) {
  return b.uncond.data != nullptr || row.guidance != T(1);
}

// Hands over values that could not be computed in place.
template <class T>
void write(const DivergenceBackward& b, const Outgoing<T>& to, T guidance, int64_t at, int64_t count, const T* values,
           T* scaled) {
  if (to.to_teacher) return write_guided(b, guidance, at, count, values, scaled);
  narrow(values, count, to.target->data, to.target->type, at);
}
SOFTDIMO_ALWAYS_INLINE void write(const DivergenceBackward&, const Outgoing<float>& to, float, int64_t at,
                                  int64_t count, const Half* values, Half*) {
  std::memcpy(static_cast<Half*>(to.target->data) + at, values, static_cast<size_t>(count) * sizeof(Half));
}

// The gradients of a row, whose entries are read as E.
template <class T, class E>
void write_gradients(const DivergenceBackward& b, const Scales<T>& scales, const Row<T>& row, const Row<T>& next,
                     Outgoing<T>* outgoing, int sides, Room<T>& room) {
  const Divergence& s = b.call;
  const RowStatistics& found = b.statistics[row.index];
  const Centred<T> c = centred_row<T>(s, scales, found);
  const Ahead<T, E> ahead(s, next);
  auto& buffers = room.template as<E>();
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    const int64_t count = smaller(kChunk<T>, s.vocabulary - first), at = row.index * s.vocabulary + first;
    const Chunk<E> chunk = read_chunk<T, E>(s, row, first, room);
    for (Outgoing<T>* to = outgoing; to < outgoing + sides; ++to) {
      // Streaming stores measured slower: the pages of a fresh output are in the caches, just zeroed by the system.
      const bool fits = to->target->type == kType<E> && count % kPair<T> == 0;
      const bool in_place = fits && !(to->to_teacher && guided(b, row));
      E* const out = in_place ? static_cast<E*>(to->target->data) + at : buffers.gradient;
      const E* const own = to->to_teacher ? chunk.teacher : chunk.model;
      const E* const other = to->to_teacher ? chunk.model : chunk.teacher;
      const SideChunk<E> sided{own, other, out, first, chunk.end};
      to->others.add(chunk_gradients(s, found.direct != 0, *to, c, sided, ahead));
      if (!in_place) write(b, *to, row.guidance, at, count, out, buffers.uncond);
      if (!to->side.peaked) continue;
      find_peak(own, first, count, to->to_teacher ? c.teacher.top : c.model.top, &to->peak);
    }
  }
  for (Outgoing<T>* to = outgoing; to < outgoing + sides; ++to) {
    if (to->peak < 0) continue;
    const T value = static_cast<T>(-to->others.sum());
    write(b, *to, row.guidance, row.index * s.vocabulary + to->peak, 1, &value, room.values.uncond);
  }
}

template <class T>
void fill_row(const Gradient& out, int64_t row, int64_t vocabulary, T value) {
  if (out.data == nullptr) return;
  for (int64_t v = 0; v < vocabulary; ++v) narrow(&value, 1, out.data, out.type, row * vocabulary + v);
}

template <class T>
void backward_row(const DivergenceBackward& b, Scales<T>& scales, const Row<T>& row, const Row<T>& next,
                  Room<T>& room) {
  const Divergence& s = b.call;
  const RowStatistics& found = b.statistics[row.index];
  const T given = static_cast<const T*>(b.upstream)[row.index];
  const double upstream = given == given ? static_cast<double>(given) : kNothing<double>;
  if (found.teacher_sum != found.teacher_sum) {
    fill_row(b.teacher, row.index, s.vocabulary, kNothing<T>);
    fill_row(b.model, row.index, s.vocabulary, kNothing<T>);
    fill_row(b.uncond, row.index, s.vocabulary, kNothing<T>);
    return;
  }
  scales.set_tops(found);
  Outgoing<T> outgoing[2];
  int sides = 0;
  if (b.teacher.data != nullptr || b.uncond.data != nullptr) {
    const Gradient& target = b.teacher.data != nullptr ? b.teacher : b.uncond;
    outgoing[sides++] = {teacher_side<T>(s, found, upstream), true, &target};
  }
  if (b.model.data != nullptr) outgoing[sides++] = {model_side<T>(s, found, upstream), false, &b.model};
  if constexpr (sizeof(T) == sizeof(float)) {
    bool halves = found.direct != 0 && read_by_halves(s, row) && b.uncond.data == nullptr;
    for (int i = 0; i < sides; ++i) halves = halves && outgoing[i].target->type == DType::bfloat16;
    if (halves) return write_gradients<T, Half>(b, scales, row, next, outgoing, sides, room);
  }
  write_gradients<T, T>(b, scales, row, next, outgoing, sides, room);
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
