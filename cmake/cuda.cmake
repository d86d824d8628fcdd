# CUDA library: kernels without any torch header, and the binding. Skipped when no toolkit is found.

# nvcc on PATH can be a wrapper script; the toolkit is where nvcc itself says it is.
find_program(softdimo_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
if(softdimo_nvcc AND NOT CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${softdimo_nvcc} --dryrun -x cu -c /dev/null -o /dev/null
                  ERROR_VARIABLE dryrun OUTPUT_QUIET)
  if(dryrun MATCHES "TOP=([^\r\n]+)")
    get_filename_component(top "${CMAKE_MATCH_1}" ABSOLUTE)
    set(CMAKE_CUDA_COMPILER "${top}/bin/nvcc")
  endif()
endif()

# sm_80 for A100, sm_90a for H100 and H200 (their own instructions), PTX for whatever comes after.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real;80-virtual")
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "No CUDA toolkit found: building the CPU library alone")
  return()
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# Kernels, and the binding of each operator.
set(cuda_sources
    csrc/cuda/divergence_backward.cu
    csrc/cuda/divergence_counts.cu
    csrc/cuda/divergence_forward.cu
    csrc/cuda/masked_cross_entropy.cu
    csrc/cuda/row_sum.cu
    csrc/cuda/sample_tokens.cu
    csrc/cuda/soft_embedding_dcodebook.cu
    csrc/cuda/soft_embedding_dlogits.cu
    csrc/cuda/soft_embedding_forward.cu
    csrc/cuda/soft_embedding_pack.cu
    csrc/cuda/soft_embedding_prepare.cu
    csrc/cuda/soft_embedding_tiny_dcodebook.cu
    csrc/cuda/soft_embedding_tiny_dlogits.cu
    csrc/cuda/soft_embedding_tiny_forward.cu
    csrc/cuda/token_statistics.cu)
set(cuda_bindings
    csrc/bind_cuda/distribution_matching_loss.cpp
    csrc/bind_cuda/divergence.cpp
    csrc/bind_cuda/library.cpp
    csrc/bind_cuda/masked_cross_entropy.cpp
    csrc/bind_cuda/sample_tokens.cpp
    csrc/bind_cuda/soft_embedding.cpp
    csrc/bind_cuda/soft_embedding_backward.cpp
    csrc/bind_cuda/token_divergence.cpp
    csrc/bind_cuda/token_statistics.cpp)

add_library(softdimo_cuda_kernels OBJECT ${cuda_sources})
target_include_directories(softdimo_cuda_kernels PRIVATE csrc/include)
# -fmad=false: a * b + c is fused where the source says fmaf and nowhere else, so that what a row gives does not
#   depend on the code around an expression.
# A register spill is a build error: kernels are designed to fit.
target_compile_options(softdimo_cuda_kernels PRIVATE -fmad=false -lineinfo
                       "SHELL:-Xptxas --warn-on-spills,-Werror" "SHELL:-Xcompiler -Wall,-Wextra")

# What torch.ops.softdimo.compiled_cuda_archs() says: 80-real is sm_80, 80-virtual compute_80, plain 80 both.
foreach(arch IN LISTS CMAKE_CUDA_ARCHITECTURES)
  string(REGEX MATCH "^[0-9]+[a-z]?" number "${arch}")
  if(NOT arch MATCHES "-virtual$")
    list(APPEND archs "sm_${number}")
  endif()
  if(NOT arch MATCHES "-real$")
    list(APPEND archs "compute_${number}")
  endif()
endforeach()
string(REPLACE ";" " " archs "${archs}")

add_library(softdimo_cuda MODULE ${cuda_bindings} $<TARGET_OBJECTS:softdimo_cuda_kernels>)
softdimo_torch_library(softdimo_cuda _cuda)
target_compile_definitions(softdimo_cuda PRIVATE "SOFTDIMO_CUDA_ARCHS=\"${archs}\"")
target_compile_options(softdimo_cuda PRIVATE -Wall -Wextra "-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=")
target_include_directories(softdimo_cuda PRIVATE csrc)
target_include_directories(softdimo_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
set_target_properties(softdimo_cuda PROPERTIES LINKER_LANGUAGE CXX)
# libtorch (not only libtorch_cpu) must be needed, or the current-stream symbol stays null on a CUDA torch. The CUDA
# runtime is linked statically: the library then loads where there is no CUDA, and beside any version of it.
target_link_libraries(softdimo_cuda PRIVATE -Wl,--no-as-needed torch torch_cpu -Wl,--as-needed CUDA::cudart_static
                      -Wl,-z,defs)
