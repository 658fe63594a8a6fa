// The scalar truth of every kernel: plain functions over float, without torch and without CUDA headers.
// fastqat/ops/triton/math.py is its twin: the same names in the same order.
//
// A level is a code relative to the zero point: level = code - z, clamped to [low, high] = [qmin - z, qmax - z].
// On the offset grid z = 0, and x is shifted by o before and after.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTQAT_INLINE __host__ __device__ __forceinline__
#else
#define FASTQAT_INLINE inline __attribute__((always_inline))
#endif

namespace fastqat {

// Constants of one scale, computed once per channel.
struct Channel {
  float scale;       // max(s, eps)
  float reciprocal;  // RN(1 / scale)
  float low, high;   // lowest and highest level
  float shift;       // z on the zero-point grid, o on the offset grid
  float below;       // scale * (low - 1):  inputs are clamped to [below, above], where the exact quotient
  float above;       // scale * (high + 1): cannot overflow and every level, in range or one step out of it, survives
};

// Scales in [2^-40, 2^40] may use the three-step quotient; all others divide.
constexpr float kSmallestFastScale = 0x1p-40f;
constexpr float kLargestFastScale = 0x1p40f;

FASTQAT_INLINE float round_even(float v) { return __builtin_rintf(v); }

// NaN in v stays NaN.
FASTQAT_INLINE float clamp(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

FASTQAT_INLINE bool is_fast_scale(float scale) { return scale >= kSmallestFastScale && scale <= kLargestFastScale; }

FASTQAT_INLINE Channel make_channel(float scale, float eps, float zero_point, float offset, bool offset_grid,
                                    float qmin, float qmax) {
  Channel ch;
  ch.scale = scale < eps ? eps : scale;
  ch.reciprocal = 1.0f / ch.scale;
  float zero = offset_grid ? 0.0f : clamp(round_even(zero_point), qmin, qmax);
  ch.low = qmin - zero;
  ch.high = qmax - zero;
  ch.shift = offset_grid ? offset : zero;
  ch.below = ch.scale * (ch.low - 1.0f);
  ch.above = ch.scale * (ch.high + 1.0f);
  return ch;
}

// RN(t / scale). Fast: t was clamped to [below, above] and the scale is a fast one. Then q = RN(t * R) is within
// 2 ulp, the remainder e = t - q * scale is exact, and q + e * R rounds to the correctly rounded quotient.
template <bool kFast>
FASTQAT_INLINE float quotient(float t, const Channel& ch) {
  if (!kFast) return t / ch.scale;
  float q = t * ch.reciprocal;
  float e = __builtin_fmaf(-q, ch.scale, t);
  return __builtin_fmaf(e, ch.reciprocal, q);
}

// rint(t / scale), unclamped up to one level beyond the range; NaN stays NaN. t = x, or x - o on the offset grid.
template <bool kFast>
FASTQAT_INLINE float raw_ratio(float t, const Channel& ch) {
  return quotient<kFast>(kFast ? clamp(t, ch.below, ch.above) : t, ch);
}

template <bool kFast>
FASTQAT_INLINE float level(float t, const Channel& ch) {
  return clamp(round_even(raw_ratio<kFast>(t, ch)), ch.low, ch.high);
}

template <bool kOffset>
FASTQAT_INLINE float shifted(float x, const Channel& ch) {
  return kOffset ? x - ch.shift : x;
}

template <bool kOffset>
FASTQAT_INLINE float value(float lev, const Channel& ch) {
  float y = ch.scale * lev;
  return kOffset ? y + ch.shift : y;
}

template <bool kFast, bool kOffset>
FASTQAT_INLINE float fake_quantize(float x, const Channel& ch) {
  return value<kOffset>(level<kFast>(shifted<kOffset>(x, ch), ch), ch);
}

}  // namespace fastqat
