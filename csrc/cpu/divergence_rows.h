// Rows of the divergences: where their logits are, and how they are read. See divergence.cpp.
#pragma once

#include <cmath>

#include "simd.h"
#include "softdimo/cpu/divergence.h"

namespace softdimo::cpu::SOFTDIMO_ISA {

// Entries are read as T, the compute type, or as Half: bfloat16 in place, for the compute type float.
using Half = uint16_t;

template <class T>
constexpr int64_t kPair = 2 * kLanes<T>;  // entries that the loops take at a time
template <class T>
constexpr int64_t kChunk = 32 * kLanes<T>;  // entries that are read at a time; sums over chunks are in double
template <class E>
constexpr DType kType = sizeof(E) == 8 ? DType::float64 : sizeof(E) == 4 ? DType::float32 : DType::bfloat16;
template <class T>
constexpr T kInfinity = static_cast<T>(HUGE_VAL);
template <class T>
constexpr T kNothing = static_cast<T>(__builtin_nan(""));

SOFTDIMO_ALWAYS_INLINE bool is_finite(double x) { return x - x == 0; }

// The sum of the lanes, by halves.
template <class T>
SOFTDIMO_ALWAYS_INLINE T sum_halves(Vec<T> v) {
  decltype(v < v) lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2) v += __builtin_shuffle(v, lane ^ width);
  return v[0];
}

// A sum in double of vectors, by lane.
template <class T>
struct Total;
template <>
struct Total<double> {
  Vec<double> lanes{};

  SOFTDIMO_ALWAYS_INLINE void add(Vec<double> v) { lanes += v; }
  SOFTDIMO_ALWAYS_INLINE double sum() const { return sum_halves<double>(lanes); }
};
template <>
struct Total<float> {
  typedef float HalfOfFloats __attribute__((vector_size(SOFTDIMO_SIMD_BYTES / 2)));
  Vec<double> low{}, high{};

  SOFTDIMO_ALWAYS_INLINE void add(Vec<float> v) {
    HalfOfFloats half[2];
    std::memcpy(half, &v, sizeof v);
    low += __builtin_convertvector(half[0], Vec<double>);
    high += __builtin_convertvector(half[1], Vec<double>);
  }
  SOFTDIMO_ALWAYS_INLINE double sum() const { return sum_halves<double>(low + high); }
};

