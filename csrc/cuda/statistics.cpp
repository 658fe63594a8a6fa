// Ops that reduce a tensor without a gradient: minmax and range_search.
#include "glue.h"

namespace fastqat::cuda {
namespace {

// Memory in which the pieces of a reduction meet: a T for each partial result, and counters, which are 0.
template <class T>
struct Meetings {
  Tensor partial_memory, arrived_memory;
  T* partial;
  unsigned int* arrived;

  Meetings(int64_t partial_results, int64_t counters, const Device& device, const Tensor& where)
      : partial_memory(empty({partial_results * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte, where)),
        arrived_memory(empty({counters}, ScalarType::Int, where)),
        partial(static_cast<T*>(partial_memory.data_ptr())),
        arrived(static_cast<unsigned int*>(arrived_memory.data_ptr())) {
    clear(arrived, counters * static_cast<int64_t>(sizeof(unsigned int)), device.stream());
  }
};

}  // namespace

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
