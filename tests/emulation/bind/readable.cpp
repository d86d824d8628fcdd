// What emulated kernels may read through __ldg and asynchronous copies, for tests that call operators.
#include "bind.h"

#include <pybind11/stl.h>

namespace {

using Range = std::pair<uintptr_t, size_t>;  // address and bytes

void allow_reads(std::vector<Range> ranges) {
  emulation::machine().may_read = [ranges = std::move(ranges)](const void* address, size_t bytes) {
    return std::any_of(ranges.begin(), ranges.end(), [&](const Range& range) {
      return emulation::is_inside(address, bytes, reinterpret_cast<const void*>(range.first), range.second);
    });
  };
}

}  // namespace

SOFTDIMO_BIND(m) {
  m.def("allow_reads", &allow_reads);
  m.def("allow_all_reads", [] { emulation::machine().may_read = nullptr; });
}
