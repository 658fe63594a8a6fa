// Index arithmetic of a dense tensor around its channel dimension, in 64 bits; no torch, no CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fastqat {

constexpr int kMaxDims = 16;

// Memory order of a dense tensor: element = (o * channels + c) * inner + i. Per tensor: outer = channels = 1.
struct Layout {
  int64_t outer, channels, inner;
  int64_t numel() const { return outer * channels * inner; }
};

// Dimensions of size > 1, outermost in memory first. sizes, strides: [dims].
struct MemoryOrder {
  std::array<int, kMaxDims> dims;
  int count = 0;

  MemoryOrder(const int64_t* sizes, const int64_t* strides, int ndim) {
    for (int d = 0; d < ndim; ++d)
      if (sizes[d] != 1) dims[count++] = d;
    std::stable_sort(dims.begin(), dims.begin() + count, [&](int a, int b) { return strides[a] > strides[b]; });
  }
};

// True if the elements fill memory without gaps and without overlap, in whatever order of dimensions.
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int ndim) {
  if (ndim > kMaxDims) return false;
  MemoryOrder order(sizes, strides, ndim);
  int64_t expected = 1;
  for (int k = order.count - 1; k >= 0; --k) {
    int d = order.dims[k];
    if (sizes[d] == 0) return true;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Layout of a dense tensor around dimension `axis`; axis < 0: per tensor.
inline Layout make_layout(const int64_t* sizes, const int64_t* strides, int ndim, int axis) {
  Layout layout{1, axis < 0 ? 1 : sizes[axis], 1};
  MemoryOrder order(sizes, strides, ndim);
  int axis_stride_rank = -1;
  for (int k = 0; k < order.count; ++k)
    if (order.dims[k] == axis) axis_stride_rank = k;
  for (int k = 0; k < order.count; ++k) {
    if (order.dims[k] == axis) continue;
    (k < axis_stride_rank ? layout.outer : layout.inner) *= sizes[order.dims[k]];
  }
  return layout;
}

}  // namespace fastqat
