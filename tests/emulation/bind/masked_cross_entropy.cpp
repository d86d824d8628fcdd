// The launchers alone, for sizes that no tensor has. Operators are called through torch.ops.softdimo_emulated.
#include "softdimo/cuda/masked_cross_entropy.h"

#include "bind.h"
#include "softdimo/cuda/row_sum.h"

namespace {

using namespace softdimo;
using namespace softdimo::cuda;
using emulation::pointer;

CrossEntropy call_of(DType dtype, int64_t rows, int64_t vocabulary) {
  CrossEntropy call{};
  call.dtype = dtype;
  call.rows = rows;
  call.vocabulary = call.row_stride = vocabulary;
  return call;
}

}  // namespace

SOFTDIMO_BIND(m) {
  m.def("masked_cross_entropy", [](DType dtype, int64_t rows, int64_t vocabulary) {
    CrossEntropyForwardParams params{};
    params.call = call_of(dtype, rows, vocabulary);
    return softdimo_masked_cross_entropy(&params, nullptr);
  });
  m.def("masked_cross_entropy_backward", [](DType dtype, int64_t rows, int64_t vocabulary) {
    CrossEntropyBackwardParams params{};
    params.call = call_of(dtype, rows, vocabulary);
    return softdimo_masked_cross_entropy_backward(&params, nullptr);
  });
  m.def("row_sum_partials", &row_sum_partials);
  m.def(
      "row_sum",
      [](uintptr_t values, uintptr_t value, int64_t rows, uintptr_t mask, int64_t mask_stride, bool mean,
         uintptr_t partials, uintptr_t result) {
        const RowSumParams params{pointer<const float>(values),
                                  pointer<const float>(value),
                                  rows,
                                  pointer<const uint8_t>(mask),
                                  mask_stride,
                                  mean,
                                  pointer<RowSumPartial>(partials),
                                  pointer<float>(result)};
        return softdimo_row_sum(&params, nullptr);
      },
      py::kw_only(), py::arg("values") = 0, py::arg("value") = 0, py::arg("rows"), py::arg("mask") = 0,
      py::arg("mask_stride") = 0, py::arg("mean"), py::arg("partials"), py::arg("result"));
}
