// fake_quantize_tensor_backward: dx, and PACT's ds, from one read of g and the bits that the forward pass has made.
#include "bits.h"
#include "ops.h"
#include "reduce.h"

namespace fastqat::cpu {
namespace {

// g where its bit is set, else 0, whatever g is there.
inline __attribute__((always_inline)) float where_set(float g, uint32_t bits, int bit) {
  return as_float(as_bits(g) & (0u - (bits >> bit & 1u)));
}

// g, dx: [units * kUnit]; bits: [units]. Not unrolled, or g++ takes the elements of a unit one by one.
FASTQAT_CLONES void mask_units(const float* g, const uint8_t* bits, float* dx, int64_t units) {
  for (int64_t u = 0; u < units; ++u) {
    const uint32_t byte = bits[u];
#pragma GCC unroll 1
    for (int k = 0; k < kUnit; ++k) dx[u * kUnit + k] = where_set(g[u * kUnit + k], byte, k);
  }
}

void mask_block(const float* g, const uint8_t* bits, float* dx, int64_t n) {
  const int64_t units = n / kUnit, rest = n % kUnit;
  mask_units(g, bits, dx, units);
  if (rest == 0) return;
  float last[kUnit] = {};
  std::copy_n(g + units * kUnit, rest, last);
  mask_units(last, bits + units, last, 1);
  std::copy_n(last, rest, dx + units * kUnit);
}

// sums[i % kLanes] += terms[i]
FASTQAT_CLONES void sum_loop(const float* terms, double* sums, int64_t n) {
  double total[kLanes];
  std::copy_n(sums, kLanes, total);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
#pragma GCC ivdep
    for (int64_t lane = 0; lane < kLanes; ++lane) total[lane] += static_cast<double>(terms[i + lane]);
  for (int64_t i = whole; i < n; ++i) total[i - whole] += static_cast<double>(terms[i]);
  std::copy_n(total, kLanes, sums);
}

}  // namespace

void fake_quantize_tensor_backward(Tensor g, Tensor inside, Tensor above, Tensor qrange, Tensor dx, Tensor dscale) {
  Tensor from = with_strides_of(dx, g);
  const Input in(from);
  const Output out(dx);
  const bool sums = dscale.numel() > 0;
  const uint8_t* inside_data = inside.const_data_ptr<uint8_t>();
  const uint8_t* above_data = sums ? above.const_data_ptr<uint8_t>() : nullptr;
  const Cut cut({1, 1, dx.numel()});
  std::vector<std::array<double, kLanes>> partial(sums ? cut.pieces : 0);
  parallel(cut, [&](int64_t p) {
    std::array<double, kLanes> total{};
    blocks_of_piece(cut, p, kBlock, [&](int64_t offset, int64_t n) {
      float buffer_g[kBlock], buffer_dx[kBlock], terms[kBlock];
      const float* block = in.block(offset, n, buffer_g);
      if (sums) {
        mask_block(block, above_data + offset / kUnit, terms, n);
        sum_loop(terms, total.data(), n);
      }
      float* to = out.block(offset, buffer_dx);
      mask_block(block, inside_data + offset / kUnit, to, n);
      out.commit(offset, n, to);
    });
    if (sums) partial[p] = total;
  });
  if (!sums) return;
  double total = 0.0;
  for (const auto& piece : partial)
    for (double part : piece) total += part;
  dscale.mutable_data_ptr<float>()[0] =
      static_cast<float>(total * static_cast<double>(qrange.const_data_ptr<int32_t>()[1]));
}

}  // namespace fastqat::cpu
