// fake_quantize: quantize-dequantize in one pass.
#include "loops.h"
#include "ops.h"

namespace fastqat::cpu {
namespace {

template <bool kFast, bool kOffset, class Channels>
FASTQAT_CLONES void loop(const float* x, float* y, int64_t n, const Channels& given) {
  const Channels channels = given;
  for (int64_t i = 0; i < n; ++i) y[i] = fastqat::fake_quantize<kFast, kOffset>(x[i], channels[i]);
}

}  // namespace

template <class Channels>
ForwardLoop<Channels> forward_loop(const Channels& channels, bool offset_grid) {
  return FASTQAT_PICK(loop, channels, offset_grid);
}
template ForwardLoop<Uniform> forward_loop(const Uniform&, bool);
template ForwardLoop<Columns> forward_loop(const Columns&, bool);

namespace {

// x, y: dense, the same sizes and strides.
void run(const Tensor& x, const Grid& grid, std::optional<int64_t> axis, const Tensor& y) {
  map_elements(x, y, axis, grid, [&](const auto& channels) { return forward_loop(channels, grid.offset_grid()); });
}

}  // namespace

void fake_quantize_out(Tensor x, FASTQAT_GRID, std::optional<ScalarType>, Tensor y) {
  x = dense(x);
  write_into(y, x, [&](const Tensor& to) { run(x, Grid(scale, zero_point, offset, qrange, eps), axis, to); });
}

}  // namespace fastqat::cpu
