// Codes of 1 to 8 bits as a stream of bytes: the first code in the lowest bits of the first byte. No torch.
#pragma once

#include <cstdint>

namespace fastqat::cpu {

constexpr int64_t kUnit = 8;  // codes of any width that fill whole bytes

constexpr int64_t packed_bytes(int64_t codes, int bits) { return (codes * bits + 7) / 8; }

// The low bits of n codes. codes: [n]; packed: [packed_bytes(n, bits)], the last byte filled up with zeros
void pack_block(const uint8_t* codes, int64_t n, int bits, uint8_t* packed);

// Its inverse.
void unpack_block(const uint8_t* packed, int64_t n, int bits, uint8_t* codes);

}  // namespace fastqat::cpu