// a > b ? a : b by lane, so b beside a NaN: one instruction, where the compiler may make two of the expression.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> greater(Vec<T> a, Vec<T> b) {
#if SOFTDIMO_SIMD_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) return (Vec<T>)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
  else return (Vec<T>)_mm512_maskz_max_pd(0xFF, (__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}

// ---------------------------------------------------------------------------------------------------
// two vectors of entries

template <class T>
struct Pair {
  Vec<T> first, second;
};

typedef uint32_t UnalignedUintVec __attribute__((vector_size(SOFTDIMO_SIMD_BYTES), aligned(2), may_alias));

template <class T>
SOFTDIMO_ALWAYS_INLINE Pair<T> load_pair(const T* p) {
  return {load(p), load(p + kLanes<T>)};
}
// The even entries and the odd ones: a bfloat16 is the upper half of a float.
SOFTDIMO_ALWAYS_INLINE Pair<float> load_pair(const Half* p) {
  const UintVec both = *reinterpret_cast<const UnalignedUintVec*>(p);
  return {(Vec<float>)(both << 16), (Vec<float>)(both & 0xFFFF0000u)};
}

template <class T>
SOFTDIMO_ALWAYS_INLINE void store_pair(T* p, const Pair<T>& v) {
  store(p, v.first);
  store(p + kLanes<T>, v.second);
}
// Rounds to nearest, ties to even. NaN stays NaN where its lower half is zero, as in those that arithmetic makes.
SOFTDIMO_ALWAYS_INLINE void store_pair(Half* p, const Pair<float>& v) {
  const UintVec first = (UintVec)v.first, second = (UintVec)v.second;
  const UintVec even = (first + 0x7FFFu + (first >> 16 & 1u)) >> 16;
  const UintVec odd = (second + 0x7FFFu + (second >> 16 & 1u)) & 0xFFFF0000u;
  *reinterpret_cast<UnalignedUintVec*>(p) = even | odd;
}

// For the greatest of some entries: with an odd one goes, below its last digit, what lies before it in memory. Of
// numbers that does not change which is the greatest; an infinity may become NaN. greatest() takes it away again.
template <class T>
SOFTDIMO_ALWAYS_INLINE Pair<T> load_ordered(const T* p) {
  return load_pair(p);
}
SOFTDIMO_ALWAYS_INLINE Pair<float> load_ordered(const Half* p) {
  const UintVec both = *reinterpret_cast<const UnalignedUintVec*>(p);
  return {(Vec<float>)(both << 16), (Vec<float>)both};
}
template <class T, class E>
SOFTDIMO_ALWAYS_INLINE T greatest(Vec<T> v) {
  const T top = highest<T>(v);
  if constexpr (sizeof(E) != sizeof(Half)) return top;
  else return from_bfloat16(static_cast<Half>(bits<uint32_t>(static_cast<float>(top)) >> 16));
}

// ---------------------------------------------------------------------------------------------------
// reading rows

template <class T>
struct Row {
  int64_t index;
  const char *teacher, *uncond, *model;  // its first logits
  T guidance;
};

SOFTDIMO_ALWAYS_INLINE int64_t row_index(const Divergence& s, int64_t i) {
  return s.counted != nullptr ? s.counted[i] : i;
}

SOFTDIMO_ALWAYS_INLINE const char* first_logit(const LogitRows& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + logits.rows.offset(row) * size_of(logits.type);
}

template <class T>
SOFTDIMO_ALWAYS_INLINE Row<T> find_row(const Divergence& s, int64_t row) {
  Row<T> found{row, first_logit(s.teacher, row), nullptr, first_logit(s.model, row), T(1)};
  if (s.uncond.data == nullptr) return found;
  found.uncond = first_logit(s.uncond, row);
  found.guidance = s.row_guidance != nullptr ? static_cast<const T*>(s.row_guidance)[row] : static_cast<T>(s.guidance);
  return found;
}

// Whether the row's logits can be read as Half.
template <class T>
SOFTDIMO_ALWAYS_INLINE bool read_by_halves(const Divergence& s, const Row<T>& row) {
  return sizeof(T) == sizeof(float) && s.teacher.type == DType::bfloat16 && s.model.type == DType::bfloat16 &&
         row.guidance == T(1);
}

// Room for one chunk, where it cannot be read or written in place.
template <class E, int64_t kCount>
struct Buffers {
  alignas(64) E teacher[kCount];
  alignas(64) E uncond[kCount];
  alignas(64) E model[kCount];
  alignas(64) E gradient[kCount];
};
template <class T>
struct Room {
  Buffers<T, kChunk<T>> values;
  Buffers<Half, kChunk<T>> halves;

  template <class E>
  SOFTDIMO_ALWAYS_INLINE Buffers<E, kChunk<T>>& as() {
    if constexpr (sizeof(E) == sizeof(T)) return values;
    else return halves;
  }
};

template <class T>
SOFTDIMO_ALWAYS_INLINE constexpr int64_t padded(int64_t count) {
  return (count + kPair<T> - 1) / kPair<T> * kPair<T>;
}

// Entries [first, first + count) of a row as E, then -inf up to padded(count).
template <class T, class E>
SOFTDIMO_ALWAYS_INLINE const E* read(const char* row, DType type, int64_t first, int64_t count, E* copy) {
  if (type == kType<E> && count % kPair<T> == 0) return reinterpret_cast<const E*>(row) + first;
  if constexpr (sizeof(E) == sizeof(Half)) {
    std::memcpy(copy, reinterpret_cast<const E*>(row) + first, static_cast<size_t>(count) * sizeof(E));
    for (int64_t v = count; v < padded<T>(count); ++v) copy[v] = 0xFF80u;
  } else {
    widen(row, type, first, count, copy);
    for (int64_t v = count; v < padded<T>(count); ++v) copy[v] = -kInfinity<T>;
  }
  return copy;
}

// u + s (c - u) from its nearer end, s != 1. -inf where both are; +inf in either makes +inf or NaN of it.
template <class T>
SOFTDIMO_ALWAYS_INLINE Vec<T> guide(Vec<T> c, Vec<T> u, T s) {
  Vec<T> step = (c == -kInfinity<T>)&(u == -kInfinity<T>) ? Vec<T>{} : c - u;
  step = u == kInfinity<T> ? splat(kNothing<T>) : step;
  return s < T(1) ? u + s * step : c + (s - T(1)) * step;
}

template <class E>
struct Chunk {
  const E *teacher, *model;
  int64_t end;  // padded
};

template <class T, class E>
SOFTDIMO_ALWAYS_INLINE Chunk<E> read_chunk(const Divergence& s, const Row<T>& row, int64_t first, Room<T>& room) {
  const int64_t count = smaller(kChunk<T>, s.vocabulary - first), end = padded<T>(count);
  auto& to = room.template as<E>();
  const E* teacher = read<T>(row.teacher, s.teacher.type, first, count, to.teacher);
  if constexpr (sizeof(E) == sizeof(T)) {
    if (row.guidance != T(1)) {
      const T* uncond = read<T>(row.uncond, s.uncond.type, first, count, to.uncond);
      for (int64_t v = 0; v < end; v += kLanes<T>) {
        store(to.teacher + v, guide(load(teacher + v), load(uncond + v), row.guidance));
      }
      teacher = to.teacher;
    }
  }
  return {teacher, read<T>(row.model, s.model.type, first, count, to.model), end};
}

// The row that is read next, fetched into the second cache meanwhile.
template <class T, class E>
struct Ahead {
  const char *teacher, *uncond, *model;  // uncond: null where it is not read
  int64_t teacher_size, uncond_size, model_size;

  SOFTDIMO_ALWAYS_INLINE Ahead(const Divergence& s, const Row<T>& next)
      : teacher(next.teacher), uncond(next.guidance != T(1) ? next.uncond : nullptr), model(next.model),
        teacher_size(size_of(s.teacher.type)), uncond_size(size_of(s.uncond.type)),
        model_size(size_of(s.model.type)) {}

  // A pair's lines, `first` entries on; where logits are narrower than E, some are asked for twice.
  SOFTDIMO_ALWAYS_INLINE void prefetch(int64_t first) const {
    for (int64_t byte = 0; byte < kPair<T> * static_cast<int64_t>(sizeof(E)); byte += 64) {
      __builtin_prefetch(teacher + first * teacher_size + byte, 0, 2);
      __builtin_prefetch(model + first * model_size + byte, 0, 2);
      if (uncond != nullptr) __builtin_prefetch(uncond + first * uncond_size + byte, 0, 2);
    }
  }
};

}  // namespace softdimo::cpu::SOFTDIMO_ISA
