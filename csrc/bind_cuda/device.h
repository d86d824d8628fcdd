// The device side of the bindings: where operators are registered, streams, errors. tests/emulation/bind_cuda/device.h
// gives the same names another meaning, so that the same bindings run on CPU tensors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

// libtorch_cuda alone has it. Weak, so that this library links against, and loads into, a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#define SOFTDIMO_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(softdimo, CUDA, m)

namespace softdimo::cuda {

using torch::stable::accelerator::DeviceGuard;

inline void* current_stream(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "softdimo: the torch that is loaded has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline std::string error_text(int code) {
  const auto error = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
}

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cuda() && a.get_device_index() == b.get_device_index();
}

}  // namespace softdimo::cuda
