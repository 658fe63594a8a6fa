// How the range of an activation or a gradient moves from step to step: one number at a time. No torch, no CUDA.
// fastqat/ops/triton/ranges.py is its twin: the same names in the same order; fastqat/ops/one_tensor.py defines them.
#pragma once

#include "math.h"

namespace fastqat {

FASTQAT_INLINE bool is_finite(float v) { return v - v == 0.0f; }

// momentum * old + rest * now; a bound that is not finite comes from no data and does not count. What comes again as it
// was is its own average, without rounding. rest: 1 - momentum
FASTQAT_INLINE float moving_average(float old, float now, float momentum, float rest) {
  if (!is_finite(now) || old == now) return old;
  return is_finite(old) ? momentum * old + rest * now : now;
}

// The scale of the grid that covers [low, high] and holds 0; 1 where that has no extent.
FASTQAT_INLINE float scale_of_range(float low, float high, float qmin, float qmax, bool symmetric) {
  low = is_finite(low) && low < 0.0f ? low : 0.0f;
  high = is_finite(high) && high > 0.0f ? high : 0.0f;
  float extent = qmin < 0.0f && -low > high ? -low : high;
  float scale = symmetric ? extent / (qmax > 0.0f ? qmax : 1.0f) : (high - low) / (qmax - qmin);
  return scale > 0.0f ? scale : 1.0f;
}

// Its zero point, unrounded, on an affine grid.
FASTQAT_INLINE float zero_point_of_range(float low, float scale, float qmin) {
  return qmin - (is_finite(low) && low < 0.0f ? low : 0.0f) / scale;
}

// max|g| of a gradient with these extremes; 0 where it has no finite value.
FASTQAT_INLINE float largest_magnitude(float low, float high) {
  float largest = -low > high ? -low : high;
  return is_finite(largest) && largest > 0.0f ? largest : 0.0f;
}

// gamma of the next step (LBT, section 4.3): up where more than alpha / (2 qmax + 1) of the elements that were seen lie
// beyond the interval, down where fewer do.
FASTQAT_INLINE float moved_gamma(float gamma, int64_t beyond, int64_t seen, double alpha, float qmax, float stride,
                                 float smallest) {
  if (seen == 0) return gamma;
  double excess =
      static_cast<double>(beyond) * (2.0 * static_cast<double>(qmax) + 1.0) - alpha * static_cast<double>(seen);
  float moved = excess > 0.0 ? gamma + stride : excess < 0.0 ? gamma - stride : gamma;
  return clamp(moved, smallest, 1.0f);
}

}  // namespace fastqat
