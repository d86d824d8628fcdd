// Divergences between two rows of logits on CPUs, forward and backward; compiled once per instruction set.
//
//   p = softmax(a / S), q = softmax(b / T); a: the teacher's logits, guided where asked for; b: the model's
//   r = log p - log q
//   KL(p || q) = sum p r                    gradient to b / T: q - p;  to a / S: p (r - KL(p || q))
//   KL(q || p) = -sum q r                   the same with p and q exchanged
//
// With R rows, V entries, s bytes per logit and c = 2 tensors of logits (3 with guidance):
//   forward   c s R V bytes read, 2 R V exponentials (4 for rows that nearly agree)
//   backward  c s R V bytes read, s R V written for each gradient, 2 R V exponentials
//   floor     max(bytes / copy rate, exponentials / exp rate)
//
// One task = a range of rows. A row passes in chunks that stay in the first cache, twice in the forward (maxima;
// sums), once in the backward, which recomputes p and q from the saved maxima and sums. Meanwhile the next row is
// fetched. A row's result depends on that row alone.
//
// Rows whose p and q differ clearly ("direct") take p - q as it is, and r through d = a / S - b / T about the maxima,
// whose means under p and q say everything: KL(p || q) = E_p d - c with c = log(sum_p / sum_q). In the others these
// differences would cancel; they are read once more ("centred"), and every term is formed from the entry's own r:
//
//   p - q = p (r - g),   p r - (p - q) = p g,   -q r + (p - q) = (p - q) r - p g,   g = r + expm1(-r) = r^2 (1/2 - ...)
//
// with r from exact differences of logits. The rounding of c is taken back so that p - q sums to zero.
// In a row with an entry > 1/2 the gradient of that entry is minus the sum of the others.

#include "softdimo/cpu/divergence.h"

#include "divergence_entry.h"

namespace softdimo::cpu::SOFTDIMO_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------
// forward

template <class T>
void find_tops(const Divergence& s, const Row<T>& row, Buffers<T>& room, RowStatistics& found) {
  Vec<T> teacher = splat(-kInfinity<T>), model = teacher;
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    const Chunk<T> chunk = read_chunk(s, row, first, room);
    for (int64_t v = 0; v < chunk.end; v += kLanes<T>) {
      const Vec<T> a = load(chunk.teacher + v), b = load(chunk.model + v);
      teacher = a > teacher ? a : teacher;
      model = b > model ? b : model;
    }
  }
  found.teacher_top = static_cast<double>(lane_max<T>(teacher));
  found.model_top = static_cast<double>(lane_max<T>(model));
}

bool unit_temperatures(const Divergence& s) { return s.teacher_temperature == 1 && s.model_temperature == 1; }

// Sums over a row of p~ = exp(a), q~ = exp(b) and d = a - b, a and b scaled and about their maxima.
struct Moments {
  double p, q, pd, qd, pp, qq, pq;
  double dd;  // of the squares of d
};

template <class T, bool kUnit>
Moments sum_moments(const Divergence& s, const Row<T>& row, const Row<T>& next, const RowStatistics& tops,
                    Buffers<T>& room) {
  const Scale<T> teacher = scale_of<T>(tops.teacher_top, s.teacher_temperature);
  const Scale<T> model = scale_of<T>(tops.model_top, s.model_temperature);
  Total<T> p, q, pd, qd, pp, qq, pq, dd;
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    prefetch_chunk(s, next, first);
    const Chunk<T> chunk = read_chunk(s, row, first, room);
    Vec<T> cp{}, cq{}, cpd{}, cqd{}, cpp{}, cqq{}, cpq{}, cdd{};
    for (int64_t v = 0; v < chunk.end; v += kLanes<T>) {
      const Vec<T> x = below_top<kUnit, T>(load(chunk.teacher + v), teacher);
      const Vec<T> y = below_top<kUnit, T>(load(chunk.model + v), model);
      const Vec<T> ep = exp_below(x), eq = exp_below(y), d = x - y;
      cp += ep;
      cq += eq;
      cpd += ep * d;
      cqd += eq * d;
      cpp += ep * ep;
      cqq += eq * eq;
      cpq += ep * eq;
      cdd += d * d;
    }
    p.add(cp);
    q.add(cq);
    pd.add(cpd);
    qd.add(cqd);
    pp.add(cpp);
    qq.add(cqq);
    pq.add(cpq);
    dd.add(cdd);
  }
  return {p.sum(), q.sum(), pd.sum(), qd.sum(), pp.sum(), qq.sum(), pq.sum(), dd.sum()};
}

