// pack: the low bits of integer codes as one bit stream, first code in the lowest bits; unpack: its inverse.
#include "elements.h"
#include "ops.h"

namespace fastqat::cpu {
namespace {

// Eight codes of any width fill whole bytes: the unit of both loops.
constexpr int64_t kUnit = 8;
constexpr int64_t kUnitsPerThread = 4096;

template <class Code>
void pack_units(const Code* codes, int64_t numel, int bits, uint8_t* packed) {
  const uint64_t mask = (1u << bits) - 1;
  torch::stable::parallel_for(0, (numel + kUnit - 1) / kUnit, kUnitsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      int64_t count = std::min(kUnit, numel - u * kUnit);
      uint64_t word = 0;
      for (int64_t k = 0; k < count; ++k) word |= (static_cast<uint64_t>(codes[u * kUnit + k]) & mask) << (k * bits);
      int64_t bytes = (count * bits + 7) / 8;
      for (int64_t j = 0; j < bytes; ++j) packed[u * bits + j] = static_cast<uint8_t>(word >> (8 * j));
    }
  });
}

// `flip` is the sign bit for signed codes, else 0: (v ^ flip) - flip extends the sign.
void unpack_units(const uint8_t* packed, int64_t numel, int bits, int flip, uint8_t* codes) {
  const uint64_t mask = (1u << bits) - 1;
  torch::stable::parallel_for(0, (numel + kUnit - 1) / kUnit, kUnitsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      int64_t count = std::min(kUnit, numel - u * kUnit);
      int64_t bytes = (count * bits + 7) / 8;
      uint64_t word = 0;
      for (int64_t j = 0; j < bytes; ++j) word |= static_cast<uint64_t>(packed[u * bits + j]) << (8 * j);
      for (int64_t k = 0; k < count; ++k)
        codes[u * kUnit + k] = static_cast<uint8_t>((static_cast<int>(word >> (k * bits) & mask) ^ flip) - flip);
    }
  });
}

}  // namespace

void pack_out(Tensor codes, int64_t bits, Tensor packed) {
  Tensor from = torch::stable::contiguous(codes);
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  int width = static_cast<int>(bits);
  switch (from.scalar_type()) {
    case ScalarType::Char:
      return pack_units(static_cast<const int8_t*>(from.data_ptr()), from.numel(), width, to);
    case ScalarType::Byte:
      return pack_units(static_cast<const uint8_t*>(from.data_ptr()), from.numel(), width, to);
    case ScalarType::Int:
      return pack_units(static_cast<const int32_t*>(from.data_ptr()), from.numel(), width, to);
    default:
      STD_TORCH_CHECK(false, "fastqat: pack: codes: wanted int8, uint8 or int32");
  }
}

void unpack_out(Tensor packed, int64_t bits, int64_t numel, bool is_signed, Tensor codes) {
  Tensor from = torch::stable::contiguous(packed);
  unpack_units(from.const_data_ptr<uint8_t>(), numel, static_cast<int>(bits), is_signed ? 1 << (bits - 1) : 0,
               static_cast<uint8_t*>(codes.data_ptr()));
}

}  // namespace fastqat::cpu
