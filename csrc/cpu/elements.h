// Blocks of elements of any dtype as float32, in buffers that stay in the first-level cache.
//
// The kernels are loops over float: a float32 tensor is read and written in place, the others are converted block by
// block. Each conversion is one loop that the compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "../elements.h"
#include "grid.h"

// One clone per instruction set; the loader picks the best one at run time. FASTQAT_NO_CLONES: none (sanitizers).
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(FASTQAT_NO_CLONES)
#define FASTQAT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTQAT_CLONES
#endif

namespace fastqat::cpu {

constexpr int64_t kBlock = 1024;

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
  int64_t element_size;

  explicit Input(const Tensor& t) : data(t.data_ptr()), dtype(t.scalar_type()), element_size(t.element_size()) {}

  // Asks the memory for elements that block() will want after something else.
  void prefetch(int64_t offset, int64_t n) const {
    constexpr int64_t kLine = 64;
    const char* first = static_cast<const char*>(data) + offset * element_size;
    for (int64_t at = 0; at < n * element_size; at += kLine) __builtin_prefetch(first + at);
  }

  // The elements from `offset` on of a tensor of this type.
  template <class T>
  const T* in_place(int64_t offset) const {
    return static_cast<const T*>(data) + offset;
  }

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

  // As for Input.
  template <class T>
  T* in_place(int64_t offset) const {
    return static_cast<T*>(data) + offset;
  }

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
