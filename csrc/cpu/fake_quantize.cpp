// fake_quantize: quantize-dequantize in one pass.
#include "bfloat16_avx512.h"
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

template <class In>
using RowLoop = void (*)(const In* x, BFloat16* y, int64_t n, const Uniform& row);

#ifdef FASTQAT_AVX512_BF16

// For fast scales on the zero-point grid, which has no subnormal values.
template <class In>
FASTQAT_AVX512_BF16 void instruction_loop(const In* x, BFloat16* y, int64_t n, const Uniform& given) {
  const Uniform channels = given;
  constexpr int64_t kStep = 64;
  auto element = [&](int64_t i) __attribute__((always_inline)) {
    return fastqat::fake_quantize<true, false>(to_float(x[i]), channels[i]);
  };
  const int64_t whole = n - n % kStep;
  for (int64_t i = 0; i < whole; i += kStep) {
    alignas(64) float values[kStep];
    for (int64_t k = 0; k < kStep; ++k) values[k] = element(i + k);
    for (int64_t k = 0; k < kStep; k += 32) narrow_normal(values + k, y + i + k);
  }
  for (int64_t i = whole; i < n; ++i) y[i] = FromFloat<BFloat16>::convert(element(i));
}

#endif

template <class In>
RowLoop<In> zero_point_loop() {
#ifdef FASTQAT_AVX512_BF16
  static const bool has_instruction = has_avx512_bf16();
  if (has_instruction) return instruction_loop<In>;
#endif
  return loop<true, false, Uniform, In, BFloat16>;
}

template <class In>
void to_bfloat16(const Input& x, const Output& y, int64_t offset, int64_t n, const Uniform& row, bool offset_grid) {
  const RowLoop<In> run = offset_grid ? loop<true, true, Uniform, In, BFloat16> : zero_point_loop<In>();
  run(x.in_place<In>(offset), y.in_place<BFloat16>(offset), n, row);
}

}  // namespace

template <class Channels>
void forward_span(const Input& x, const Output& y, int64_t offset, int64_t n, const Channels& channels,
                  bool offset_grid) {
  if constexpr (Channels::kRow) {
    if (channels.fast && y.dtype == ScalarType::BFloat16) {
      if (x.dtype == ScalarType::BFloat16) return to_bfloat16<BFloat16>(x, y, offset, n, channels, offset_grid);
      if (x.dtype == ScalarType::Float) return to_bfloat16<float>(x, y, offset, n, channels, offset_grid);
    }
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
