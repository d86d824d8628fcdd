#include "planted.h"

#include <cuda_runtime.h>

#include <map>
#include <stdexcept>

#include "softdimo/cuda/gumbel.cuh"
#include "softdimo/cuda/launch.h"
#include "softdimo/cuda/ptx.cuh"

namespace {

using namespace softdimo::cuda;

constexpr int kThreads = 64;
constexpr size_t kLarge = 64 * 1024, kUnasked = 48 * 1024;

// out[i] = in[63 - i], through shared memory.
template <bool kBarrier>
__global__ void mirror(const float* in, float* out) {
  SOFTDIMO_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
}

// The same through dynamic shared memory.
template <bool kBarrier>
__global__ void mirror_dynamic(const float* in, float* out) {
  SOFTDIMO_DYNAMIC_SHARED(bytes);
  float* buffer = reinterpret_cast<float*>(bytes);
  buffer[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
}

// Needs more dynamic shared memory than a kernel gets unasked.
template <bool kAsked>
__global__ void mirror_large(const float* in, float* out) {
  SOFTDIMO_DYNAMIC_SHARED(bytes);
  float* buffer = reinterpret_cast<float*>(bytes + kLarge - kThreads * sizeof(float));
  buffer[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
}

// The same, with an array of its own beside: together they are more than it gets unasked.
__global__ void mirror_both(const float* in, float* out) {
  SOFTDIMO_SHARED(float, buffer, kUnasked / 2 / sizeof(float) + 1);
  SOFTDIMO_DYNAMIC_SHARED(bytes);
  buffer[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
  bytes[threadIdx.x] = 0;
}

// out[i] = 11 in[63 - i], in two rounds over one buffer: its second filling must wait for the readers of the first.
template <bool kBarrier>
__global__ void two_rounds(const float* in, float* out) {
  SOFTDIMO_SHARED(float, buffer, kThreads);
  const int i = threadIdx.x;
  buffer[i] = in[i];
  __syncthreads();
  const float first = buffer[kThreads - 1 - i];
  if (kBarrier) __syncthreads();
  buffer[i] = 10 * in[i];
  __syncthreads();
  out[i] = first + buffer[kThreads - 1 - i];
}

// Half of the block waits at a barrier that the other half does not reach, or ends before it.
__global__ void divergent_barrier(const float* in, float* out) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void early_exit(const float* in, float* out) {
  if (threadIdx.x >= kThreads / 2) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

// The sum over each warp, in all of its lanes.
__global__ void warp_sum(const float* in, float* out) {
  float sum = in[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  out[threadIdx.x] = sum;
}

// out[i] = value of the lane i + 1 of groups of eight, own value at the end; then the group's first.
__global__ void shift_and_broadcast(const float* in, float* out) {
  const float next = __shfl_down_sync(0xffffffffu, in[threadIdx.x], 1, 8);
  out[threadIdx.x] = next + 100.0f * __shfl_sync(0xffffffffu, in[threadIdx.x], 0, 8);
}

// Odd lanes do not take part, and lane 0 reads from lane 1.
__global__ void absent_lane(const float* in, float* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_down_sync(0x55555555u, in[threadIdx.x], 1);
}

// The mask names lanes that never come.
__global__ void divergent_shuffle(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

// A warp's lanes exchange through shared memory, ordered by __syncwarp.
template <bool kBarrier>
__global__ void warp_mirror(const float* in, float* out) {
  SOFTDIMO_SHARED(float, buffer, kThreads);
  const int i = threadIdx.x;
  buffer[i] = in[i];
  if (kBarrier) __syncwarp();
  out[i] = buffer[i ^ 31];
}

__global__ void out_of_bounds(const float* in, float* out) {
  SOFTDIMO_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = 0.0f;
}

__global__ void misaligned_load(const float* in, float* out) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(in + 1));
  out[threadIdx.x] = __uint_as_float(words.x);
}

// The noise of a uniform: half of a block's first numbers, then their low parts.
__global__ void noise(const float* in, float* out) {
  const softdimo::cuda::FloatPair pair = softdimo::cuda::gumbel(in[threadIdx.x % (kThreads / 2)]);
  out[threadIdx.x] = threadIdx.x < kThreads / 2 ? pair.high : pair.low;
}

// out[i] = the number of lanes above 0 in the warp, then whether any is above 100, and all are.
__global__ void votes(const float* in, float* out) {
  const float value = in[threadIdx.x];
  const int positive = __popc(__ballot_sync(0xffffffffu, value > 0.0f));
  out[threadIdx.x] = static_cast<float>(positive + 100 * __any_sync(0xffffffffu, value > 100.0f) +
                                        1000 * __all_sync(0xffffffffu, value > 0.0f));
}

// The last lane of each group of eight gets its group's sum.
__global__ void prefix_sum(const float* in, float* out) {
  float sum = in[threadIdx.x];
  for (int distance = 1; distance < 8; distance *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, distance, 8);
    if (static_cast<int>(threadIdx.x % 8) >= distance) sum += before;
  }
  out[threadIdx.x] = sum;
}

// Words made of the number and its negative, and back from the lower half.
__global__ void pack_bf16(const float* in, float* out) {
  out[threadIdx.x] = __uint_as_float(ptx::pack_bf16(in[threadIdx.x], -in[threadIdx.x]));
}

__global__ void pack_f16(const float* in, float* out) {
  out[threadIdx.x] = __uint_as_float(ptx::pack_f16(in[threadIdx.x], -in[threadIdx.x]));
}

__global__ void unpack_f16(const float* in, float* out) {
  const unsigned word = __float_as_uint(__ldcs(in + threadIdx.x));
  __stcs(out + threadIdx.x, __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu))));
}

__global__ void log2_approx(const float* in, float* out) { out[threadIdx.x] = ptx::log2_approx(in[threadIdx.x]); }

using Kernel = void (*)(const float*, float*);

}  // namespace

