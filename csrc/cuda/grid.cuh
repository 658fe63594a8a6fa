// The constants of a channel, and stochastic rounding, on the device.
#pragma once

#include "../math.h"
#include "kernels.h"
#include "launch.cuh"

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

// floor(t / scale + u) with u of Philox for this element of a contiguous tensor.
__device__ __forceinline__ float drawn(float t, const Channel& ch, const NoisePointers& noise, int64_t element) {
  const Philox numbers = philox(noise.seed, static_cast<uint64_t>(element / 4), static_cast<uint32_t>(*noise.step),
                                static_cast<uint32_t>(noise.tensor_id));
  const int lane = static_cast<int>(element % 4);
  const uint32_t bits = lane == 0   ? numbers.lane[0]
                        : lane == 1 ? numbers.lane[1]
                        : lane == 2 ? numbers.lane[2]
                                    : numbers.lane[3];
  return floorf(t / ch.scale + uniform(bits));
}

}  // namespace fastqat::cuda
