// philox_uniform: counter-based uniform numbers.
#include "../math.h"
#include "units.cuh"
#include "vector.cuh"

namespace fastqat::cuda {
namespace {

constexpr int kLanes = 4;  // numbers of a counter: the unit

__global__ void __launch_bounds__(kThreads) philox_kernel(NoisePointers noise, int64_t numel, bool aligned, float* u) {
  const uint32_t time = static_cast<uint32_t>(*noise.step);
  for_each_unit((numel + kLanes - 1) / kLanes, [&](int64_t block) {
    const Philox numbers =
        philox(noise.seed, static_cast<uint64_t>(block), time, static_cast<uint32_t>(noise.tensor_id));
    const int64_t first = block * kLanes;
    Vector<float, kLanes> values;
#pragma unroll
    for (int k = 0; k < kLanes; ++k) values.v[k] = uniform(numbers.lane[k]);
    const Array<float> out{u};
    if (aligned && first + kLanes <= numel) return out.store<kLanes>(first, values);
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      if (first + k < numel) out.set(first + k, values.v[k]);
  });
}

}  // namespace

void philox_uniform(const NoisePointers& noise, int64_t numel, bool aligned, float* u, void* stream) {
  if (numel)
    launch("philox_uniform", philox_kernel, blocks_of(ceil_div(numel, kLanes)), kThreads, stream, noise, numel, aligned,
           u);
}

}  // namespace fastqat::cuda
