// What the library says about itself.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace softdimo::cpu {
namespace {

std::string cpu_isa() { return isa_name(active_isa()); }
std::string compiled_cpu_isas() { return compiled_isas(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softdimo, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("compiled_cpu_isas", TORCH_BOX(&compiled_cpu_isas));
}

}  // namespace softdimo::cpu
