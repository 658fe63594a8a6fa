// Kernels whose threads have nothing to do with each other: each takes one unit of work after the other.
#pragma once

#include <algorithm>

#include "table.cuh"

namespace fastqat::cuda {

// Blocks for so many units.
inline int64_t blocks_of(int64_t units) {
  return std::min<int64_t>(ceil_div(units, kThreads), static_cast<int64_t>(multiprocessors()) * kBlocksEach);
}

// work(u) for this thread's units.
template <class Work>
__device__ __forceinline__ void for_each_unit(int64_t units, const Work& work) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t u = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; u < units; u += stride) work(u);
}

}  // namespace fastqat::cuda
