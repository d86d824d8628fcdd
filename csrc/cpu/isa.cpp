#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(SOFTDIMO_HAVE_AMX_BF16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace softdimo::cpu {
namespace {

#ifdef SOFTDIMO_HAVE_AMX_BF16
// Linux gives a process the tile registers only when it asks for them.
bool tiles_granted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool supported(Isa isa) {
  switch (isa) {
#ifdef SOFTDIMO_HAVE_AMX_BF16
    case Isa::amx_bf16:
      return supported(Isa::avx512_bf16) && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
             tiles_granted();
#endif
#ifdef SOFTDIMO_HAVE_AVX512_BF16
    case Isa::avx512_bf16:
      return supported(Isa::x86_64_v4) && __builtin_cpu_supports("avx512bf16");
#endif
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

constexpr Isa kBestFirst[] = {Isa::amx_bf16, Isa::avx512_bf16, Isa::x86_64_v4, Isa::x86_64_v3, Isa::baseline};

// Intel's vdpbf16ps starts every second cycle: half the rate of float32, which has two multiply-adds per cycle.
bool faster_than_those_before([[maybe_unused]] Isa isa) {
#ifdef SOFTDIMO_HAVE_AVX512_BF16
  if (isa == Isa::avx512_bf16) return !__builtin_cpu_is("intel");
#endif
  return true;
}

Isa best() {
  for (Isa isa : kBestFirst) {
    if (supported(isa) && faster_than_those_before(isa)) return isa;
  }
  return Isa::baseline;
}

Isa choose() {
  const char* wish = std::getenv("SOFTDIMO_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best();
  for (Isa isa : kBestFirst) {
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
    case Isa::amx_bf16:
      return "amx-bf16";
    case Isa::avx512_bf16:
      return "avx512-bf16";
    case Isa::x86_64_v4:
      return "x86-64-v4";
    case Isa::x86_64_v3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

const char* compiled_isas() {
  return ""
#ifdef SOFTDIMO_HAVE_AMX_BF16
         "amx-bf16 "
#endif
#ifdef SOFTDIMO_HAVE_AVX512_BF16
         "avx512-bf16 "
#endif
#ifdef SOFTDIMO_HAVE_X86_64_V4
         "x86-64-v4 "
#endif
#ifdef SOFTDIMO_HAVE_X86_64_V3
         "x86-64-v3 "
#endif
         "baseline";
}

}  // namespace softdimo::cpu
