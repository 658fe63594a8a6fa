// fake_quantize: quantize-dequantize in one pass.
#include "loops.h"
#include "ops.h"

namespace fastqat::cpu {
namespace {

template <bool kFast, bool kOffset, class Channels, class In = float, class Out = float>
FASTQAT_CLONES void loop(const In* x, Out* y, int64_t n, const Channels& given) {
  const Channels channels = given;
  for (int64_t i = 0; i < n; ++i)
    y[i] = FromFloat<Out>::convert(fastqat::fake_quantize<kFast, kOffset>(to_float(x[i]), channels[i]));
}

template <class In, class Out>
void convert_row(const Input& x, const Output& y, int64_t offset, int64_t n, const Uniform& row, bool offset_grid) {
  (offset_grid ? loop<true, true, Uniform, In, Out>
               : loop<true, false, Uniform, In, Out>)(x.in_place<In>(offset), y.in_place<Out>(offset), n, row);
}

}  // namespace

template <class Channels>
void forward_span(const Input& x, const Output& y, int64_t offset, int64_t n, const Channels& channels,
                  bool offset_grid) {
  if constexpr (Channels::kRow) {
    if (channels.fast && y.dtype == ScalarType::BFloat16 && x.dtype == ScalarType::BFloat16)
      return convert_row<BFloat16, BFloat16>(x, y, offset, n, channels, offset_grid);
    if (channels.fast && y.dtype == ScalarType::BFloat16 && x.dtype == ScalarType::Float)
      return convert_row<float, BFloat16>(x, y, offset, n, channels, offset_grid);
  }
  float buffer_x[kBlock], buffer_y[kBlock];
  float* to = y.block(offset, buffer_y);
  FASTQAT_PICK(loop, channels, offset_grid)(x.block(offset, n, buffer_x), to, n, channels);
  y.commit(offset, n, to);
}
template void forward_span(const Input&, const Output&, int64_t, int64_t, const Uniform&, bool);
template void forward_span(const Input&, const Output&, int64_t, int64_t, const Columns&, bool);

namespace {

// x, y: dense, the same sizes and strides.
void run(const Tensor& x, const Grid& grid, std::optional<int64_t> axis, const Tensor& y) {
  const Input in(x);
  const Output out(y);
  const Cut cut(layout_of(x, axis));
  parallel(cut, [&](int64_t p) { forward_piece(in, out, cut, grid, p); });
}

}  // namespace

void fake_quantize_out(Tensor x, FASTQAT_GRID, std::optional<ScalarType>, Tensor y) {
  x = dense(x);
  write_into(y, x, [&](const Tensor& to) { run(x, Grid(scale, zero_point, offset, qrange, eps), axis, to); });
}

}  // namespace fastqat::cpu
