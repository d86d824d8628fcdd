// Counts how often accesses of 16 bytes to shared memory collide.
//
// A warp's access is served in phases of eight neighbouring lanes: 8 x 16 bytes over 32 banks of 4 bytes. A phase takes
// one pass if its chunks of 16 bytes lie in eight different places modulo 128 bytes, else as many as share one.
#pragma once

#include <array>
#include <set>
#include <tuple>

#include "cuda_emulation.h"

namespace emulation {

class Banks {
 public:
  void start() {
    *this = Banks();
    counting_ = true;
  }

  // ldmatrix: lane `lane` of those that give addresses reads `chunk`.
  void matrix_row(Place place, int lane, const void* chunk) {
    if (lane == 0) ++matrix_loads_;
    if (counting_) phases_[{place.text(), -1, matrix_loads_, lane / 8}].add(chunk);
  }

  // An access that lanes make one by one: the n-th of each lane of a block, at that place, belong together.
  void access(Place place, const void* chunk) {
    if (!counting_) return;
    const Fiber& self = *machine().current;
    const int64_t block = machine().blocks, n = made_[{place.text(), block, self.index}]++;
    phases_[{place.text(), block, n, self.index / 8}].add(chunk);
  }

  // Passes per phase by place in the source: 1 where nothing collides. Ends the count.
  std::map<std::string, double> stop() {
    std::map<std::string, std::pair<int64_t, int64_t>> counts;
    for (const auto& [key, phase] : phases_) {
      auto& [passes, phases] = counts[std::get<0>(key)];
      passes += phase.passes();
      ++phases;
    }
    std::map<std::string, double> result;
    for (const auto& [place, count] : counts) result[place] = static_cast<double>(count.first) / count.second;
    *this = Banks();
    return result;
  }

 private:
  struct Phase {
    std::array<std::set<uintptr_t>, 8> chunks;  // by place modulo 128 bytes

    void add(const void* chunk) {
      const uintptr_t number = reinterpret_cast<uintptr_t>(chunk) / 16;
      chunks[number % 8].insert(number);
    }

    int64_t passes() const {
      size_t most = 0;
      for (const auto& colliding : chunks) most = std::max(most, colliding.size());
      return static_cast<int64_t>(most);
    }
  };

  bool counting_ = false;
  int64_t matrix_loads_ = 0;
  std::map<std::tuple<std::string, int64_t, int>, int64_t> made_;  // accesses by place, block, thread
  std::map<std::tuple<std::string, int64_t, int64_t, int>, Phase> phases_;
};

inline Banks& banks() {
  static Banks instance;
  return instance;
}

}  // namespace emulation
