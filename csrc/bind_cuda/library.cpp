// What the library says about itself.

#include <torch/csrc/stable/library.h>

#include <string>

namespace softdimo::cuda {
namespace {

// As CMake was told: "sm_80 sm_90a compute_80".
std::string compiled_cuda_archs() { return SOFTDIMO_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(softdimo, m) { m.def("compiled_cuda_archs() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(softdimo, CompositeExplicitAutograd, m) {
  m.impl("compiled_cuda_archs", TORCH_BOX(&compiled_cuda_archs));
}

}  // namespace softdimo::cuda
