// What the forward and the backward op on many tensors share.
#pragma once

#include "../oscillation.h"
#include "loops.h"
#include "ops.h"

namespace fastqat::cpu {

// Stochastic rounding of one dense tensor: floor(r + u), elements counted in row-major order, whatever the strides.
class Noise {
 public:
  Noise(int64_t seed, const Tensor& step, int64_t tensor_id, const Tensor& x) : on_(tensor_id >= 0) {
    if (!on_) return;
    seed_ = static_cast<uint64_t>(seed);
    step_ = static_cast<uint32_t>(step.const_data_ptr<int64_t>()[0]);
    tensor_id_ = static_cast<uint32_t>(tensor_id);
    MemoryOrder order(x.sizes().data(), x.strides().data(), static_cast<int>(x.dim()));
    for (int k = 0; k < order.count; ++k) {
      int64_t row_major = 1;
      for (int64_t d = order.dims[k] + 1; d < x.dim(); ++d) row_major *= x.size(d);
      strides_.push_back({x.stride(order.dims[k]), row_major});
    }
  }

  bool on() const { return on_; }

  // drawn[i] for the elements [offset, offset + n) in memory. x: [n]
  template <class Channels>
  void draw(const float* x, float* drawn, int64_t offset, int64_t n, const Channels& channels, bool offset_grid) const {
    Philox numbers{};
    int64_t block = -1;
    for (int64_t i = 0; i < n; ++i) {
      int64_t element = row_major(offset + i);
      if (element / 4 != block) {
        block = element / 4;
        numbers = philox(seed_, static_cast<uint64_t>(block), step_, tensor_id_);
      }
      Channel ch = channels[i];
      float t = offset_grid ? shifted<true>(x[i], ch) : x[i];
      drawn[i] = __builtin_floorf(t / ch.scale + uniform(numbers.lane[element % 4]));
    }
  }

 private:
  // Number of the element at a place in memory.
  int64_t row_major(int64_t place) const {
    int64_t element = 0;
    for (const auto& [stride, row_major_stride] : strides_) {
      element += place / stride * row_major_stride;
      place %= stride;
    }
    return element;
  }

  bool on_;
  uint64_t seed_ = 0;
  uint32_t step_ = 0, tensor_id_ = 0;
  std::vector<std::pair<int64_t, int64_t>> strides_;  // in memory and in row-major order, outermost in memory first
};

}  // namespace fastqat::cpu
