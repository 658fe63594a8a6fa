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

// Uninitialized tensor on the device of `where`. Not torch::stable::empty: that goes through the dispatcher.
inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype,
                            const Tensor& where) {
  int32_t type = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(where.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(where.get(), &index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), type, index,
      &handle));
  return Tensor(handle);
}

// With the sizes and strides of a dense tensor.
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  return empty_strided(t.dim(), t.sizes().data(), t.strides().data(), dtype, t);
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& where) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, where);
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

// What an empty tensor or a negative axis of a list stands for.
inline OptionalTensor unless_empty(const Tensor& t) { return t.numel() ? OptionalTensor(t) : std::nullopt; }
inline std::optional<int64_t> axis_of(int64_t axis) { return axis < 0 ? std::nullopt : std::optional<int64_t>(axis); }

// A result in the layout of x: the tensor itself, or a temporary that deliver() copies into it. dtype: computed in, if
// it is another than that of the tensor.
struct Result {
  Tensor wanted, own;

  Result(const Tensor& wanted_, const Tensor& x) : Result(wanted_, x, wanted_.scalar_type()) {}
  Result(const Tensor& wanted_, const Tensor& x, ScalarType dtype)
      : wanted(wanted_),
        own(wanted_.scalar_type() == dtype && same_strides(wanted_, x) ? wanted_ : empty_like(x, dtype)) {}

  bool is_copy() const { return wanted.data_ptr() != own.data_ptr(); }
  void deliver() {
    if (is_copy()) torch::stable::copy_(wanted, own);
  }
};

}  // namespace fastqat
