// Instruction sets: kernels are compiled once for each, and one is chosen when the library is loaded.
#pragma once

namespace softdimo::cpu {

// Each has everything that those before it have.
enum class Isa { baseline, x86_64_v3, x86_64_v4, avx512_bf16, amx_bf16 };

// The best instruction set of this processor that was compiled, or SOFTDIMO_CPU_ISA where that is set.
Isa active_isa();

const char* isa_name(Isa isa);

// Space-separated names, best first.
const char* compiled_isas();

}  // namespace softdimo::cpu

// The kernels of an operator, from the best instruction set it is compiled for: SOFTDIMO_TABLE for those without
// matrix products (baseline, v3, v4), SOFTDIMO_PRODUCT_TABLE for those that also have bfloat16 products.
#define SOFTDIMO_TRY(isa, table) \
  if (active_isa() >= Isa::isa) return isa::table();
#ifdef SOFTDIMO_HAVE_X86_64_V3
#define SOFTDIMO_TRY_V3(table) SOFTDIMO_TRY(x86_64_v3, table)
#else
#define SOFTDIMO_TRY_V3(table)
#endif
#ifdef SOFTDIMO_HAVE_X86_64_V4
#define SOFTDIMO_TRY_V4(table) SOFTDIMO_TRY(x86_64_v4, table)
#else
#define SOFTDIMO_TRY_V4(table)
#endif
#ifdef SOFTDIMO_HAVE_AVX512_BF16
#define SOFTDIMO_TRY_AVX512_BF16(table) SOFTDIMO_TRY(avx512_bf16, table)
#else
#define SOFTDIMO_TRY_AVX512_BF16(table)
#endif
#ifdef SOFTDIMO_HAVE_AMX_BF16
#define SOFTDIMO_TRY_AMX_BF16(table) SOFTDIMO_TRY(amx_bf16, table)
#else
#define SOFTDIMO_TRY_AMX_BF16(table)
#endif
#define SOFTDIMO_TABLE(table)                      \
  ([]() -> decltype(baseline::table()) {           \
    SOFTDIMO_TRY_V4(table) SOFTDIMO_TRY_V3(table)  \
    return baseline::table();                      \
  }())
#define SOFTDIMO_PRODUCT_TABLE(table)                                \
  ([]() -> decltype(baseline::table()) {                             \
    SOFTDIMO_TRY_AMX_BF16(table) SOFTDIMO_TRY_AVX512_BF16(table)     \
    SOFTDIMO_TRY_V4(table) SOFTDIMO_TRY_V3(table)                    \
    return baseline::table();                                        \
  }())
