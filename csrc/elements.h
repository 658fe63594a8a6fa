// Elements of any dtype as float32 and back, rounded once: to nearest, ties to even; a NaN stays one. No torch, no CUDA
// header; on a GPU the instruction that does the same.
#pragma once

#include "math.h"

namespace fastqat {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTQAT_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FASTQAT_INLINE uint32_t as_bits(float v) { return __builtin_bit_cast(uint32_t, v); }

FASTQAT_INLINE float to_float(float v) { return v; }
FASTQAT_INLINE float to_float(BFloat16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }
// Exponent and mantissa moved to their place in float32 and scaled by 2^112, which makes subnormals right as well.
FASTQAT_INLINE float to_float(Float16 v) {
#ifdef __CUDA_ARCH__
  float widened;
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(v.bits));
  return widened;
#endif
  uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  uint32_t special = magnitude >= (0x1fu << 23) ? 0x7f800000u : 0u;  // Inf and NaN
  return as_float(scaled | special | (v.bits & 0x8000u) << 16);
}
template <class Integer>
FASTQAT_INLINE float to_float(Integer v) {
  return static_cast<float>(v);
}

// An integer by way of int32_t: one that T cannot hold wraps, where a cast of the float would be undefined.
template <class T>
struct FromFloat {
  static FASTQAT_INLINE T convert(float v) { return static_cast<T>(static_cast<int32_t>(v)); }
};
template <>
struct FromFloat<float> {
  static FASTQAT_INLINE float convert(float v) { return v; }
};
// Round to nearest, ties to even; a NaN stays one.
template <>
struct FromFloat<BFloat16> {
  static FASTQAT_INLINE BFloat16 convert(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint16_t narrowed;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed) : "f"(v));
    return {narrowed};
#endif
    uint32_t bits = as_bits(v);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
  }
};
// A value that is one of T already.
template <class T>
FASTQAT_INLINE T exactly(float v) {
  return {v};
}
template <>
FASTQAT_INLINE BFloat16 exactly(float v) {
  return {static_cast<uint16_t>(as_bits(v) >> 16)};
}

template <>
struct FromFloat<Float16> {
  static FASTQAT_INLINE Float16 convert(float v) {
#ifdef __CUDA_ARCH__
    uint16_t narrowed;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed) : "f"(v));
    return {narrowed};
#endif
    uint32_t sign = as_bits(v) & 0x80000000u, bits = as_bits(v) ^ sign;
    uint32_t normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;  // rebias the exponent by 15 - 127, round
    uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;   // the addition rounds at 2^-24
    uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;           // NaN, or Inf and what rounds beyond it
    uint32_t half = bits >= 0x47800000u ? special : (bits < 0x38800000u ? subnormal : normal);
    return {static_cast<uint16_t>(half | sign >> 16)};
  }
};

}  // namespace fastqat
