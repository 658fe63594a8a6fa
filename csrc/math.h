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
  float below;       // scale * (low - 1)
  float above;       // scale * (high + 1)
};

// Scales in [2^-40, 2^40] may use the three-step quotient; all others divide.
constexpr float kSmallestFastScale = 0x1p-40f;
constexpr float kLargestFastScale = 0x1p40f;

FASTQAT_INLINE float round_even(float v) { return __builtin_rintf(v); }

// NaN in v stays NaN.
FASTQAT_INLINE float clamp(float v, float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));  // one instruction, where a comparison and a choice are two
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  return v;
#endif
  v = v < low ? low : v;
  return v > high ? high : v;
}

// x as a ReLU (clip: inf) or a ReLU6 (clip: 6) leaves it. NaN stays NaN.
FASTQAT_INLINE float clipped(float x, float clip) { return clamp(x, 0.0f, clip); }

// Where its derivative is 1.
FASTQAT_INLINE bool passes_clip(float x, float clip) { return (x > 0.0f) & (x < clip); }

FASTQAT_INLINE bool is_fast_scale(float scale) { return scale >= kSmallestFastScale && scale <= kLargestFastScale; }

// has_zero_point: the zero point rounds into [qmin, qmax]; one that is NaN makes the scale NaN, for a NaN in the bounds
// would switch clamping off. Without one z = 0, whether or not it is a code, and o may shift.
FASTQAT_INLINE Channel make_channel(float scale, float eps, bool has_zero_point, float zero_point, float offset,
                                    float qmin, float qmax) {
  Channel ch;
  bool has_zero = !has_zero_point || zero_point == zero_point;
  ch.scale = !has_zero ? __builtin_nanf("") : scale < eps ? eps : scale;
  ch.reciprocal = 1.0f / ch.scale;
  float zero = has_zero_point ? clamp(has_zero ? round_even(zero_point) : 0.0f, qmin, qmax) : 0.0f;
  ch.low = qmin - zero;
  ch.high = qmax - zero;
  ch.shift = has_zero_point ? zero : offset;
  ch.below = ch.scale * (ch.low - 1.0f);
  ch.above = ch.scale * (ch.high + 1.0f);
  return ch;
}

// RN(t / scale). Fast: t lies in [below, above] and the scale is a fast one, so nothing overflows; q = RN(t * R) is
// within 2 ulp, the remainder e = t - q * scale is exact wherever q can round to another level than 0, and q + e * R
// rounds to the correctly rounded quotient.
template <bool kFast>
FASTQAT_INLINE float quotient(float t, const Channel& ch) {
  if (!kFast) return t / ch.scale;
  float q = t * ch.reciprocal;
  float e = __builtin_fmaf(-q, ch.scale, t);
  return __builtin_fmaf(e, ch.reciprocal, q);
}

// t / scale, exact from one level below the range to one level above it and saturated beyond, so that what lies outside
// the range still shows. NaN stays NaN. t = x, or x - o on the offset grid.
template <bool kFast>
FASTQAT_INLINE float ratio(float t, const Channel& ch) {
  return quotient<kFast>(kFast ? clamp(t, ch.below, ch.above) : t, ch);
}

