// fake_quantize_two_widths: two grids from one read of a weight, a block of which stays in the first-level cache from
// the first grid to the second.
#include "loops.h"
#include "ops.h"

namespace fastqat::cpu {
namespace {

// One of two grids.
struct Width {
  Grid grid;
  Result result;
  Output out;

  Width(const Tensor& x, const Grid& grids, const Tensor& qranges, int64_t k, const Tensor& y)
      : grid(grids), result(y, x), out(result.own) {
    for (FloatVector* each : {&grid.scale, &grid.zero_point, &grid.offset})
      if (each->data) each->data += k * each->tensor->size(1);
    const int32_t* range = qranges.const_data_ptr<int32_t>() + 2 * k;
    grid.qmin = static_cast<float>(range[0]);
    grid.qmax = static_cast<float>(range[1]);
  }
};

}  // namespace

void fake_quantize_two_widths(Tensor x, Tensor scales, OptionalTensor zero_points, OptionalTensor offsets,
                              Tensor qranges, std::optional<int64_t> axis, double eps, Tensor first, Tensor second) {
  x = dense(x);
  qranges = torch::stable::contiguous(qranges);
  const Grid grids(scales, zero_points, offsets, qranges, eps);
  Width widths[2] = {{x, grids, qranges, 0, first}, {x, grids, qranges, 1, second}};
  const Input in(x);
  const Cut cut(layout_of(x, axis), kBlock);
  parallel(cut, [&](int64_t p) {
    for (const Width& width : widths) forward_piece(in, width.out, cut, width.grid, p);
  });
  for (Width& width : widths) width.result.deliver();
}

}  // namespace fastqat::cpu
