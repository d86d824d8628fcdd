// Twin of csrc/include/softdimo/cuda/launch.h.
#pragma once

#include "cuda_runtime.h"

#define SOFTDIMO_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                            \
  (static_cast<void>(stream), ::emulation::launch(::emulation::address_of(kernel), (grid), (block), \
                                                  (shared_bytes), [&] { (kernel)(__VA_ARGS__); }))

#define SOFTDIMO_SHARED(type, name, count)                            \
  static ::emulation::SharedArray<type, (count)> name##_of_all_blocks; \
  auto& name = name##_of_all_blocks.of_block()

#define SOFTDIMO_DYNAMIC_SHARED(name) unsigned char* const name = ::emulation::machine().dynamic_shared
