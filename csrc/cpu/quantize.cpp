// quantize to integer codes, and dequantize them.
#include "ops.h"
#include "spans.h"

namespace fastqat::cpu {
namespace {

template <bool kFast, bool kOffset, class Channels>
FASTQAT_CLONES void quantize_loop(const float* x, float* codes, int64_t n, const Channels& given) {
  const Channels channels = given;
  for (int64_t i = 0; i < n; ++i) codes[i] = fastqat::quantize<kFast, kOffset>(x[i], channels[i]);
}

template <bool kFast, bool kOffset, class Channels>
FASTQAT_CLONES void dequantize_loop(const float* codes, float* y, int64_t n, const Channels& given) {
  const Channels channels = given;
  for (int64_t i = 0; i < n; ++i) y[i] = fastqat::dequantize<kOffset>(codes[i], channels[i]);
}

// from, to: dense, the same sizes and strides.
void run_quantize(const Tensor& from, const Grid& grid, std::optional<int64_t> axis, const Tensor& to) {
  map_elements(from, to, axis, grid,
               [&](const auto& channels) { return FASTQAT_PICK(quantize_loop, channels, grid.offset_grid()); });
}

void run_dequantize(const Tensor& from, const Grid& grid, std::optional<int64_t> axis, const Tensor& to) {
  map_elements(from, to, axis, grid,
               [&](const auto& channels) { return FASTQAT_PICK(dequantize_loop, channels, grid.offset_grid()); });
}

}  // namespace

void quantize_out(Tensor x, FASTQAT_GRID, ScalarType, Tensor codes) {
  x = dense(x);
  write_into(codes, x,
             [&](const Tensor& to) { run_quantize(x, Grid(scale, zero_point, offset, qrange, eps), axis, to); });
}

void dequantize_out(Tensor codes, FASTQAT_GRID, ScalarType, Tensor y) {
  codes = dense(codes);
  write_into(y, codes,
             [&](const Tensor& to) { run_dequantize(codes, Grid(scale, zero_point, offset, qrange, eps), axis, to); });
}

}  // namespace fastqat::cpu
