// Memory as the emulated kernels see it: what they may read, shared arrays, asynchronous copies.
#pragma once

#include "cuda_emulation.h"
#include "emulated_banks.h"

namespace emulation {

// ---------------------------------------------------------------------------------------------------
// global memory

// While it lives, loads throw outside of what it allows.
class ReadGuard {
 public:
  explicit ReadGuard(std::function<bool(const void*, size_t)> may_read) { machine().may_read = std::move(may_read); }
  ~ReadGuard() { machine().may_read = nullptr; }
  ReadGuard(const ReadGuard&) = delete;
  ReadGuard& operator=(const ReadGuard&) = delete;
};

inline void check_aligned(const char* what, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    throw std::logic_error(std::string(what) + " of " + std::to_string(bytes) +
                           " bytes at an address that is not aligned");
  }
}

inline void check_readable(const void* address, size_t bytes) {
  const auto& may_read = machine().may_read;
  if (may_read && !may_read(address, bytes)) {
    throw std::logic_error("a load from memory that the kernel has no business with");
  }
}

template <typename T>
T load(const T* address) {
  check_aligned("a load", address, sizeof(T));
  check_readable(address, sizeof(T));
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

template <typename T>
void store(T* address, const T& value) {
  check_aligned("a store", address, sizeof(T));
  std::memcpy(address, &value, sizeof(T));
}

// ---------------------------------------------------------------------------------------------------
// shared memory

// Counts an array that the block has come to. A GPU would refuse the launch where all of them are too many.
inline void count_static(size_t bytes) {
  Machine& m = machine();
  m.static_bytes += bytes;
  if (m.static_bytes + m.dynamic_bytes > m.shared_limit) {
    throw std::logic_error("a block shares " + std::to_string(m.static_bytes) + " bytes of arrays and " +
                           std::to_string(m.dynamic_bytes) + " of the launch, more than " +
                           std::to_string(m.shared_limit));
  }
}

// What SOFTDIMO_SHARED declares here. Blocks run one at a time, so one copy serves all of them.
template <typename T, int kCount>
class SharedArray {
 public:
  SharedArray() { machine().static_shared.push_back({data_, sizeof(data_)}); }

  // The array of the block that runs, poisoned when its first thread comes here.
  SharedArray& of_block() {
    if (block_ == machine().blocks) return *this;
    block_ = machine().blocks;
    std::memset(static_cast<void*>(data_), kPoison, sizeof(data_));
    count_static(sizeof(data_));
    return *this;
  }

  T& operator[](int64_t index) {
    if (index < 0 || index >= kCount) {
      throw std::out_of_range("shared array of " + std::to_string(kCount) + ": index " + std::to_string(index));
    }
    return data_[index];
  }

 private:
  T data_[kCount];
  int64_t block_ = -1;
};

inline bool is_inside(const void* address, size_t bytes, const void* start, size_t size) {
  const auto a = reinterpret_cast<uintptr_t>(address), s = reinterpret_cast<uintptr_t>(start);
  return a >= s && a + bytes <= s + size;
}

// Throws unless the 16 bytes are aligned and within one shared array.
inline void check_shared_16(const char* what, const void* address) {
  check_aligned(what, address, 16);
  const Machine& m = machine();
  if (is_inside(address, 16, m.dynamic_shared, m.dynamic_bytes)) return;
  for (const auto& [data, bytes] : m.static_shared) {
    if (is_inside(address, 16, data, bytes)) return;
  }
  throw std::out_of_range(std::string(what) + " of 16 bytes outside of shared memory");
}

// ---------------------------------------------------------------------------------------------------
// cp.async: the bytes arrive when the thread waits for them, and until then the destination is poisoned

inline void start_copy_16(void* shared, const void* global, int bytes, Place place) {
  if (bytes < 0 || bytes > 16) throw std::logic_error("an asynchronous copy of " + std::to_string(bytes) + " bytes");
  check_shared_16("an asynchronous copy", shared);
  check_aligned("an asynchronous copy", global, 16);
  if (bytes > 0) check_readable(global, bytes);
  std::memset(shared, kPoison, 16);
  Fiber& self = *machine().current;
  banks().access(place, shared);
  self.copies.push_back({shared, global, bytes, self.groups});
}

inline void commit_copies() { ++machine().current->groups; }

inline void wait_copies(int pending) {
  Fiber& self = *machine().current;
  const int64_t end = self.groups - pending;
  size_t left = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group >= end) {
      self.copies[left++] = copy;
      continue;
    }
    std::memset(copy.shared, 0, 16);
    std::memcpy(copy.shared, copy.global, copy.bytes);
  }
  self.copies.resize(left);
}

}  // namespace emulation
