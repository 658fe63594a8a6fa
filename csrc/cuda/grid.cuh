// The constants of a channel, and stochastic rounding, on the device.
#pragma once

#include "../math.h"
#include "kernels.h"
#include "launch.cuh"
#include "vector.cuh"

namespace fastqat::cuda {

// On both grids x - shift is what is quantized, and scale * level + shift the value: the shift is 0 where the grid has
// no offset, which changes no number. The integer zero point is qmin - low.
__device__ __forceinline__ Channel channel_of(const GridPointers& grid, int64_t c) {
  Channel ch = make_channel(grid.scale[c], grid.eps, grid.zero_point != nullptr,
                            grid.zero_point ? grid.zero_point[c] : 0.0f, grid.offset ? grid.offset[c] : 0.0f,
                            static_cast<float>(grid.qrange[0]), static_cast<float>(grid.qrange[1]));
  if (!grid.offset) ch.shift = 0.0f;
  return ch;
}

// u of Philox for this element of a dense tensor, in the order of its memory.
__device__ __forceinline__ float uniform_of(const NoisePointers& noise, int64_t element) {
  const Philox numbers = philox(noise.seed, static_cast<uint64_t>(element / 4), static_cast<uint32_t>(*noise.step),
                                static_cast<uint32_t>(noise.tensor_id));
  const int lane = static_cast<int>(element % 4);
  const uint32_t bits = lane == 0   ? numbers.lane[0]
                        : lane == 1 ? numbers.lane[1]
                        : lane == 2 ? numbers.lane[2]
                                    : numbers.lane[3];
  return uniform(bits);
}

// floor(t / scale + u).
__device__ __forceinline__ float drawn(float t, const Channel& ch, const NoisePointers& noise, int64_t element) {
  return floorf(t / ch.scale + uniform_of(noise, element));
}

// RN(t / scale) for any t. Where 2^-80 <= |t| <= 2^80 and the scale is a fast one, nothing of the three steps
// overflows, and no remainder is so small that it is rounded; 0 is right as well.
template <bool kFast, int n>
__device__ __forceinline__ Vector<float, n> exact_quotients(const Vector<float, n>& t, const Channel& ch) {
  Vector<float, n> r;
  bool ordinary = kFast;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const float magnitude = fabsf(t.v[k]);
    ordinary &= ((magnitude >= 0x1p-80f) & (magnitude <= 0x1p80f)) | (magnitude == 0.0f);
  }
  if (ordinary) {
#pragma unroll
    for (int k = 0; k < n; ++k) r.v[k] = quotient<true>(t.v[k], ch);
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) r.v[k] = t.v[k] / ch.scale;
  }
  return r;
}

}  // namespace fastqat::cuda
