// Registration of a backend's ops under their names, each with the form that allocates its results. Include it behind
// the backend's ops.h, once.
#pragma once

namespace fastqat::FASTQAT_BACKEND {
namespace {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

Tensor fake_quantize(Tensor x, FASTQAT_GRID, std::optional<ScalarType> out_dtype) {
  x = dense(x);
  Tensor y = empty_like(x, out_dtype.value_or(x.scalar_type()));
  fake_quantize_out(x, scale, zero_point, offset, qrange, axis, eps, out_dtype, y);
  return y;
}

Tensors3 fake_quantize_backward(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, bool lsq_grad_scale, double clip) {
  x = dense(x);
  Tensor dx = empty_like(x, x.scalar_type());
  Tensor dscale = empty({scale.numel()}, ScalarType::Float, x);
  Tensor dshift = empty({zero_point || offset ? scale.numel() : 0}, ScalarType::Float, x);
  fake_quantize_backward_out(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, lsq_grad_scale, clip, dx,
                             dscale, dshift);
  return {dx, dscale, dshift};
}

Tensor fake_quantize_backward_input(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask) {
  x = dense(x);
  Tensor dx = empty_like(x, x.scalar_type());
  fake_quantize_backward_input_out(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, dx);
  return dx;
}

Tensor quantize(Tensor x, FASTQAT_GRID, ScalarType dtype) {
  x = dense(x);
  Tensor codes = empty_like(x, dtype);
  quantize_out(x, scale, zero_point, offset, qrange, axis, eps, dtype, codes);
  return codes;
}

Tensor dequantize(Tensor codes, FASTQAT_GRID, ScalarType dtype) {
  codes = dense(codes);
  Tensor y = empty_like(codes, dtype);
  dequantize_out(codes, scale, zero_point, offset, qrange, axis, eps, dtype, y);
  return y;
}

Tensor pack(Tensor codes, int64_t bits) {
  Tensor packed = empty({(codes.numel() * bits + 7) / 8}, ScalarType::Byte, codes);
  pack_out(codes, bits, packed);
  return packed;
}

Tensor unpack(Tensor packed, int64_t bits, int64_t numel, bool is_signed) {
  Tensor codes = empty({numel}, is_signed ? ScalarType::Char : ScalarType::Byte, packed);
  unpack_out(packed, bits, numel, is_signed, codes);
  return codes;
}

Tensors2 minmax(Tensor x, std::optional<int64_t> axis) {
  const int64_t channels = axis ? x.size(*axis) : 1;
  Tensor low = empty({channels}, ScalarType::Float, x), high = empty({channels}, ScalarType::Float, x);
  minmax_out(x, axis, low, high);
  return {low, high};
}

Tensor range_search(Tensor x, Tensor scales, OptionalTensor zero_points, Tensor qrange, std::optional<int64_t> axis) {
  Tensor errors = empty({scales.size(0), scales.size(1)}, ScalarType::Float, x);
  range_search_out(x, scales, zero_points, qrange, axis, errors);
  return errors;
}

Tensor philox_uniform(Tensor step, int64_t seed, int64_t tensor_id, int64_t numel) {
  Tensor u = empty({numel}, ScalarType::Float, step);
  philox_uniform_out(step, seed, tensor_id, numel, u);
  return u;
}

}  // namespace
}  // namespace fastqat::FASTQAT_BACKEND

#define FASTQAT_REGISTER(m, op)                          \
  m.impl(#op, TORCH_BOX(&fastqat::FASTQAT_BACKEND::op)); \
  m.impl(#op "_out", TORCH_BOX(&fastqat::FASTQAT_BACKEND::op##_out))

#define FASTQAT_REGISTER_IN_PLACE(m, op) m.impl(#op, TORCH_BOX(&fastqat::FASTQAT_BACKEND::op))

#define FASTQAT_REGISTER_ALL(m)                                      \
  FASTQAT_REGISTER(m, fake_quantize);                                \
  FASTQAT_REGISTER(m, fake_quantize_backward);                       \
  FASTQAT_REGISTER(m, fake_quantize_backward_input);                 \
  FASTQAT_REGISTER(m, quantize);                                     \
  FASTQAT_REGISTER(m, dequantize);                                   \
  FASTQAT_REGISTER(m, pack);                                         \
  FASTQAT_REGISTER(m, unpack);                                       \
  FASTQAT_REGISTER(m, minmax);                                       \
  FASTQAT_REGISTER(m, range_search);                                 \
  FASTQAT_REGISTER(m, philox_uniform);                               \
  FASTQAT_REGISTER_IN_PLACE(m, multi_tensor_fake_quantize);          \
  FASTQAT_REGISTER_IN_PLACE(m, multi_tensor_fake_quantize_backward); \
  FASTQAT_REGISTER_IN_PLACE(m, fake_quantize_tensor);                \
  FASTQAT_REGISTER_IN_PLACE(m, fake_quantize_tensor_backward);       \
  FASTQAT_REGISTER_IN_PLACE(m, dequantize_tensor);                   \
  FASTQAT_REGISTER_IN_PLACE(m, advance_range);                       \
  FASTQAT_REGISTER_IN_PLACE(m, advance_interval);                    \
  FASTQAT_REGISTER_IN_PLACE(m, fake_quantize_two_widths);            \
  FASTQAT_REGISTER_IN_PLACE(m, dorefa_fake_quantize);                \
  FASTQAT_REGISTER_IN_PLACE(m, dorefa_fake_quantize_backward)
