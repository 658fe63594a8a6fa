// The grid of one tensor, read on the CPU.
#pragma once

#include "../torch_api.h"

namespace fastqat::cpu {

// The arguments (scale, zero_point, offset, qrange, eps) of an op, read on the CPU.
struct Grid {
  FloatVector scale, zero_point, offset;
  float qmin = 0, qmax = 0, eps = 0;

  Grid() = default;
  Grid(const Tensor& scale_, const OptionalTensor& zero_point_, const OptionalTensor& offset_, const Tensor& qrange,
       double eps_)
      : scale(scale_), zero_point(zero_point_), offset(offset_), eps(static_cast<float>(eps_)) {
    const int32_t* range = qrange.const_data_ptr<int32_t>();
    qmin = static_cast<float>(range[0]);
    qmax = static_cast<float>(range[1]);
  }

  // For ops that reduce per channel without quantizing.
  static const Grid& none() {
    static const Grid grid;
    return grid;
  }

  bool offset_grid() const { return offset.data != nullptr; }

  Channel channel(int64_t c) const {
    if (!scale.data) return {};
    return make_channel(scale.data[c], eps, zero_point.data != nullptr, zero_point.data ? zero_point.data[c] : 0.0f,
                        offset.data ? offset.data[c] : 0.0f, qmin, qmax);
  }
};

}  // namespace fastqat::cpu
