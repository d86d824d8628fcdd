// Runs the threads of a grid: what SOFTDIMO_LAUNCH does here.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

// A fiber lives on from block to block and runs one thread of each.
inline void fiber_main() {
  arrive_in_fiber();
  Machine& m = machine();
  for (;;) {
    try {
      (*m.body)();
    } catch (...) {
      if (!m.error) m.error = std::current_exception();
    }
    m.current->state = State::finished;
    wait();
  }
}

// Runs one thread until it waits or ends.
inline void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  if (_setjmp(m.scheduler) == 0) {
    leave_for(fiber);
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    forget_stack(fiber);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack_of(fiber);
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, fiber_main, 0);
    setcontext(&fiber.context);
  }
  arrive_in_scheduler();
}

// "threads 0-31 wait at __syncthreads (kernel.cu:12); threads 32-63 have ended"
inline std::string who_waits_where() {
  const auto what = [](const Fiber& f) {
    return f.state == State::finished ? std::string("have ended") : "wait at " + f.place.text();
  };
  const std::vector<Fiber>& fibers = machine().fibers;
  std::string text;
  for (size_t i = 0; i < fibers.size();) {
    size_t last = i;
    while (last + 1 < fibers.size() && what(fibers[last + 1]) == what(fibers[i])) ++last;
    text += (i ? "; threads " : "threads ") + std::to_string(i) + "-" + std::to_string(last) + " " + what(fibers[i]);
    i = last + 1;
  }
  return text;
}

// Lets every lane of one warp run until all of them wait for another warp or have ended. False if none could run.
inline bool run_warp(int warp) {
  Machine& m = machine();
  const int first = warp * kLanes, count = std::min(kLanes, m.threads - first);
  bool progress = false, again = true;
  while (again) {
    again = false;
    for (int i = 0; i < count && !m.error; ++i) {
      Fiber& fiber = m.fibers[first + (m.schedule == Schedule::greedy ? i : count - 1 - i)];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      progress = again = true;
    }
  }
  return progress;
}

inline void run_block() {
  Machine& m = machine();
  ++m.blocks;
  m.at_barrier = 0;
  m.static_bytes = 0;
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    const unsigned x = m.block_size.x, y = m.block_size.y, t = i;
    fiber.index = i;
    fiber.thread = {t % x, t / x % y, t / (x * y)};
    fiber.state = State::ready;
    fiber.copies.clear();
  }
  const int warps = (m.threads + kLanes - 1) / kLanes;
  const auto finished = [](const Fiber& fiber) { return fiber.state == State::finished; };
  while (!m.error && !std::all_of(m.fibers.begin(), m.fibers.end(), finished)) {
    bool progress = false;
    for (int w = 0; w < warps; ++w) progress |= run_warp(m.schedule == Schedule::greedy ? w : warps - 1 - w);
    if (!progress && !m.error) {
      m.error = std::make_exception_ptr(std::runtime_error("the block is stuck: " + who_waits_where()));
    }
  }
}

inline void prepare_fibers(int threads) {
  Machine& m = machine();
  if (m.stacks == nullptr) {
    void* memory = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    m.stacks = static_cast<unsigned char*>(memory);
  }
  m.threads = threads;
  m.fibers.clear();
  m.fibers.resize(threads);
}

template <typename... Arguments>
const void* address_of(void (*kernel)(Arguments...)) {
  return reinterpret_cast<const void*>(kernel);
}

// Runs the whole grid before it returns. Errors of the configuration are left for
// cudaGetLastError, as on a GPU; errors of the kernel are thrown.
inline void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > kMostShared) {
    m.last_error = 9;  // cudaErrorInvalidConfiguration
    return;
  }
  const auto limit = m.dynamic_limit.find(kernel);
  const bool asked = limit != m.dynamic_limit.end();
  m.shared_limit = asked ? kMostShared : kMostSharedUnasked;
  if (shared_bytes > (asked ? limit->second : kMostSharedUnasked)) {
    m.last_error = 1;  // cudaErrorInvalidValue
    return;
  }
  ++m.launches;
  prepare_fibers(static_cast<int>(threads));
  m.grid_size = grid;
  m.block_size = block;
  m.body = &body;
  m.error = nullptr;
  // Exactly the bytes asked for, so that AddressSanitizer sees the end.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  m.dynamic_shared = static_cast<unsigned char*>(memory);
  m.dynamic_bytes = shared_bytes;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block = {x, y, z};
        std::memset(memory, kPoison, shared_bytes);
        run_block();
        if (m.error) std::rethrow_exception(m.error);
      }
    }
  }
}

}  // namespace emulation
