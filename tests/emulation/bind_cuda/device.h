// Twin of csrc/bind_cuda/device.h: the operators are torch.ops.softdimo_emulated.NAME, and take CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#define SOFTDIMO_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(softdimo_emulated, CPU, m)

namespace softdimo::cuda {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline void* current_stream(const torch::stable::Tensor&) { return nullptr; }

inline std::string error_text(int code) { return "error " + std::to_string(code); }

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.device() == b.device();
}

}  // namespace softdimo::cuda
