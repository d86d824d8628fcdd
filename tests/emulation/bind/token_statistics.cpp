#include "softdimo/cuda/token_statistics.h"

#include "bind.h"

namespace {

using namespace softdimo;
using namespace softdimo::cuda;
using emulation::pointer;

// The logits of the rows that count, and nothing between or around them.
bool is_counted_logit(const TokenStatisticsParams& p, const void* address, int64_t bytes) {
  const int64_t size = size_of(p.dtype), pitch = p.row_stride * size;
  const int64_t offset = static_cast<const char*>(address) - static_cast<const char*>(p.logits);
  const int64_t row = pitch == 0 ? 0 : offset / pitch;
  return offset >= 0 && row < p.rows && offset - row * pitch + bytes <= p.vocabulary * size &&
         (p.mask == nullptr || pitch == 0 || p.mask[row * p.mask_stride] != 0);
}

int token_statistics(const TokenStatisticsParams& params) {
  const emulation::ReadGuard guard([&](const void* address, size_t bytes) {
    return is_counted_logit(params, address, static_cast<int64_t>(bytes));
  });
  return softdimo_token_statistics(&params, nullptr);
}

}  // namespace

SOFTDIMO_BIND(m) {
  m.def(
      "token_statistics",
      [](uintptr_t logits, DType dtype, int64_t rows, int64_t vocabulary, int64_t row_stride, uintptr_t mask,
         int64_t mask_stride, uintptr_t row_temperature, int64_t row_temperature_stride, float temperature,
         uintptr_t log_normalizer, uintptr_t entropy, uintptr_t max_prob) {
        const TokenStatisticsParams params{pointer<const void>(logits),
                                                     dtype,
                                                     rows,
                                                     vocabulary,
                                                     row_stride,
                                                     pointer<const uint8_t>(mask),
                                                     mask_stride,
                                                     pointer<const float>(row_temperature),
                                                     row_temperature_stride,
                                                     temperature,
                                                     pointer<float>(log_normalizer),
                                                     pointer<float>(entropy),
                                                     pointer<float>(max_prob)};
        return token_statistics(params);
      },
      py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("rows"), py::arg("vocabulary"),
      py::arg("row_stride"), py::arg("mask") = 0, py::arg("mask_stride") = 0, py::arg("row_temperature") = 0,
      py::arg("row_temperature_stride") = 0, py::arg("temperature") = 1.0f, py::arg("log_normalizer"),
      py::arg("entropy"), py::arg("max_prob"));
}
