// What range_search does with one element and one candidate grid. No torch, no CUDA header.
#pragma once

#include "math.h"

namespace fastqat {

// Adding kMagic rounds to an integer, ties to even: the sum has no bits for a fraction.
constexpr float kMagic = 0x1.8p23f;

struct alignas(16) Candidate {
  float scale, reciprocal, low, high;  // low, high: levels + kMagic
};

FASTQAT_INLINE Candidate make_candidate(const Channel& ch) {
  constexpr float kLargest = 0x1.fffffep127f;
  const float reciprocal = ch.reciprocal > kLargest ? kLargest : ch.reciprocal;  // 0 * Inf would be NaN
  return {ch.scale, reciprocal, ch.low + kMagic, ch.high + kMagic};
}

// For finite x. Rounds x * (1 / s) rather than x / s: they differ only at ties, where both codes have the same error.
FASTQAT_INLINE float residual_of(float x, const Candidate& c) {
  float rounded = clamp(__builtin_fmaf(x, c.reciprocal, kMagic), c.low, c.high) - kMagic;
  return __builtin_fmaf(rounded, c.scale, -x);
}

FASTQAT_INLINE float add_squared_error(float sum, float x, const Candidate& c) {
  float residual = residual_of(x, c);
  return __builtin_fmaf(residual, residual, sum);
}

}  // namespace fastqat
