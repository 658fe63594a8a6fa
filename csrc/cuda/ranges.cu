// advance_range and advance_interval: a few numbers, in one thread.
#include "../ranges.h"
#include "kernels.h"
#include "launch.cuh"

namespace fastqat::cuda {
namespace {

__global__ void __launch_bounds__(1) advance_range_kernel(const __grid_constant__ RangeState s) {
  if (*s.step != *s.observed_step || s.always) {
    *s.low = moving_average(*s.low, *s.new_low, s.momentum, s.rest);
    *s.high = moving_average(*s.high, *s.new_high, s.momentum, s.rest);
    *s.new_low = __builtin_inff();
    *s.new_high = -__builtin_inff();
  }
  *s.observed_step = *s.step;
  const float qmin = static_cast<float>(s.qrange[0]), qmax = static_cast<float>(s.qrange[1]);
  const float scale = scale_of_range(*s.low, *s.high, qmin, qmax, s.zero_point == nullptr);
  *s.scale = scale;
  if (s.zero_point) *s.zero_point = zero_point_of_range(*s.low, scale, qmin);
}

__global__ void __launch_bounds__(1) advance_interval_kernel(const __grid_constant__ IntervalState s) {
  const float qmax = static_cast<float>(s.qrange[1]), largest = largest_magnitude(*s.low, *s.high);
  int64_t seen = *s.seen;
  float gamma = *s.gamma;
  if (*s.step != *s.observed_step || s.always) {
    gamma = moved_gamma(gamma, *s.beyond, seen, s.alpha, qmax, s.stride, s.smallest);
    *s.gamma = gamma;
    *s.beyond = 0;
    seen = 0;
  }
  *s.observed_step = *s.step;
  *s.seen = seen + (largest > 0.0f ? s.numel : 0);
  const float limit = gamma * largest;
  *s.limit = limit;
  *s.scale = limit / qmax;
}

}  // namespace

void advance_range(const RangeState& state, void* stream) {
  launch("advance_range", advance_range_kernel, 1, 1, stream, state);
}

void advance_interval(const IntervalState& state, void* stream) {
  launch("advance_interval", advance_interval_kernel, 1, 1, stream, state);
}

}  // namespace fastqat::cuda
