// The only file that names torch: the stable ABI's tensors in the words that the kernels use.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "layout.h"
#include "math.h"

namespace fastqat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_dense(const Tensor& t) {
  return is_dense(t.sizes().data(), t.strides().data(), static_cast<int>(t.dim()));
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Uninitialized tensor. Not torch::stable::empty: that goes through the dispatcher.
inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// With the sizes and strides of a dense tensor.
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  return empty_strided(t.dim(), t.sizes().data(), t.strides().data(), dtype);
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype);
}

// The tensor itself where it is dense, else a copy with the strides that empty_like(preserve_format) gives.
inline Tensor dense(const Tensor& t) { return is_dense(t) ? t : torch::stable::clone(t); }

// A tensor with the strides of `like`: the tensor itself where they agree, else a copy.
inline Tensor with_strides_of(const Tensor& like, const Tensor& t) {
  if (same_strides(like, t)) return t;
  Tensor copy = empty_like(like, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// Runs compute(to) on a tensor with the strides of `like`: y itself, or a temporary that is copied into y.
template <class F>
void write_into(const Tensor& y, const Tensor& like, const F& compute) {
  if (same_strides(like, y)) {
    compute(y);
    return;
  }
  Tensor temporary = empty_like(like, y.scalar_type());
  compute(temporary);
  Tensor target = y;
  torch::stable::copy_(target, temporary);
}

inline Layout layout_of(const Tensor& t, std::optional<int64_t> axis) {
  return make_layout(t.sizes().data(), t.strides().data(), static_cast<int>(t.dim()),
                     axis ? static_cast<int>(*axis) : -1);
}

// A float32 parameter of the grid, contiguous; keeps the tensor alive.
struct FloatVector {
  std::optional<Tensor> tensor;
  const float* data = nullptr;

  FloatVector() = default;
  explicit FloatVector(const Tensor& t) : tensor(torch::stable::contiguous(t)), data(tensor->const_data_ptr<float>()) {}
  explicit FloatVector(const OptionalTensor& t) {
    if (t) *this = FloatVector(*t);
  }
};

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

}  // namespace fastqat