void run_planted(const std::string& name, const float* input, float* output) {
  static const std::map<std::string, Kernel> kernels = {
      {"mirror", mirror<true>},
      {"mirror without barrier", mirror<false>},
      {"mirror_dynamic", mirror_dynamic<true>},
      {"mirror_dynamic without barrier", mirror_dynamic<false>},
      {"mirror_large", mirror_large<true>},
      {"mirror_large unasked", mirror_large<false>},
      {"mirror_both", mirror_both},
      {"mirror_both with more than there is", mirror_both},
      {"two_rounds", two_rounds<true>},
      {"two_rounds without barrier", two_rounds<false>},
      {"warp_mirror", warp_mirror<true>},
      {"warp_mirror without barrier", warp_mirror<false>},
      {"warp_sum", warp_sum},
      {"shift_and_broadcast", shift_and_broadcast},
      {"votes", votes},
      {"prefix_sum", prefix_sum},
      {"pack_bf16", pack_bf16},
      {"pack_f16", pack_f16},
      {"unpack_f16", unpack_f16},
      {"log2_approx", log2_approx},
      {"divergent_barrier", divergent_barrier},
      {"early_exit", early_exit},
      {"absent_lane", absent_lane},
      {"divergent_shuffle", divergent_shuffle},
      {"out_of_bounds", out_of_bounds},
      {"misaligned_load", misaligned_load},
      {"noise", noise},
  };
  const Kernel kernel = kernels.at(name);
  if (kernel == mirror_large<true>) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kLarge);
  }
  const bool large = kernel == mirror_large<true> || kernel == mirror_large<false>;
  const size_t most = name == "mirror_both" ? kUnasked / 2 - 4 : kUnasked / 2;
  const size_t shared = large ? kLarge : kernel == mirror_both ? most : kThreads * sizeof(float);
  SOFTDIMO_LAUNCH(kernel, 1, kThreads, shared, nullptr, input, output);
  if (cudaGetLastError() != cudaSuccess) throw std::runtime_error("the launch was refused");
}
