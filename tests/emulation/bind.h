// Binds emulated launchers for Python. Addresses come as integers, as the launchers take them: raw pointers.
//
// bind/NAME.cpp holds SOFTDIMO_BIND(m) { m.def("NAME", ...); }; module.cpp runs all of them.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "emulated_memory.h"

namespace py = pybind11;

namespace emulation {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Bind = void (*)(py::module_&);

inline std::vector<Bind>& binds() {
  static std::vector<Bind> all;
  return all;
}

struct Registered {
  explicit Registered(Bind bind) { binds().push_back(bind); }
};

}  // namespace emulation

#define SOFTDIMO_BIND(m)                                      \
  static void bind(py::module_& m);                           \
  static const emulation::Registered registered_bind(&bind);  \
  static void bind(py::module_& m)
