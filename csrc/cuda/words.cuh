// The words that tracked weights are kept in, of either width.
#pragma once

#include "../oscillation.h"
#include "vector.cuh"

namespace fastqat::cuda {

// Several at a time they are bytes; one may be wide.
template <int n>
struct WordVector : Vector<uint8_t, n> {};
template <>
struct WordVector<1> : Vector<int32_t, 1> {};

// From element `base` on. data: uint8_t, or int16_t where `wide`; null: there are none.
struct Words {
  void* data = nullptr;
  bool wide = false;

  Words() = default;
  __device__ __forceinline__ Words(const void* words, bool wide_, int64_t base) : wide(wide_) {
    if (words) data = static_cast<unsigned char*>(const_cast<void*>(words)) + (wide ? 2 * base : base);
  }

  template <int n>
  __device__ __forceinline__ WordVector<n> load(int64_t i) const {
    if constexpr (n == 1) {
      return {{{wide ? static_cast<const int16_t*>(data)[i] : static_cast<const uint8_t*>(data)[i]}}};
    } else {
      return {Array<uint8_t>{static_cast<uint8_t*>(data)}.load<n>(i)};
    }
  }

  __device__ __forceinline__ int32_t index_of(int32_t word) const {
    return wide ? fastqat::index_of(static_cast<int16_t>(word)) : fastqat::index_of(static_cast<uint8_t>(word));
  }
  __device__ __forceinline__ int32_t flags_of(int32_t word) const {
    return wide ? fastqat::flags_of(static_cast<int16_t>(word)) : fastqat::flags_of(static_cast<uint8_t>(word));
  }

  // Replaces the first.
  __device__ __forceinline__ void store(int32_t index, int32_t flags) const {
    if (wide)
      *static_cast<int16_t*>(data) = make_word<int16_t>(index, flags);
    else
      *static_cast<uint8_t*>(data) = make_word<uint8_t>(index, flags);
  }
};

}  // namespace fastqat::cuda