// forward_weight * forward + reverse_weight * reverse; a zero weight leaves its part out: 0 * inf would be NaN.
double weighted(const Divergence& s, double forward, double reverse) {
  const double first = s.forward_weight != 0 ? s.forward_weight * forward : 0.0;
  return s.reverse_weight != 0 ? first + s.reverse_weight * reverse : first;
}

// The divergence from the moments, where that costs no digits: p - q is not small beside p and q, and the divergences
// are not beside their parts. False where it does, or where an entry is (all but) -inf on one side alone.
template <class T>
bool direct_value(const Divergence& s, const Moments& m, RowStatistics& found, double* value) {
  const double p = 1 / m.p, q = 1 / m.q, pp = m.pp * p * p, qq = m.qq * q * q;
  const double apart = pp + qq - 2 * m.pq * p * q;
  const double centre = ::log(m.p / m.q), p_mean = m.pd * p, q_mean = m.qd * q;
  const double forward = p_mean - centre, reverse = centre - q_mean;
  found.centre = centre;
  found.teacher_mean = p_mean;
  found.model_mean = q_mean;
  *value = weighted(s, forward, reverse);
  const double least = sizeof(T) == 8 ? 0.5 : 0.125;  // double has nothing wider to take its sums in
  return m.dd < 1e30 && apart >= least * (pp + qq) &&
         (s.forward_weight == 0 || 16 * forward >= ::fabs(p_mean) + ::fabs(centre)) &&
         (s.reverse_weight == 0 || 16 * reverse >= ::fabs(q_mean) + ::fabs(centre));
}

// The divergence from centred terms. With r off by the excess e, which makes the sum of p exp(-r) one, the sums
// change by known amounts.
template <class T>
double centred_value(const Divergence& s, const Row<T>& row, Buffers<T>& room, RowStatistics& found) {
  const Centred<T> c = centred_row<T>(s, found);
  Total<T> difference, forward, reverse;
  Vec<T> only_p{}, only_q{};
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    const Chunk<T> chunk = read_chunk(s, row, first, room);
    Vec<T> cd{}, cf{}, cr{};
    for (int64_t v = 0; v < chunk.end; v += kLanes<T>) {
      const Vec<T> a = load(chunk.teacher + v), b = load(chunk.model + v);
      const Entry<T> e = centred_entry(c, a, b);
      cd += e.difference;
      cf += e.forward;
      cr += e.reverse;
      only_p = (b == -kInfinity<T>)&(a != -kInfinity<T>) ? splat(T(1)) : only_p;
      only_q = (a == -kInfinity<T>)&(b != -kInfinity<T>) ? splat(T(1)) : only_q;
    }
    difference.add(cd);
    forward.add(cf);
    reverse.add(cr);
  }
  const double d = difference.sum(), shift = ::log1p(-d);
  const double f = forward.sum() + (d + shift), r = (reverse.sum() - (d + shift) + d * shift) / (1 - d);
  found.excess = -shift;
  found.teacher_mean = lane_max<T>(only_p) > T(0) ? HUGE_VAL : f < 0 ? 0 : f;
  found.model_mean = lane_max<T>(only_q) > T(0) ? HUGE_VAL : r < 0 ? 0 : r;
  return weighted(s, found.teacher_mean, found.model_mean);
}

template <class T>
T forward_row(const Divergence& s, const Row<T>& row, const Row<T>& next, Buffers<T>& room, RowStatistics& found) {
  find_tops(s, row, room, found);
  if (!is_finite(found.teacher_top) || !is_finite(found.model_top)) {  // +inf, or nothing but -inf
    found.teacher_sum = found.model_sum = kNothing<double>;
    return kNothing<T>;
  }
  const Moments moments = unit_temperatures(s) ? sum_moments<T, true>(s, row, next, found, room)
                                               : sum_moments<T, false>(s, row, next, found, room);
  const double sums = moments.p + moments.q;
  found.teacher_sum = sums == sums ? moments.p : sums;  // NaN in either makes both NaN
  found.model_sum = sums == sums ? moments.q : sums;
  if (sums != sums) return kNothing<T>;
  double value;
  found.excess = 0;
  found.direct = direct_value<T>(s, moments, found, &value) ? 1 : 0;
  return static_cast<T>(found.direct != 0 ? value : centred_value(s, row, room, found));
}

