// Scratch memory of one task range: allocated once, outside the loops.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace softdimo::cpu::SOFTDIMO_ISA {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(::aligned_alloc(64, bytes > 0 ? bytes : 64));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { ::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace softdimo::cpu::SOFTDIMO_ISA
