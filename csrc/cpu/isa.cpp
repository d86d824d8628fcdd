#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace softdimo::cpu {
namespace {

bool supported(Isa isa) {
  switch (isa) {
#ifdef SOFTDIMO_HAVE_X86_64_V4
    case Isa::x86_64_v4:
      return __builtin_cpu_supports("x86-64-v4");
#endif
#ifdef SOFTDIMO_HAVE_X86_64_V3
    case Isa::x86_64_v3:
      return __builtin_cpu_supports("x86-64-v3");
#endif
    case Isa::baseline:
      return true;
    default:
      return false;  // not compiled
  }
}

Isa best() {
  for (Isa isa : {Isa::x86_64_v4, Isa::x86_64_v3}) {
    if (supported(isa)) return isa;
  }
  return Isa::baseline;
}

Isa choose() {
  const char* wish = std::getenv("SOFTDIMO_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best();
  for (Isa isa : {Isa::baseline, Isa::x86_64_v3, Isa::x86_64_v4}) {
    if (std::string(wish) != isa_name(isa)) continue;
    if (supported(isa)) return isa;
    throw std::runtime_error(std::string("SOFTDIMO_CPU_ISA=") + wish +
                             ": this processor or this build does not have it; the best here is " +
                             isa_name(best()));
  }
  throw std::runtime_error(std::string("SOFTDIMO_CPU_ISA=") + wish + " is none of: " + compiled_isas());
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::x86_64_v4:
      return "x86-64-v4";
    case Isa::x86_64_v3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

const char* compiled_isas() {
#if defined(SOFTDIMO_HAVE_X86_64_V4)
  return "x86-64-v4 x86-64-v3 baseline";
#else
  return "baseline";
#endif
}

}  // namespace softdimo::cpu