template <class T>
void forward(const DivergenceForward& f, int64_t begin, int64_t end) {
  const Divergence& s = f.call;
  Buffers<T> room;
  Row<T> next = find_row<T>(s, row_index(s, begin));
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row = next;
    if (i + 1 < end) next = find_row<T>(s, row_index(s, i + 1));
    static_cast<T*>(f.value)[row.index] = forward_row(s, row, next, room, f.statistics[row.index]);
  }
}

// ---------------------------------------------------------------------------------------------------
// backward

// The gradient to one side's logits, times the upstream gradient over the temperature. `own` and `other` are this
// side's and the other's probabilities (direct: before their normalisation).
//   direct    own (slope (d - mean) + constant) - other (rest + rest_low)
//   centred   (own slope) (r - mean) + (p - q) rest
template <class T>
struct Side {
  T constant, slope, mean, rest, rest_low;
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
    side.slope = static_cast<T>(sign * own_weight * factor / own_sum);
    side.mean = static_cast<T>(mean);
    const double shifted = static_cast<double>(side.slope) * (mean - static_cast<double>(side.mean));
    side.constant = static_cast<T>(other_weight * factor / own_sum - shifted);
    if (other_weight == 0) return side;
    const double rest = (static_cast<double>(side.constant) + shifted) * own_sum / other_sum;
    side.rest = static_cast<T>(rest);
    side.rest_low = static_cast<T>(rest - static_cast<double>(side.rest));
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

template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> direct_gradient(const Side<T>& side, Vec<T> own, Vec<T> other, Vec<T> d) {
  return own * (side.slope * (d - side.mean) + side.constant) - other * side.rest_low - other * side.rest;
}
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> centred_gradient(const Side<T>& side, Vec<T> own, const Entry<T>& e) {
  return own * side.slope * (e.ratio - side.mean) + e.difference * side.rest;
}

// A row's gradients on their way: where the chunk's go (null when not wanted; may be where its logits are), and the
// sums of all but the greatest entries'.
template <class T>
struct Outgoing {
  T *teacher, *model;
  Total<T> teacher_rest, model_rest;
};

template <class T, bool kDirect, bool kUnit>
void chunk_gradients(const Centred<T>& c, const Side<T>& teacher, const Side<T>& model, const Chunk<T>& chunk,
                     Outgoing<T>& out) {
  Vec<T> teacher_rest{}, model_rest{};
  for (int64_t v = 0; v < chunk.end; v += kLanes<T>) {
    const Vec<T> a = load(chunk.teacher + v), b = load(chunk.model + v);
    Vec<T> to_teacher, to_model;
    if constexpr (kDirect) {
      const Vec<T> x = below_top<kUnit, T>(a, c.teacher), y = below_top<kUnit, T>(b, c.model);
      const Vec<T> p = exp_below(x), q = exp_below(y), d = x - y;
      to_teacher = direct_gradient(teacher, p, q, d);
      to_model = direct_gradient(model, q, p, d);
    } else {
      const Entry<T> e = centred_entry(c, a, b);
      to_teacher = centred_gradient(teacher, e.p, e);
      to_model = centred_gradient(model, e.q, e);
    }
    if (out.teacher != nullptr) {
      store(out.teacher + v, to_teacher);
      if (teacher.peaked) teacher_rest += a == c.teacher.top ? Vec<T>{} : to_teacher;
    }
    if (out.model != nullptr) {
      store(out.model + v, to_model);
      if (model.peaked) model_rest += b == c.model.top ? Vec<T>{} : to_model;
    }
  }
  if (out.teacher != nullptr) out.teacher_rest.add(teacher_rest);
  if (out.model != nullptr) out.model_rest.add(model_rest);
}

// The index in the row of its top, where that is in the chunk.
template <class T>
void find_peak(const T* logits, int64_t first, int64_t count, T top, int64_t* peak) {
  if (*peak >= 0) return;
  int at = -1;
  for (int v = 0; v < static_cast<int>(count); ++v) at = logits[v] == top ? v : at;
  if (at >= 0) *peak = first + at;
}

// Where a chunk's gradient is computed: in the output itself, where that can hold whole vectors of T. (Streaming stores
// measured slower: the pages of a fresh output are in the caches, just zeroed by the system.)
template <class T>
T* place(const Gradient& out, int64_t at, int64_t count, T* copy) {
  if (out.data == nullptr) return nullptr;
  return out.type == kType<T> && count % kLanes<T> == 0 ? static_cast<T*>(out.data) + at : copy;
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

template <class T>
void fill_row(const Gradient& out, int64_t row, int64_t vocabulary, T value) {
  if (out.data == nullptr) return;
  for (int64_t v = 0; v < vocabulary; ++v) narrow(&value, 1, out.data, out.type, row * vocabulary + v);
}

template <class T>
void backward_row(const DivergenceBackward& b, const Row<T>& row, const Row<T>& next, Buffers<T>& room) {
  const Divergence& s = b.call;
  const RowStatistics& found = b.statistics[row.index];
  if (found.teacher_sum != found.teacher_sum) {
    fill_row(b.teacher, row.index, s.vocabulary, kNothing<T>);
    fill_row(b.model, row.index, s.vocabulary, kNothing<T>);
    fill_row(b.uncond, row.index, s.vocabulary, kNothing<T>);
    return;
  }
  const double upstream = static_cast<double>(static_cast<const T*>(b.upstream)[row.index]);
  const Side<T> teacher = teacher_side<T>(s, found, upstream), model = model_side<T>(s, found, upstream);
  const Centred<T> c = centred_row<T>(s, found);
  const bool wants_teacher = b.teacher.data != nullptr || b.uncond.data != nullptr;
  int64_t teacher_peak = -1, model_peak = -1;
  Outgoing<T> out{};
  for (int64_t first = 0; first < s.vocabulary; first += kChunk<T>) {
    prefetch_chunk(s, next, first);
    const int64_t count = smaller(kChunk<T>, s.vocabulary - first), at = row.index * s.vocabulary + first;
    const Chunk<T> chunk = read_chunk(s, row, first, room);
    if (wants_teacher && teacher.peaked) find_peak(chunk.teacher, first, count, c.teacher.top, &teacher_peak);
    if (b.model.data != nullptr && model.peaked) find_peak(chunk.model, first, count, c.model.top, &model_peak);
    out.teacher = wants_teacher ? room.teacher : nullptr;
    out.model = place(b.model, at, count, room.model);
    if (found.direct == 0) {
      chunk_gradients<T, false, false>(c, teacher, model, chunk, out);
    } else if (unit_temperatures(s)) {
      chunk_gradients<T, true, true>(c, teacher, model, chunk, out);
    } else {
      chunk_gradients<T, true, false>(c, teacher, model, chunk, out);
    }
    if (out.model == room.model) narrow(out.model, count, b.model.data, b.model.type, at);
    if (wants_teacher) write_guided(b, row.guidance, at, count, out.teacher, room.uncond);
  }
  if (teacher_peak >= 0) {
    const T value = static_cast<T>(-out.teacher_rest.sum());
    write_guided(b, row.guidance, row.index * s.vocabulary + teacher_peak, 1, &value, room.uncond);
  }
  if (model_peak >= 0) {
    const T value = static_cast<T>(-out.model_rest.sum());
    narrow(&value, 1, b.model.data, b.model.type, row.index * s.vocabulary + model_peak);
  }
}

template <class T>
void backward(const DivergenceBackward& b, int64_t begin, int64_t end) {
  const Divergence& s = b.call;
  Buffers<T> room;
  Row<T> next = find_row<T>(s, row_index(s, begin));
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row = next;
    if (i + 1 < end) next = find_row<T>(s, row_index(s, i + 1));
    backward_row(b, row, next, room);
  }
}

template <class T>
constexpr DivergenceKernels kKernels = {forward<T>, backward<T>};

}  // namespace

const DivergenceTable& divergence_table() {
  static constexpr DivergenceTable table = {kKernels<float>, kKernels<double>};
  return table;
}

}  // namespace softdimo::cpu::SOFTDIMO_ISA
