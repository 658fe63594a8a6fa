// Blocks of elements of any dtype as float32, in buffers that stay in the first-level cache.
//
// The kernels are loops over float: a float32 tensor is read and written in place, the others are converted block by
// block. Each conversion is one loop that the compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "../torch_api.h"

// One clone per instruction set; the loader picks the best one at run time.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTQAT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTQAT_CLONES
#endif

namespace fastqat::cpu {

constexpr int64_t kBlock = 1024;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline __attribute__((always_inline)) float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline __attribute__((always_inline)) uint32_t as_bits(float v) { return __builtin_bit_cast(uint32_t, v); }

inline __attribute__((always_inline)) float to_float(float v) { return v; }
inline __attribute__((always_inline)) float to_float(BFloat16 v) {
  return as_float(static_cast<uint32_t>(v.bits) << 16);
}
// Exponent and mantissa moved to their place in float32 and scaled by 2^112, which makes subnormals right as well.
inline __attribute__((always_inline)) float to_float(Float16 v) {
  uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  uint32_t special = magnitude >= (0x1fu << 23) ? 0x7f800000u : 0u;  // Inf and NaN
  return as_float(scaled | special | (v.bits & 0x8000u) << 16);
}
template <class Integer>
inline __attribute__((always_inline)) float to_float(Integer v) {
  return static_cast<float>(v);
}

template <class T>
struct FromFloat {
  static inline __attribute__((always_inline)) T convert(float v) { return static_cast<T>(v); }
};
// Round to nearest, ties to even; a NaN stays one.
template <>
struct FromFloat<BFloat16> {
  static inline __attribute__((always_inline)) BFloat16 convert(float v) {
    uint32_t bits = as_bits(v);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
  }
};
template <>
struct FromFloat<Float16> {
  static inline __attribute__((always_inline)) Float16 convert(float v) {
    uint32_t sign = as_bits(v) & 0x80000000u, bits = as_bits(v) ^ sign;
    uint32_t normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;  // rebias the exponent by 15 - 127, round
    uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;   // the addition rounds at 2^-24
    uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;           // NaN, or Inf and what rounds beyond it
    uint32_t half = bits >= 0x47800000u ? special : (bits < 0x38800000u ? subnormal : normal);
    return {static_cast<uint16_t>(half | sign >> 16)};
  }
};

template <class T>
FASTQAT_CLONES void widen(const T* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

template <class T>
FASTQAT_CLONES void narrow(const float* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = FromFloat<T>::convert(in[i]);
}

// Elements [offset, offset + n) of a tensor as float32: in place, or converted into `buffer` [kBlock].
struct Input {
  const void* data;
  ScalarType dtype;

  explicit Input(const Tensor& t) : data(t.data_ptr()), dtype(t.scalar_type()) {}

  const float* block(int64_t offset, int64_t n, float* buffer) const {
    switch (dtype) {
      case ScalarType::Float:
        return static_cast<const float*>(data) + offset;
      case ScalarType::BFloat16:
        widen(static_cast<const BFloat16*>(data) + offset, buffer, n);
        break;
      case ScalarType::Half:
        widen(static_cast<const Float16*>(data) + offset, buffer, n);
        break;
      case ScalarType::Char:
        widen(static_cast<const int8_t*>(data) + offset, buffer, n);
        break;
      case ScalarType::Byte:
        widen(static_cast<const uint8_t*>(data) + offset, buffer, n);
        break;
      case ScalarType::Int:
        widen(static_cast<const int32_t*>(data) + offset, buffer, n);
        break;
      default:
        STD_TORCH_CHECK(false, "fastqat: no kernel for this dtype");
    }
    return buffer;
  }
};

// Where float32 results go: in place, or from a buffer by commit().
struct Output {
  void* data;
  ScalarType dtype;

  explicit Output(const Tensor& t) : data(t.data_ptr()), dtype(t.scalar_type()) {}

  float* block(int64_t offset, float* buffer) const {
    return dtype == ScalarType::Float ? static_cast<float*>(data) + offset : buffer;
  }

  void commit(int64_t offset, int64_t n, const float* buffer) const {
    switch (dtype) {
      case ScalarType::Float:
        break;
      case ScalarType::BFloat16:
        narrow(buffer, static_cast<BFloat16*>(data) + offset, n);
        break;
      case ScalarType::Half:
        narrow(buffer, static_cast<Float16*>(data) + offset, n);
        break;
      case ScalarType::Char:
        narrow(buffer, static_cast<int8_t*>(data) + offset, n);
        break;
      case ScalarType::Byte:
        narrow(buffer, static_cast<uint8_t*>(data) + offset, n);
        break;
      case ScalarType::Int:
        narrow(buffer, static_cast<int32_t*>(data) + offset, n);
        break;
      default:
        STD_TORCH_CHECK(false, "fastqat: no kernel for this dtype");
    }
  }
};

}  // namespace fastqat::cpu
