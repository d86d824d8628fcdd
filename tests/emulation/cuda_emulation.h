// Runs CUDA kernels on a CPU, to check them: the same .cu files, launchers included, compiled as C++.
//
// One block runs at a time, one fiber (a stack of its own) per thread. A thread runs until it waits at a barrier or
// at a warp operation such as a shuffle; then the schedule picks another. What a GPU leaves undefined is made visible:
//
//   - shared memory starts as NaN (0xff bytes) in every block, and static arrays check every index;
//   - a warp's lanes and a block's warps run one after the other, each as far ahead as it can, in rising (`greedy`) or
//     falling (`reverse`) order: a missing barrier reads NaN, or gives results that differ between the two;
//   - a barrier opens when every thread of the block waits at the same line of source; a warp operation when every
//     lane of its mask does, with the same mask. If no thread can run, launch() throws a list of who waits where;
//   - loads from an address that is not a multiple of the element's size throw, and so do those outside of the memory
//     that the kernel was declared to read, be it valid memory or not (`ReadGuard`);
//   - the destination of an asynchronous copy is poisoned until the thread that asked for it waits.
//
// It knows what the kernels use. A new warp instruction is a few lines: publish operands with `exchange`, read those
// of the other lanes from the table that it returns; or let the last lane compute for all with `collective`.
// This header has threads that wait for each other; emulated_launch.h runs them, emulated_memory.h has what they read
// and write, emulated_matrix.h the matrix instructions.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 163 * 1024;  // of an sm_80 block; sm_90 has 227 KB
constexpr size_t kMostSharedUnasked = 48 * 1024;
constexpr size_t kOperand = 64;             // most bytes that a lane publishes in a warp operation
constexpr unsigned char kPoison = 0xff;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024 + 832;  // no power of two: else all stacks share the same cache sets
#endif

enum class Schedule { greedy, reverse };

// A place in the kernel's source.
struct Place {
  const char* what;
  const char* file;
  int line;

  bool operator==(const Place& other) const {
    return line == other.line && same(what, other.what) && same(file, other.file);
  }
  std::string text() const { return std::string(what) + " (" + file + ":" + std::to_string(line) + ")"; }

 private:
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};

// What the lanes of one warp operation published.
struct Table {
  unsigned lanes = 0;
  alignas(16) unsigned char operand[kLanes][kOperand];

  template <typename T>
  T get(int lane) const {
    if (!(lanes >> lane & 1)) {
      throw std::logic_error("a lane reads from lane " + std::to_string(lane) + ", which does not take part");
    }
    T value;
    std::memcpy(&value, operand[lane], sizeof(T));
    return value;
  }

  template <typename T>
  void set(int lane, const T& value) {
    std::memcpy(operand[lane], &value, sizeof(T));
  }
};

// A copy of cp.async on its way, and the group of its thread's copies that it belongs to.
struct Copy {
  void* shared;
  const void* global;
  int bytes;  // the rest of 16 is zero
  int64_t group;
};

enum class State : uint8_t { ready, at_block_barrier, at_warp_operation, finished };

struct Fiber {
  int index;
  uint3 thread;
  State state;
  Place place;
  unsigned mask;  // of the warp operation it waits at
  alignas(16) unsigned char operand[kOperand];
  std::shared_ptr<const Table> table;  // of its last warp operation
  std::vector<Copy> copies;            // not waited for
  int64_t groups = 0;                  // of copies, committed
  ucontext_t context;
  jmp_buf resume;
  bool started = false;

  int lane() const { return index % kLanes; }
};

// A block that runs, and what outlives it: stacks, the schedule, the shared arrays that kernels declared.
struct Machine {
  Schedule schedule = Schedule::greedy;
  int64_t launches = 0;
  int64_t blocks = 0;  // of all launches
  int last_error = 0;
  std::function<bool(const void* address, size_t bytes)> may_read;  // unset: anything

  dim3 grid_size, block_size;
  uint3 block;
  int threads = 0;
  int at_barrier = 0;  // threads that wait at a barrier of the block
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;

