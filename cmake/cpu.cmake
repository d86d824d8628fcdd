# CPU library: torch-free kernel files, one object library per instruction set, and the bindings.

# -ffp-contract=fast: a * b + c is one fused operation wherever the instruction set has it, so that every
#   tile size of the micro-kernel rounds alike. Never -ffast-math: NaN and infinities mean something here.
set(kernel_flags -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra)

# Operators with matrix products are compiled for the instruction sets that multiply bfloat16 too.
set(product_sources
    csrc/cpu/linear_soft_embedding.cpp
    csrc/cpu/masked_attention.cpp
    csrc/cpu/soft_embedding_backward.cpp
    csrc/cpu/soft_embedding_forward.cpp)
set(vector_sources
    csrc/cpu/divergence.cpp
    csrc/cpu/masked_cross_entropy.cpp
    csrc/cpu/sample_tokens.cpp
    csrc/cpu/soft_embedding_by_row.cpp
    csrc/cpu/soft_embedding_tiny.cpp
    csrc/cpu/token_statistics.cpp)
set(bindings
    csrc/bind_cpu/distribution_matching_loss.cpp
    csrc/bind_cpu/divergence.cpp
    csrc/bind_cpu/library.cpp
    csrc/bind_cpu/linear_soft_embedding.cpp
    csrc/bind_cpu/masked_attention.cpp
    csrc/bind_cpu/masked_cross_entropy.cpp
    csrc/bind_cpu/sample_tokens.cpp
    csrc/bind_cpu/soft_embedding.cpp
    csrc/bind_cpu/token_divergence.cpp
    csrc/bind_cpu/token_statistics.cpp)

# name, vector bytes, compiler flags. The baseline variant alone where the processor is not x86-64.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(isas baseline x86_64_v3 x86_64_v4)
  set(flags_x86_64_v3 -march=x86-64-v3)
  set(bytes_x86_64_v3 32)
  set(flags_x86_64_v4 -march=x86-64-v4 -mprefer-vector-width=512)
  set(bytes_x86_64_v4 64)
  set(flags_avx512_bf16 ${flags_x86_64_v4} -mavx512bf16)
  set(bytes_avx512_bf16 64)
  set(flags_amx_bf16 ${flags_avx512_bf16} -mamx-tile -mamx-bf16)
  set(bytes_amx_bf16 64)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("-mavx512bf16 -mamx-tile -mamx-bf16" SOFTDIMO_COMPILES_BF16)
  if(SOFTDIMO_COMPILES_BF16)
    list(APPEND isas avx512_bf16 amx_bf16)
  endif()
else()
  set(isas baseline)
endif()
set(flags_baseline "")
set(bytes_baseline 16)

add_library(softdimo_cpu MODULE csrc/ops.cpp ${bindings} csrc/cpu/isa.cpp)
softdimo_torch_library(softdimo_cpu _cpu)
target_include_directories(softdimo_cpu PRIVATE csrc)
target_link_libraries(softdimo_cpu PRIVATE torch_cpu)
# Error messages name the source file: below this folder, not where it was built.
target_compile_options(softdimo_cpu PRIVATE -Wall -Wextra "-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=")

foreach(isa IN LISTS isas)
  set(kernel_sources ${product_sources})
  if(NOT isa MATCHES "bf16$")
    list(APPEND kernel_sources ${vector_sources})
  endif()
  add_library(softdimo_cpu_${isa} OBJECT ${kernel_sources})
  target_include_directories(softdimo_cpu_${isa} PRIVATE csrc/include)
  target_compile_options(softdimo_cpu_${isa} PRIVATE ${kernel_flags} ${flags_${isa}})
  target_compile_definitions(softdimo_cpu_${isa} PRIVATE SOFTDIMO_ISA=${isa}
                                                         SOFTDIMO_SIMD_BYTES=${bytes_${isa}})
  target_sources(softdimo_cpu PRIVATE $<TARGET_OBJECTS:softdimo_cpu_${isa}>)
  string(TOUPPER ${isa} upper)
  target_compile_definitions(softdimo_cpu PRIVATE SOFTDIMO_HAVE_${upper}=1)
  list(APPEND cpu_targets softdimo_cpu_${isa})
endforeach()

if(SOFTDIMO_SANITIZE)
  foreach(target IN LISTS cpu_targets ITEMS softdimo_cpu)
    target_compile_options(${target} PRIVATE -fsanitize=${SOFTDIMO_SANITIZE} -fno-sanitize-recover=all
                                             -fno-omit-frame-pointer -g)
    target_link_options(${target} PRIVATE -fsanitize=${SOFTDIMO_SANITIZE})
  endforeach()
endif()
