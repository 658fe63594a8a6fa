// Gradient estimators: what takes the place of the derivative of rounding. No torch, no CUDA.
// fastqat/ops/triton/estimators.py is its twin: the same names in the same order; fastqat/ops/estimators.py names them.
#pragma once

#include "math.h"

namespace fastqat {

enum Estimator : int64_t { kSte, kEwgs, kSigmoid, kPsg, kPact, kStochastic };

// e^-v for v in [0, 80], within 2 units in the last place: 2^n by the exponent bits, the rest by a polynomial.
FASTQAT_INLINE float exp_of_minus(float v) {
  float n = round_even(v * -1.44269504f);
  float rest = __builtin_fmaf(n, -0.693145752f, -v);  // log 2 in two parts
  rest = __builtin_fmaf(n, -1.42860677e-6f, rest);
  float p = 1.98756915e-4f;
  p = __builtin_fmaf(p, rest, 1.39819994e-3f);
  p = __builtin_fmaf(p, rest, 8.33345205e-3f);
  p = __builtin_fmaf(p, rest, 4.16657962e-2f);
  p = __builtin_fmaf(p, rest, 1.66666657e-1f);
  p = __builtin_fmaf(p, rest, 0.5f);
  p = __builtin_fmaf(p, rest * rest, rest) + 1.0f;
  int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  return p * __builtin_bit_cast(float, exponent);
}

// Of the sigmoid of slope k: (k/2) / tanh(k/2), its derivative at a threshold.
FASTQAT_INLINE float sigmoid_peak(float k) {
  if (k < 0.25f)
    return 1.0f + k * k * (1.0f / 12.0f) * (1.0f - k * k * (1.0f / 60.0f));  // 1 - e^-k has lost its digits
  float e = exp_of_minus(k < 80.0f ? k : 80.0f);                             // NaN too, which no integer holds
  return 0.5f * k * (1.0f + e) / (1.0f - e);
}

// The factor E on the gradient g of an element. r = x / s; peak: of the sigmoid.
template <int64_t kEstimator>
FASTQAT_INLINE float estimator_factor(float g, float r, float scale, float strength, float peak) {
  float f = r - round_even(r);
  if (kEstimator == kEwgs) {
    float sign = g > 0.0f ? 1.0f : g < 0.0f ? -1.0f : 0.0f;
    return 1.0f + strength * sign * f;
  }
  if (kEstimator == kSigmoid) {
    // sech(v)^2 = 4 q / (1 + q)^2 with q = e^-2v
    float v = 2.0f * strength * (0.5f - __builtin_fabsf(f));
    v = v > 0.0f ? v : 0.0f;  // NaN too, as x may be
    float q = exp_of_minus(v < 80.0f ? v : 80.0f);
    return peak * 4.0f * q / ((1.0f + q) * (1.0f + q));
  }
  if (kEstimator == kPsg) return strength * (__builtin_fabsf(f) * scale);
  return 1.0f;
}

}  // namespace fastqat
