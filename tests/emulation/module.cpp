// The Python module of the emulator: its own switches, and the launchers that bind/ adds.

#include <pybind11/stl.h>

#include "bind.h"
#include "emulated_banks.h"
#include "planted.h"
#include "softdimo/dtype.h"

PYBIND11_MODULE(softdimo_emulation, m) {
  py::enum_<softdimo::DType>(m, "DType")
      .value("float64", softdimo::DType::float64)
      .value("float32", softdimo::DType::float32)
      .value("bfloat16", softdimo::DType::bfloat16)
      .value("float16", softdimo::DType::float16);
  py::enum_<emulation::Schedule>(m, "Schedule")
      .value("greedy", emulation::Schedule::greedy)
      .value("reverse", emulation::Schedule::reverse);

  m.def("set_schedule", [](emulation::Schedule schedule) { emulation::machine().schedule = schedule; });
  m.def("launches", [] { return emulation::machine().launches; });

  // bank_conflicts() ends what count_bank_conflicts() began: passes per access of eight lanes to 16 bytes of shared
  // memory each, by place in the source, 1 where nothing collides. Of ptx:: wrappers, not of plain loads and stores.
  m.def("count_bank_conflicts", [] { emulation::banks().start(); });
  m.def("bank_conflicts", [] { return emulation::banks().stop(); });

  m.def("run_planted", [](const std::string& name, uintptr_t input, uintptr_t output) {
    run_planted(name, emulation::pointer<const float>(input), emulation::pointer<float>(output));
  });

  m.def("run_planted_product", [](const std::string& name, uintptr_t a, uintptr_t b, uintptr_t c) {
    run_planted_product(name, emulation::pointer<const void>(a), emulation::pointer<const void>(b),
                        emulation::pointer<float>(c));
  });

  for (const emulation::Bind bind : emulation::binds()) bind(m);
}
