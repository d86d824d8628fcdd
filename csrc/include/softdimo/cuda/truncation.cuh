// Exact truncation of one row, top_k then top_p: which entries of x = logits / temperature are kept. The rule is that
// of csrc/cpu/truncation.h, in float32: an entry weighs 1 under top_k and exp(x - max) under top_p, and the boundary
// is the smallest entry such that the entries above it weigh less than k, or than p times what top_k left.
//
// Digits are those of the logit z, not of x: dividing by T keeps the order, though not always the difference. So the
// boundary's x is right, and one more sweep measures what lies above it and equals it, by x. Entries that equal the
// boundary are kept up to an index, which is selected the same way among theirs.
//
// Sweeps: one per digit (4 for bfloat16, 5 for float16, 8 for float32) and one to measure; for ties that are kept in
// part one more and a few short ones. All of it once for top_k and once for top_p.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "softdimo/cuda/held_row.cuh"
#include "softdimo/cuda/ptx.cuh"
#include "softdimo/cuda/radix_select.cuh"

namespace softdimo::cuda {

// Kept: x > threshold, or x == threshold and index <= last.
struct Kept {
  float threshold;
  int last;

  __device__ __forceinline__ bool keeps(float x, int v) const {
    return x > threshold || (x == threshold && v <= last);
  }
};

// The same by logits: z >= above, or z >= equal and index <= last.
struct Cut {
  float above, equal;
  int last;

  __device__ __forceinline__ float apply(float z, int v) const {
    return (z >= above) | ((z >= equal) & (v <= last)) ? z : -INFINITY;  // no branch
  }
};

struct Truncation {
  Kept kept;
  Cut cut;
};

// A row measured at a value of x: the weight above it, the smallest logits above and at it, how many are equal to it.
struct Measure {
  double above;
  float least_above, least_equal;
  int equal, unused;

  struct Join {
    __device__ __forceinline__ Measure operator()(const Measure& a, const Measure& b) const {
      return {a.above + b.above, fminf(a.least_above, b.least_above), fminf(a.least_equal, b.least_equal),
              a.equal + b.equal, 0};
    }
  };
};

// Logits whose x is surely below that of the boundary, or above: z < below, z > above. Few lie between, and only
// those have to be divided to be compared.
struct Window {
  float below, above;
};

// How many of `most` equal entries top_p keeps, each of weight `own`, after entries that weigh `above`: those where
// the mass up to and with the entry, rounded, minus its own, rounded, is below p; the largest entry always.
__device__ __forceinline__ int kept_ties(double above, double own, double total, double top_p, int most) {
  const float share = static_cast<float>(own / total);
  const double before = above / total;
  int kept = above == 0.0 ? 1 : 0, end = most;
  while (kept < end) {  // entry `middle` is kept, and then all before it, or it is not, and none after it
    const int middle = kept + (end - kept) / 2;
    const double mass = before + (static_cast<double>(middle) + 1.0) * static_cast<double>(share);
    if (static_cast<float>(mass) - share < static_cast<float>(top_p)) {
      kept = middle + 1;
    } else {
      end = middle;
    }
  }
  return kept;
}

template <typename T, int kThreads, int kBlock, bool kResident>
class Truncate {
 public:
  using Row = HeldRow<T, kThreads, kResident>;
  using Group = RowGroup<kThreads, kBlock>;
  static constexpr int kSharedBytes = RadixSelect<kThreads, kBlock>::kBytes;

  __device__ __forceinline__ Truncate(const Group& group, const Row& row, float temperature, unsigned char* shared)
      : group_(group), row_(row), temperature_(temperature), select_(group, shared) {}

  // top: the row's maximum, finite. top_k: 0 keeps all. top_p: 1 keeps all. One of them drops something. Under top_p
  // a row whose largest x is infinite keeps the first such entry alone.
  __device__ __forceinline__ Truncation operator()(float top, int64_t top_k, double top_p) const {
    Truncation found{{-INFINITY, row_.columns() - 1}, {}};
    const int end = top_p < 1.0 ? 2 : 1;
#pragma unroll 1
    for (int i = top_k > 0 ? 0 : 1; i < end; ++i) {  // one copy of the code
      const bool by_mass = i == 1;
      found = at_most(found.kept, top, by_mass, {by_mass ? 0.0 : static_cast<double>(top_k), by_mass ? top_p : 0.0});
    }
    return found;
  }

 private:
  __device__ __forceinline__ float scaled(float z) const { return temperature_ == 1.0f ? z : z / temperature_; }

