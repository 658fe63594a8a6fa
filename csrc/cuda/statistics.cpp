// Ops that reduce a tensor without a gradient: minmax and range_search.
#include "glue.h"

namespace fastqat::cuda {

void minmax_out(Tensor x, std::optional<int64_t> axis, Tensor low, Tensor high) {
  Device device(x);
  x = dense(x);
  const Dtype dtype = dtype_of(x);
  const Cut cut = make_cut(layout_of(x, axis), vector_of(dtype, dtype), is_aligned(x));
  const bool meets = cut.parts > 1;
  const Meetings<float> meetings(meets ? int64_t{2} * cut.parts * cut.channels : 0, meets ? cut.groups : 0, device, x);
  minmax({x.data_ptr(), cut, low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>(), meetings.partial,
          meetings.arrived, dtype},
         device.stream());
}

void range_search_out(Tensor x, Tensor scales, OptionalTensor zero_points, Tensor qrange, std::optional<int64_t> axis,
                      Tensor errors) {
  Device device(x);
  x = dense(x);
  const DeviceGrid grid(scales, zero_points, {}, qrange, 0.0);
  const Layout layout = layout_of(x, axis);
  const SearchCut cut = make_search_cut(layout);
  const int64_t candidates = scales.size(0), meeting = cut.parts > 1 ? layout.channels : 0;
  const Meetings<double> meetings(meeting * cut.parts * candidates, meeting, device, x);
  range_search({x.data_ptr(), grid.pointers(), layout, cut, errors.mutable_data_ptr<float>(), meetings.partial,
                meetings.arrived, static_cast<int32_t>(candidates), dtype_of(x)},
               device.stream());
}

}  // namespace fastqat::cuda
