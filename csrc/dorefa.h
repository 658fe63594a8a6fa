// DoReFa's weights (Zhou et al. 2016, section 2.3), u = tanh(x) / tanh(m) with m = max|x|, on the levels (2 r - n) / n,
// r = 0 .. n: one number at a time. No torch.
// fastqat/ops/triton/dorefa.py is its twin: the same names in the same order; fastqat/ops/two_widths.py defines them.
#pragma once

#include "ranges.h"

namespace fastqat {

// tanh(x) = x P(x^2) / Q(x^2) up to here, where it is 1.
constexpr float kTanhEnd = 9.0f;

// Sums and products are rounded one by one, so that every backend gives the same bits. NaN stays NaN. end, one: always
// these, but unknown to a compiler that, where it knows a bound, works out what becomes of it beside all other values.
FASTQAT_INLINE float tanh(float x, float end = kTanhEnd, float one = 1.0f) {
  x = clamp(x, -end, end);
  float square = x * x;
  float p = 1.8256886e-11f * square + -1.2781207e-08f;
  p = p * square + 9.267716e-06f;
  p = p * square + 0.0029207976f;
  p = p * square + 0.12919264f;
  p = p * square + 0.99999994f;
  float q = 0.00022810494f * square + 0.023763318f;
  q = q * square + 0.46252546f;
  q = q * square + 1.0f;
  return clamp(x * p / q, -one, one);
}

// What quotient() divides by; nothing else of the channel is of use.
FASTQAT_INLINE Channel divisor(float v) { return make_channel(v, 0.0f, false, 0.0f, 0.0f, 0.0f, 0.0f); }

// How one tensor is normalized. m is 0 where all that is finite is 0, which is divided by 1 then.
struct Normalizer {
  float m;          // max|x|
  Channel largest;  // divisor of tanh(m), or of 1
};

// low, high: the extremes of the finite values, or +Inf and -Inf where there are none
FASTQAT_INLINE Normalizer make_normalizer(float low, float high) {
  float m = largest_magnitude(low, high);
  return {m, divisor(m > 0.0f ? tanh(m) : 1.0f)};
}

// u of t = tanh(x). Fast: is_fast_scale(largest.scale); below it u may differ where it rounds to the same r.
template <bool kFast>
FASTQAT_INLINE float normalized(float t, const Normalizer& by) {
  return quotient<kFast>(t, by.largest);
}

// r = clamp(rint(u n/2 + n/2), 0, n). n: divisor(2^bits - 1). NaN stays NaN.
FASTQAT_INLINE float dorefa_level(float u, const Channel& n) {
  float half = n.scale * 0.5f;
  return round_even(clamp(u * half + half, 0.0f, n.scale));
}

// (2 r - n) / n, correctly rounded.
FASTQAT_INLINE float dorefa_value(float r, const Channel& n) { return quotient<true>(2.0f * r - n.scale, n); }

// What passes through m of an element with |x| = m, in units of g. share: sum of g u over the number of such elements
FASTQAT_INLINE float through_largest(float x, float share) { return x < 0.0f ? -share : share; }

// dx of an element with t = tanh(x); it is 0 instead where m is 0 or x not finite. through: 0, or through_largest()
template <bool kFast>
FASTQAT_INLINE float dorefa_dx(float g, float t, float through, float factor, const Normalizer& by) {
  return quotient<kFast>(1.0f - t * t, by.largest) * factor * (g - through);
}

}  // namespace fastqat
