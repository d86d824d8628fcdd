// How kernels are launched and how they declare shared memory: through these macros alone, never <<< >>> or
// __shared__ directly. tests/emulation/softdimo/cuda/launch.h gives the same names another meaning, so that the same
// source runs on a CPU, where shared memory is poisoned and every index is checked.
#pragma once

#include <cuda_runtime.h>

// A template with a comma goes into parentheses: SOFTDIMO_LAUNCH((kernel<float, 8>), grid, block, 0, stream, arguments).
// The caller asks cudaGetLastError() what became of the launch.
#define SOFTDIMO_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

// An array of `count` elements that the threads of a block share.
#define SOFTDIMO_SHARED(type, name, count) __shared__ type name[count]

// The shared memory that the launch asked for, as bytes.
#define SOFTDIMO_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
