// Every op of the CPU backend, as declared in fastqat/ops/schema.py; `<op>_out` writes into its last arguments.
#pragma once

#include "../torch_api.h"

// The arguments that describe a grid, in the order of the schema.
#define FASTQAT_GRID \
  Tensor scale, OptionalTensor zero_point, OptionalTensor offset, Tensor qrange, std::optional<int64_t> axis, double eps

namespace fastqat::cpu {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

Tensor fake_quantize(Tensor x, FASTQAT_GRID, std::optional<ScalarType> out_dtype);
void fake_quantize_out(Tensor x, FASTQAT_GRID, std::optional<ScalarType> out_dtype, Tensor y);

Tensors3 fake_quantize_backward(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, bool lsq_grad_scale);
void fake_quantize_backward_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, bool lsq_grad_scale, Tensor dx,
                                Tensor dscale, Tensor dshift);

Tensor fake_quantize_backward_input(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask);
void fake_quantize_backward_input_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, Tensor dx);

Tensor quantize(Tensor x, FASTQAT_GRID, ScalarType dtype);
void quantize_out(Tensor x, FASTQAT_GRID, ScalarType dtype, Tensor codes);

Tensor dequantize(Tensor codes, FASTQAT_GRID, ScalarType dtype);
void dequantize_out(Tensor codes, FASTQAT_GRID, ScalarType dtype, Tensor y);

Tensor pack(Tensor codes, int64_t bits);
void pack_out(Tensor codes, int64_t bits, Tensor packed);

Tensor unpack(Tensor packed, int64_t bits, int64_t numel, bool is_signed);
void unpack_out(Tensor packed, int64_t bits, int64_t numel, bool is_signed, Tensor codes);

Tensors2 minmax(Tensor x, std::optional<int64_t> axis);
void minmax_out(Tensor x, std::optional<int64_t> axis, Tensor low, Tensor high);

Tensor range_search(Tensor x, Tensor scales, OptionalTensor zero_points, Tensor qrange, std::optional<int64_t> axis);
void range_search_out(Tensor x, Tensor scales, OptionalTensor zero_points, Tensor qrange, std::optional<int64_t> axis,
                      Tensor errors);

Tensor philox_uniform(Tensor step, int64_t seed, int64_t tensor_id, int64_t numel);
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

}  // namespace fastqat::cpu
