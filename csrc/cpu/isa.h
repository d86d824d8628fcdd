// Instruction sets: kernels are compiled once for each, and one is chosen when the library is loaded.
#pragma once

namespace softdimo::cpu {

enum class Isa { baseline, x86_64_v3, x86_64_v4 };

// The best instruction set of this processor that was compiled, or SOFTDIMO_CPU_ISA where that is set.
Isa active_isa();

const char* isa_name(Isa isa);

// Space-separated names, best first.
const char* compiled_isas();

}  // namespace softdimo::cpu
