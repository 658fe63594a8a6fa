// Runs of a few bytes, which hold the codes or the bits of neighbouring elements, as one number.
#pragma once

#include "vector.cuh"

namespace fastqat::cuda {

// Eight codes of any width fill whole bytes: the unit in which they are packed, which fits into 64 bits.
constexpr int kUnit = 8;

// `count` bytes at `from`, in steps of `wide` bytes, which divide count and the address.
template <int wide>
__device__ __forceinline__ uint64_t read_bytes(const uint8_t* from, int count) {
  uint64_t word = 0;
#pragma unroll
  for (int j = 0; j < kUnit; j += wide) {
    if (j >= count) break;
    uint64_t part = 0;
    const Bits<wide> bits = *reinterpret_cast<const Bits<wide>*>(from + j);
    __builtin_memcpy(&part, &bits, wide);
    word |= part << (8 * j);
  }
  return word;
}

template <int wide>
__device__ __forceinline__ void write_bytes(uint8_t* to, int count, uint64_t word) {
#pragma unroll
  for (int j = 0; j < kUnit; j += wide) {
    if (j >= count) break;
    const uint64_t part = word >> (8 * j);
    Bits<wide> bits;
    __builtin_memcpy(&bits, &part, wide);
    *reinterpret_cast<Bits<wide>*>(to + j) = bits;
  }
}

__device__ __forceinline__ uint64_t read(const uint8_t* from, int count, int wide) {
  return wide == 8   ? read_bytes<8>(from, count)
         : wide == 4 ? read_bytes<4>(from, count)
         : wide == 2 ? read_bytes<2>(from, count)
                     : read_bytes<1>(from, count);
}

__device__ __forceinline__ void write(uint8_t* to, int count, uint64_t word, int wide) {
  if (wide == 8) return write_bytes<8>(to, count, word);
  if (wide == 4) return write_bytes<4>(to, count, word);
  if (wide == 2) return write_bytes<2>(to, count, word);
  write_bytes<1>(to, count, word);
}

}  // namespace fastqat::cuda
