// What every CUDA kernel relies on, and every binding checks.
#pragma once

#include <cstdint>

namespace softdimo::cuda {

// The largest vocabulary: column numbers are 32-bit.
constexpr int64_t kMaxVocabulary = int64_t{1} << 30;

}  // namespace softdimo::cuda
