// The one file that names CUDA's runtime: a kernel launch, shared memory, and what a device offers.
//
// Kernels take shared memory from shared<T>() and are started by launch(): with FASTQAT_CUDA_ON_HOST the same sources
// run on the CPU, one fiber for each thread of a block, over a header that gives both.
#pragma once

#ifdef FASTQAT_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fastqat::cuda {

// The T of this block; without a value at first. Each type exists once in a kernel.
template <class T>
__device__ __forceinline__ T& shared() {
  __shared__ T storage;
  return storage;
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastqat: ") + what + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

// Sets bytes to 0, in order with what the stream does.
inline void set_to_zero(void* data, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "set_to_zero");
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "multiprocessors");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

}  // namespace fastqat::cuda
#endif
