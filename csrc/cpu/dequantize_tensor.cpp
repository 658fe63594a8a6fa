// dequantize_tensor: values of packed codes.
#include "bits.h"
#include "ops.h"
#include "spans.h"

namespace fastqat::cpu {
namespace {

// sign: that of a code of `bits` bits, 0 for unsigned ones; (v ^ sign) - sign extends it. codes, y: [n]
template <bool kOffset>
FASTQAT_CLONES void loop(const uint8_t* codes, float* y, int64_t n, int32_t sign, Channel ch) {
  for (int64_t i = 0; i < n; ++i) y[i] = dequantize<kOffset>(static_cast<float>((codes[i] ^ sign) - sign), ch);
}

}  // namespace

void dequantize_tensor(Tensor codes, FASTQAT_TENSOR_GRID, int64_t code_bits, Tensor y) {
  Grid grid(scale, zero_point, offset, qrange, eps);
  Tensor from = torch::stable::contiguous(codes);
  const uint8_t* packed = from.const_data_ptr<uint8_t>();
  const int bits = static_cast<int>(code_bits), sign = grid.qmin < 0.0f ? 1 << (bits - 1) : 0;
  const Channel ch = grid.channel(0);
  const auto convert = grid.offset_grid() ? loop<true> : loop<false>;
  Output out(y);
  Cut cut({1, 1, y.numel()});
  parallel(cut, [&](int64_t p) {
    blocks_of_piece(cut, p, kBlock, [&](int64_t offset, int64_t n) {
      uint8_t block[kBlock];
      float buffer[kBlock];
      unpack_block(packed + offset / kUnit * bits, n, bits, block);
      float* to = out.block(offset, buffer);
      convert(block, to, n, sign, ch);
      out.commit(offset, n, to);
    });
  });
}

}  // namespace fastqat::cpu
