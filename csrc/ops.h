// Every op of a compiled backend, as declared in fastqat/ops/schema.py: `<op>_out` writes into its last arguments. The
// ops.h of the backend says in which namespace: FASTQAT_BACKEND.
#pragma once

#include "torch_api.h"

// The arguments that describe a grid, in the order of the schema.
#define FASTQAT_GRID \
  Tensor scale, OptionalTensor zero_point, OptionalTensor offset, Tensor qrange, std::optional<int64_t> axis, double eps

namespace fastqat::FASTQAT_BACKEND {

void fake_quantize_out(Tensor x, FASTQAT_GRID, std::optional<ScalarType> out_dtype, Tensor y);

void fake_quantize_backward_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, bool lsq_grad_scale, double clip,
                                Tensor dx, Tensor dscale, Tensor dshift);

void fake_quantize_backward_input_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, Tensor dx);

void quantize_out(Tensor x, FASTQAT_GRID, ScalarType dtype, Tensor codes);

void dequantize_out(Tensor codes, FASTQAT_GRID, ScalarType dtype, Tensor y);

void pack_out(Tensor codes, int64_t bits, Tensor packed);

void unpack_out(Tensor packed, int64_t bits, int64_t numel, bool is_signed, Tensor codes);

void minmax_out(Tensor x, std::optional<int64_t> axis, Tensor low, Tensor high);

void range_search_out(Tensor x, Tensor scales, OptionalTensor zero_points, Tensor qrange, std::optional<int64_t> axis,
                      Tensor errors);

void philox_uniform_out(Tensor step, int64_t seed, int64_t tensor_id, int64_t numel, Tensor u);

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

// The lists that describe the grids of many tensors, and stochastic rounding, in the order of the schema.
#define FASTQAT_GRIDS Tensors scales, Tensors zero_points, Tensors offsets, Tensors qranges, Ints axes, Doubles eps
#define FASTQAT_NOISE Ints seeds, Ints tensor_ids, Tensors steps

void multi_tensor_fake_quantize(Tensors xs, FASTQAT_GRIDS, FASTQAT_NOISE, Doubles momenta, Ints use_average,
                                Tensors thresholds, bool advance, Tensors words, Tensors frequencies, Tensors averages,
                                Tensors counts, Tensors clocks, Tensors ys);

void multi_tensor_fake_quantize_backward(Tensors gs, Tensors xs, FASTQAT_GRIDS, FASTQAT_NOISE, Ints rounded_masks,
                                         Ints lsq_grad_scales, Ints estimators, Tensors strengths, Tensors dampenings,
                                         Tensors words, Tensors dxs, Tensors dscales, Tensors dshifts);

// The grid of one tensor that has one scale.
#define FASTQAT_TENSOR_GRID Tensor scale, OptionalTensor zero_point, OptionalTensor offset, Tensor qrange, double eps

void fake_quantize_tensor(Tensor x, FASTQAT_TENSOR_GRID, double clip, bool rounded_mask, int64_t seed,
                          int64_t tensor_id, Tensor step, Tensor limit, int64_t code_bits, Tensor low, Tensor high,
                          Tensor beyond, Tensor inside, Tensor above, Tensor codes, Tensor y);

void fake_quantize_tensor_backward(Tensor g, Tensor inside, Tensor above, Tensor qrange, Tensor dx, Tensor dscale);

void dequantize_tensor(Tensor codes, FASTQAT_TENSOR_GRID, int64_t code_bits, Tensor y);

void advance_range(Tensor qrange, Tensor step, bool always, double momentum, Tensor low, Tensor high, Tensor new_low,
                   Tensor new_high, Tensor observed_step, Tensor scale, Tensor zero_point);

void advance_interval(Tensor low, Tensor high, Tensor qrange, Tensor step, bool always, int64_t numel, double alpha,
                      double stride, double smallest, Tensor gamma, Tensor beyond, Tensor seen, Tensor observed_step,
                      Tensor limit, Tensor scale);

void fake_quantize_two_widths(Tensor x, Tensor scales, OptionalTensor zero_points, OptionalTensor offsets,
                              Tensor qranges, std::optional<int64_t> axis, double eps, Tensor first, Tensor second);

void dorefa_fake_quantize(Tensor x, Tensor low, Tensor high, Tensor qmax, Tensor sums, Tensor first, Tensor second);

void dorefa_fake_quantize_backward(Tensor g, Tensor x, Tensor low, Tensor high, Tensor factor, Tensor dx);

}  // namespace fastqat::FASTQAT_BACKEND
