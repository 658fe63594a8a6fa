// pack: the low bits of integer codes as one bit stream, first code in the lowest bits; unpack: its inverse.
#include <bit>

#include "bits.h"
#include "elements.h"
#include "ops.h"
#include "threads.h"

namespace fastqat::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "a stream is read and written in whole words");

constexpr uint64_t kBytes = 0x0101010101010101, kPairs = 0x0001000100010001, kFours = 0x0000000100000001;

// The low n bits of every field whose lowest bits are set in `fields`.
constexpr uint64_t low_bits(uint64_t fields, int n) { return fields * ((uint64_t{1} << n) - 1); }

// Eight codes, one in each byte, moved together: in pairs, fours and all.
template <int kBits>
inline __attribute__((always_inline)) uint64_t together(uint64_t v) {
  v &= low_bits(kBytes, kBits);
  if (kBits == 1) return v * 0x0102040810204080 >> 56;  // byte k is moved to bit 56 + k, and nothing else there
  v = (v & low_bits(kPairs, 8)) | (v & ~low_bits(kPairs, 8)) >> (8 - kBits);
  v = (v & low_bits(kFours, 16)) | (v & ~low_bits(kFours, 16)) >> (16 - 2 * kBits);
  return (v & low_bits(1, 32)) | (v & ~low_bits(1, 32)) >> (32 - 4 * kBits);
}

template <int kBits>
inline __attribute__((always_inline)) uint64_t apart(uint64_t v) {
  v = (v & low_bits(1, 4 * kBits)) | (v & ~low_bits(1, 4 * kBits)) << (32 - 4 * kBits);
  v = (v & low_bits(kFours, 2 * kBits)) | (v & ~low_bits(kFours, 2 * kBits)) << (16 - 2 * kBits);
  return (v & low_bits(kPairs, kBits)) | (v & ~low_bits(kPairs, kBits)) << (8 - kBits);
}

template <int kBits>
FASTQAT_CLONES void pack_units(const uint8_t* codes, int64_t units, uint8_t* packed) {
  for (int64_t u = 0; u < units; ++u) {
    uint64_t word;
    std::memcpy(&word, codes + u * kUnit, kUnit);
    word = together<kBits>(word);
    std::memcpy(packed + u * kBits, &word, kBits);
  }
}

template <int kBits>
FASTQAT_CLONES void unpack_units(const uint8_t* packed, int64_t units, uint8_t* codes) {
  for (int64_t u = 0; u < units; ++u) {
    uint64_t word = 0;
    std::memcpy(&word, packed + u * kBits, kBits);
    word = apart<kBits>(word);
    std::memcpy(codes + u * kUnit, &word, kUnit);
  }
}

using Units = void (*)(const uint8_t* from, int64_t units, uint8_t* to);

#define FASTQAT_WIDTHS(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>}
Units packing(int bits) {
  const Units widths[8] = FASTQAT_WIDTHS(pack_units);
  return widths[bits - 1];
}
Units unpacking(int bits) {
  const Units widths[8] = FASTQAT_WIDTHS(unpack_units);
  return widths[bits - 1];
}
#undef FASTQAT_WIDTHS

// f(offset, n) for blocks of n elements.
template <class F>
void parallel_blocks(int64_t numel, const F& f) {
  share_out((numel + kBlock - 1) / kBlock, 32, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b * kBlock, std::min(kBlock, numel - b * kBlock));
  });
}

template <class Code>
void pack_codes(const Code* codes, int64_t numel, int bits, uint8_t* packed) {
  parallel_blocks(numel, [&](int64_t offset, int64_t n) {
    uint8_t low[kBlock];
    for (int64_t i = 0; i < n; ++i) low[i] = static_cast<uint8_t>(codes[offset + i]);
    pack_block(low, n, bits, packed + offset / kUnit * bits);
  });
}

}  // namespace

void pack_block(const uint8_t* codes, int64_t n, int bits, uint8_t* packed) {
  const int64_t units = n / kUnit, rest = n % kUnit;
  packing(bits)(codes, units, packed);
  if (rest == 0) return;
  uint8_t last[kUnit] = {}, stream[kUnit];
  std::memcpy(last, codes + units * kUnit, rest);
  packing(bits)(last, 1, stream);
  std::memcpy(packed + units * bits, stream, packed_bytes(rest, bits));
}

void unpack_block(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
  const int64_t units = n / kUnit, rest = n % kUnit;
  unpacking(bits)(packed, units, codes);
  if (rest == 0) return;
  uint8_t stream[kUnit] = {}, last[kUnit];
  std::memcpy(stream, packed + units * bits, packed_bytes(rest, bits));
  unpacking(bits)(stream, 1, last);
  std::memcpy(codes + units * kUnit, last, rest);
}

void pack_out(Tensor codes, int64_t bits, Tensor packed) {
  Tensor from = torch::stable::contiguous(codes);
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  int width = static_cast<int>(bits);
  switch (from.scalar_type()) {
    case ScalarType::Char:
      return pack_codes(static_cast<const int8_t*>(from.data_ptr()), from.numel(), width, to);
    case ScalarType::Byte:
      return pack_codes(static_cast<const uint8_t*>(from.data_ptr()), from.numel(), width, to);
    case ScalarType::Int:
      return pack_codes(static_cast<const int32_t*>(from.data_ptr()), from.numel(), width, to);
    default:
      STD_TORCH_CHECK(false, "fastqat: pack: codes: wanted int8, uint8 or int32");
  }
}

void unpack_out(Tensor packed, int64_t bits, int64_t numel, bool is_signed, Tensor codes) {
  Tensor from = torch::stable::contiguous(packed);
  const uint8_t* stream = from.const_data_ptr<uint8_t>();
  uint8_t* to = static_cast<uint8_t*>(codes.data_ptr());
  const int width = static_cast<int>(bits), sign = is_signed ? 1 << (bits - 1) : 0;
  parallel_blocks(numel, [&](int64_t offset, int64_t n) {
    unpack_block(stream + offset / kUnit * width, n, width, to + offset);
    if (sign)  // (v ^ sign) - sign extends the sign
      for (int64_t i = offset; i < offset + n; ++i) to[i] = static_cast<uint8_t>((to[i] ^ sign) - sign);
  });
}

}  // namespace fastqat::cpu