// clamp(rint(t / scale), low, high). Fast: t is clamped instead, to the values of the outermost levels. Their quotients
// are within 2^-14 of low and high, so nothing beyond them can round to another level, and one clamp is enough.
template <bool kFast>
FASTQAT_INLINE float level(float t, const Channel& ch) {
  if (kFast) return round_even(quotient<true>(clamp(t, ch.scale * ch.low, ch.scale * ch.high), ch));
  return clamp(round_even(t / ch.scale), ch.low, ch.high);
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

// The integer code; that of NaN, in x or in the scale, is the zero point.
template <bool kFast, bool kOffset>
FASTQAT_INLINE float quantize(float x, const Channel& ch) {
  float lev = level<kFast>(shifted<kOffset>(x, ch), ch);
  float code = lev == lev ? lev : clamp(0.0f, ch.low, ch.high);
  return kOffset ? code : code + ch.shift;
}

template <bool kOffset>
FASTQAT_INLINE float dequantize(float code, const Channel& ch) {
  return value<kOffset>(kOffset ? code : code - ch.shift, ch);
}

// How a gradient is computed. All three give the same dx and the same terms wherever they are numbers.
enum class Path {
  fast,     // fast scale; terms are NaN where x is not finite or t / scale overflows: the caller sees a NaN sum, and
            // takes `careful` for these elements
  careful,  // fast scale, any x
  divide,   // any scale, any x
};

// What one element adds to the gradients, for an incoming gradient g.
struct Gradient {
  float dx;        // g inside the straight-through mask, else 0
  float g, slope;  // whose product is the term of ds, times grad_scale_divisor()
  float outside;   // g outside the mask, else 0: the term of do, and of dz / -scale

  FASTQAT_INLINE float scale() const { return g * slope; }
};

FASTQAT_INLINE double grad_scale_divisor(const Channel& ch) {
  return is_fast_scale(ch.scale) ? static_cast<double>(ch.scale) : 1.0;
}

// What tracking, an estimator and dampening change in the gradient of one element.
struct Extras {
  float held = __builtin_nanf("");  // level of a frozen weight, which passes nothing to x; NaN: not frozen
  float factor = 1.0f;              // of the estimator, in the place of the derivative of rounding
  float within = 1.0f;              // 0: a value inside the range adds nothing to ds
  float dampening = 0.0f;           // k: adds k * (x - y) to dx inside the range; 0 adds nothing, not even 0 * Inf
  float drawn = 0.0f;               // what stochastic rounding makes of t / scale
};

// Which of them a gradient knows; each has those before it.
enum class Kind {
  plain,       // none
  frozen,      // held
  damped,      // dampening
  extras,      // factor, within
  stochastic,  // drawn
};

// kRounded: the mask tests rint(r), else r itself, which must be exact down to the subnormals then: a bound may be 0.
// All switches are template parameters: g++ does not vectorise a loop that chooses at run time. level * scale - t has
// one rounding (fma), however small it is beside t; `divide` takes the quotient in double instead. A NaN in x passes no
// gradient and adds to no sum.
template <Path kPath, bool kOffset, bool kRounded, Kind kKind = Kind::plain>
FASTQAT_INLINE Gradient fake_quantize_backward(float g, float x, const Channel& ch, const Extras& extras = {}) {
  constexpr bool kHeld = kKind >= Kind::frozen, kDamped = kKind >= Kind::damped, kFactor = kKind >= Kind::extras;
  float t = shifted<kOffset>(x, ch);
  float r = !kRounded || kPath == Path::divide ? t / ch.scale
            : kPath == Path::careful           ? ratio<true>(t, ch)
                                               : quotient<true>(t, ch);
  float rounded = kKind == Kind::stochastic ? extras.drawn : round_even(r);
  float tested = kRounded ? rounded : r;
  float nearest = clamp(tested, ch.low, ch.high);
  bool held = kHeld & (extras.held == extras.held) & (x == x);
  bool inside = (nearest == tested) & !held;
  float lev = kRounded ? nearest : clamp(rounded, ch.low, ch.high);
  if (kHeld) lev = held ? extras.held : lev;
  // t inside, else 0; as a mask of bits, since g++ computes both sides of what follows a conditional
  float passed = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, t) & (inside ? 0xffffffffu : 0u));
  float factor = inside ? extras.factor : 1.0f;  // outside it may be NaN
  float slope;
  if (kPath == Path::divide) {
    double ratio = static_cast<double>(passed) / static_cast<double>(ch.scale);
    slope = static_cast<float>((lev - (kFactor ? factor * ratio : ratio)) * grad_scale_divisor(ch));
  } else {
    float used = kFactor ? factor * passed : passed;
    slope = __builtin_fmaf(lev, ch.scale, -used);
    if (kFactor) slope = slope - __builtin_fmaf(factor, passed, -used);  // what the product was rounded by
  }
  float dx = inside ? (kFactor ? g * factor : g) : 0.0f;
  if (kFactor) slope = inside ? slope * extras.within : slope;
  if (kDamped) {
    bool in_range = (t >= ch.scale * ch.low) & (t <= ch.scale * ch.high) & !held & (extras.dampening != 0.0f);
    float pull = extras.dampening * __builtin_fmaf(-lev, ch.scale, t);
    dx = dx + (in_range ? pull : 0.0f);
  }
  float outside = inside ? 0.0f : g;
  if (kPath == Path::fast) return {dx, g, slope, outside};
  bool number = x == x;
  return {dx, number ? g : 0.0f, number ? slope : 0.0f, number ? outside : 0.0f};
}

// Four 32-bit numbers: a counter, and what becomes of it.
struct Philox {
  static constexpr uint32_t kRounds = 10, kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;
  uint32_t lane[4];

  static FASTQAT_INLINE uint32_t key0(uint64_t seed, uint32_t round) {
    return static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
  }
  static FASTQAT_INLINE uint32_t key1(uint64_t seed, uint32_t round) {
    return static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
  }

  FASTQAT_INLINE void next(uint64_t seed, uint32_t round) {
    uint64_t p0 = static_cast<uint64_t>(kFactor0) * lane[0], p1 = static_cast<uint64_t>(kFactor1) * lane[2];
    lane[0] = static_cast<uint32_t>(p1 >> 32) ^ lane[1] ^ key0(seed, round);
    lane[1] = static_cast<uint32_t>(p1);
    lane[2] = static_cast<uint32_t>(p0 >> 32) ^ lane[3] ^ key1(seed, round);
    lane[3] = static_cast<uint32_t>(p0);
  }
};

// Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (block low, block high, step, tensor id).
FASTQAT_INLINE Philox philox(uint64_t seed, uint64_t block, uint32_t step, uint32_t tensor_id) {
  Philox numbers{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), step, tensor_id}};
  for (uint32_t round = 0; round < Philox::kRounds; ++round) numbers.next(seed, round);
  return numbers;
}

// In [0, 1), a multiple of 2^-24.
FASTQAT_INLINE float uniform(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

}  // namespace fastqat
