// Reductions by the threads of a block and by several blocks, in an order that depends on the tensor alone: no atomic
// additions of floats.
//
// What is reduced is a Sums: it begins as the identity, merge(other) takes another in, and shuffled(distance, lanes) is
// that of the thread `distance` further on. kAny: false where there is nothing to reduce.
#pragma once

#include "cut.h"
#include "launch.cuh"

namespace fastqat::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct NoSums {
  static constexpr bool kAny = false;
  __device__ __forceinline__ void merge(const NoSums&) {}
  __device__ __forceinline__ NoSums shuffled(int, int) const { return {}; }
};

struct TwoSums {
  static constexpr bool kAny = true;
  double first = 0.0, second = 0.0;
  __device__ __forceinline__ void merge(const TwoSums& other) {
    first += other.first;
    second += other.second;
  }
  __device__ __forceinline__ TwoSums shuffled(int distance, int lanes) const {
    TwoSums other;
    other.first = __shfl_down_sync(kAllLanes, first, distance, lanes);
    other.second = __shfl_down_sync(kAllLanes, second, distance, lanes);
    return other;
  }
};

constexpr float kInfinity = __builtin_inff();

// Extremes of the finite values.
struct Range {
  static constexpr bool kAny = true;
  float low = kInfinity, high = -kInfinity;
  // Of two of which one is NaN, the other.
  __device__ __forceinline__ void take(float smallest, float largest) {
    low = fminf(low, smallest);
    high = fmaxf(high, largest);
  }
  __device__ __forceinline__ void see(float v) {
    const float finite = fabsf(v) < kInfinity ? v : __builtin_nanf("");
    take(finite, finite);
  }
  __device__ __forceinline__ void merge(const Range& other) { take(other.low, other.high); }
  __device__ __forceinline__ Range shuffled(int distance, int lanes) const {
    Range other;
    other.low = __shfl_down_sync(kAllLanes, low, distance, lanes);
    other.high = __shfl_down_sync(kAllLanes, high, distance, lanes);
    return other;
  }
};

template <class Sums>
struct Scratch {
  alignas(16) unsigned char bytes[sizeof(Sums) * kThreads];
  __device__ __forceinline__ Sums& operator[](int k) { return reinterpret_cast<Sums*>(bytes)[k]; }
};
struct Ticket {
  unsigned int value;
};

// The sums of `lanes` neighbouring threads, a power of two and at most a warp, in the first of them.
template <class Sums>
__device__ __forceinline__ void merge_lanes(Sums& sums, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) sums.merge(sums.shuffled(distance, lanes));
}

// The sums of the block in thread 0.
template <class Sums>
__device__ __forceinline__ void merge_block(Sums& sums) {
  auto& scratch = shared<Scratch<Sums>>();
  merge_lanes(sums, kWarp);
  __syncthreads();  // what was in the scratch has been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kThreads / kWarp; ++w) sums.merge(scratch[w]);
}

// Sums of `rows` threads for each column, and of the `inner` columns of a channel: in the thread of its number.
template <class Sums>
__device__ __forceinline__ void merge_columns(Sums& sums, int rows, int columns, int inner) {
  auto& scratch = shared<Scratch<Sums>>();
  __syncthreads();  // what was in the scratch has been read
  scratch[threadIdx.x] = sums;
  __syncthreads();
  sums = Sums();
  const int first = threadIdx.x * inner;
  for (int j = first; j < std::min(first + inner, columns); ++j)
    for (int row = 0; row < rows; ++row) sums.merge(scratch[row * columns + j]);
}

// Whether this block is the last of `parts` to have written its part, and then sees all of them.
__device__ __forceinline__ bool arrives_last(unsigned int* arrived, int parts) {
  auto& ticket = shared<Ticket>();
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ticket.value = atomicAdd(arrived, 1u);
  __syncthreads();
  const bool last = ticket.value == static_cast<unsigned int>(parts - 1);
  __syncthreads();  // before the next ticket
  if (last) __threadfence();
  return last;
}

// The block that is the last to deliver its part of a group merges all of them, in their order.
template <class Body, class Sums>
__device__ __forceinline__ void merge_parts(Body& body, const Cut& cut, int group, const Sums* partial,
                                            unsigned int* arrived) {
  if (!arrives_last(&arrived[group], cut.parts)) return;
  const bool together = cut.width == 1;  // all threads for one channel, or each for its own
  for (int k = together ? 0 : threadIdx.x; k < cut.width; k += kThreads) {
    const int c = group * cut.width + k;
    if (c >= cut.channels) break;
    Sums sums;
    for (int p = together ? threadIdx.x : 0; p < cut.parts; p += together ? kThreads : 1)
      sums.merge(partial[static_cast<int64_t>(p) * cut.channels + c]);
    if (together) merge_block(sums);
    if (!together || threadIdx.x == 0) body.finish(c, sums);
  }
}

}  // namespace fastqat::cuda