  // Of the entries kept before, those that the target leaves.
  __device__ __forceinline__ Truncation at_most(const Kept before, float top, bool by_mass,
                                                const Target target) const {
    const float x_top = scaled(top);
    const auto weight = [&](float x) {
      return by_mass ? ptx::exp2_approx((x - x_top) * 1.44269504088896340736f) : 1.0f;
    };
    const bool infinite = by_mass && !(fabsf(x_top) < INFINITY);
    Selected selected{key_of<T>(top), 0.0};
    if (!infinite) {
      selected = select_.find(kKeyBits<T>, target, [&](int shift, uint32_t prefix, const auto& add) {
        const KeyRange<T> range(shift + kDigitBits, prefix);
        row_.sweep(group_.thread(), 0, row_.chunks() - 1, [&](float z, int v) {
          if (!range.may_hold(z)) return;
          add(key_of<T>(z), [&] {
            if (!by_mass) return 1.0f;
            const float x = scaled(z);
            return before.keeps(x, v) ? weight(x) : 0.0f;
          });
        });
      });
    }
    const float z = value_of<T>(selected.key), x = scaled(z);
    const Window window = window_of(z, x);
    const Measure measure = measure_at(x, window, before, by_mass, weight);
    int wanted = 1;
    if (!infinite) {
      wanted = by_mass ? kept_ties(measure.above, weight(x), selected.total, target.share, measure.equal)
                       : static_cast<int>(target.number - measure.above);
    }
    const int last = last_equal(x, window, before, wanted, measure.equal);
    return {{x, last}, {measure.least_above, measure.least_equal, last}};
  }

  // Checked, not assumed: dividing keeps the order, so one logit speaks for all beyond it.
  __device__ __forceinline__ Window window_of(float z, float x) const {
    const float step = fmaf(fabsf(z), 1e-6f, FLT_MIN);
    const float below = z - step, above = z + step;
    return {scaled(below) < x ? below : -INFINITY, scaled(above) > x ? above : INFINITY};
  }

  template <typename Weight>
  __device__ __forceinline__ Measure measure_at(float boundary, const Window& window, const Kept& before, bool by_mass,
                                                const Weight& weight) const {
    float above = 0.0f, least_above = INFINITY, least_equal = INFINITY;
    int equal = 0;
    row_.sweep(group_.thread(), 0, row_.chunks() - 1, [&](float z, int v) {
      if (z < window.below) return;
      const float x = z <= window.above || by_mass ? scaled(z) : INFINITY;
      if (z > window.above || x > boundary) {
        above += weight(x);
        least_above = fminf(least_above, z);
      } else if (x == boundary) {
        equal += before.keeps(x, v) ? 1 : 0;
        least_equal = fminf(least_equal, z);
      }
    });
    return group_.all(Measure{static_cast<double>(above), least_above, least_equal, equal, 0}, Measure::Join{});
  }

  // The index of the last of the first `wanted` of `equal` entries kept before whose x is the boundary's.
  __device__ __forceinline__ int last_equal(float boundary, const Window& window, const Kept& before, int wanted,
                                            int equal) const {
    if (wanted <= 0) return -1;
    const int64_t end = row_.columns() - 1;
    if (wanted >= equal) return boundary == before.threshold ? before.last : static_cast<int>(end);
    int bits = kDigitBits;
    while (end >> bits != 0) bits += kDigitBits;
    const int64_t highest = (int64_t{1} << bits) - 1;  // keys fall as indices rise
    const Target target{static_cast<double>(wanted), 0.0};
    const Selected selected = select_.find(bits, target, [&](int shift, uint32_t prefix, const auto& add) {
      const int64_t group = int64_t{1} << (shift + kDigitBits);  // indices with the same prefix
      const int64_t first = highest + 1 - (prefix + int64_t{1}) * group, last = first + group - 1;
      const int64_t final = last < end ? last : end;
      const int first_chunk = static_cast<int>(first / Row::kChunk), last_chunk = static_cast<int>(final / Row::kChunk);
      row_.sweep(group_.thread(), first_chunk, last_chunk, [&](float z, int v) {
        if (z < window.below || z > window.above) return;
        const float x = scaled(z);
        if (x == boundary && before.keeps(x, v)) add(static_cast<uint32_t>(highest - v), [] { return 1.0f; });
      });
    });
    return static_cast<int>(highest - selected.key);
  }

  const Group& group_;
  const Row& row_;
  float temperature_;
  RadixSelect<kThreads, kBlock> select_;
};

}  // namespace softdimo::cuda