  std::vector<std::pair<void*, size_t>> static_shared;
  unsigned char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  size_t static_bytes = 0;  // of the arrays that the block has come to
  size_t shared_limit = 0;  // of both together
  std::map<const void*, size_t> dynamic_limit;  // of the kernels that asked for more than kMostSharedUnasked
  unsigned char* stacks = nullptr;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

// Addresses of fibers' stacks; AddressSanitizer has to be told of each change of stack.
inline unsigned char* stack_of(const Fiber& fiber) { return machine().stacks + fiber.index * kStack; }

#if defined(__SANITIZE_ADDRESS__)
struct SchedulerStack {
  const void* bottom = nullptr;
  size_t size = 0;
};
inline SchedulerStack& scheduler_stack() {
  static SchedulerStack instance;
  return instance;
}
inline void leave_for(const Fiber& fiber) { __sanitizer_start_switch_fiber(nullptr, stack_of(fiber), kStack); }
inline void leave_for_scheduler() {
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack().bottom, scheduler_stack().size);
}
inline void arrive_in_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack().bottom, &scheduler_stack().size);
}
inline void arrive_in_scheduler() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
inline void forget_stack(const Fiber& fiber) { __asan_unpoison_memory_region(stack_of(fiber), kStack); }
#else
inline void leave_for(const Fiber&) {}
inline void leave_for_scheduler() {}
inline void arrive_in_fiber() {}
inline void arrive_in_scheduler() {}
inline void forget_stack(const Fiber&) {}
#endif

// ---------------------------------------------------------------------------------------------------
// waiting

// Gives the processor back to the scheduler until somebody makes this thread ready.
inline void wait() {
  Machine& m = machine();
  if (_setjmp(m.current->resume) == 0) {
    leave_for_scheduler();
    _longjmp(m.scheduler, 1);
  }
  arrive_in_fiber();
}

inline void block_barrier(Place place) {
  Machine& m = machine();
  m.current->state = State::at_block_barrier;
  m.current->place = place;
  const auto here = [&](const Fiber& fiber) { return fiber.place == place; };
  if (++m.at_barrier == m.threads && std::all_of(m.fibers.begin(), m.fibers.end(), here)) {
    for (Fiber& fiber : m.fibers) fiber.state = State::ready;
    m.at_barrier = 0;
  } else {
    wait();
  }
}

// Waits for the lanes of `mask`, which all publish an operand. The last one to come hands `combine` the table, in which
// it may put a result in each operand's place.
template <typename T, typename Combine>
const Table& collective(unsigned mask, const T& operand, Place place, const Combine& combine) {
  static_assert(sizeof(T) <= kOperand, "raise kOperand");
  Machine& m = machine();
  Fiber& self = *m.current;
  if (!(mask >> self.lane() & 1)) throw std::logic_error(place.text() + ": the calling lane is not in its own mask");
  std::memcpy(self.operand, &operand, sizeof(T));
  self.state = State::at_warp_operation;
  self.place = place;
  self.mask = mask;

  Fiber* warp = &m.fibers[self.index - self.lane()];
  const int lanes = std::min<int>(kLanes, m.threads - warp->index);
  for (int lane = 0; lane < lanes; ++lane) {
    const Fiber& other = warp[lane];
    if (!(mask >> lane & 1)) continue;
    if (other.state == State::at_warp_operation && other.mask == mask && other.place == place) continue;
    wait();
    return *self.table;
  }
  const auto table = std::make_shared<Table>();
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    table->lanes |= 1u << lane;
    std::memcpy(table->operand[lane], warp[lane].operand, sizeof(T));
  }
  combine(*table);
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    warp[lane].table = table;
    warp[lane].state = State::ready;
  }
  return *self.table;
}

// The table of what the lanes of `mask` published.
template <typename T>
const Table& exchange(unsigned mask, const T& operand, Place place) {
  return collective(mask, operand, place, [](const Table&) {});
}

}  // namespace emulation
