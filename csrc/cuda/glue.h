// From tensors to the pointers that kernels take.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "kernels.h"
#include "ops.h"

namespace fastqat::cuda {

// The device of a tensor is current while this lives. stream: its current one.
class Device {
 public:
  explicit Device(const Tensor& t);
  void* stream() const { return stream_; }

 private:
#ifndef FASTQAT_CUDA_ON_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Char:
      return Dtype::int8;
    case ScalarType::Byte:
      return Dtype::uint8;
    case ScalarType::Int:
      return Dtype::int32;
    default:
      STD_TORCH_CHECK(false, "fastqat: no kernel for this dtype");
  }
}

// The tensor itself, or a copy of this dtype with its strides; t is dense.
inline Tensor of_dtype(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  Tensor copy = empty_like(t, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// Kernels take x with another tensor of its own dtype, and float32 with any: what x has to be for that.
inline ScalarType computed_dtype(const Tensor& x, ScalarType other) {
  return x.scalar_type() == other ? other : ScalarType::Float;
}

// Whether vectors of 16 bytes may begin at the first element.
inline bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

// Keeps what its pointers point to alive.
class DeviceGrid {
 public:
  DeviceGrid(const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& offset, const Tensor& qrange,
             double eps)
      : scale_(scale), zero_point_(zero_point), offset_(offset), qrange_(qrange), eps_(static_cast<float>(eps)) {}

  GridPointers pointers() const {
    return {scale_.data, zero_point_.data, offset_.data, qrange_.const_data_ptr<int32_t>(), eps_};
  }

 private:
  FloatVector scale_, zero_point_, offset_;
  Tensor qrange_;
  float eps_;
};

inline constexpr NoisePointers kNoNoise{nullptr, 0, -1};

inline NoisePointers noise_of(int64_t seed, const Tensor& step, int64_t tensor_id) {
  return {step.const_data_ptr<int64_t>(), static_cast<uint64_t>(seed), tensor_id};
}

// Entries of several tensors, those of equal dtypes together: start(entries, count) for each kind. Entry: has x_dtype
// and, by `second`, another.
template <class Entry, class Start>
void start_by_dtypes(const std::vector<Entry>& entries, Dtype Entry::* second, const Start& start) {
  std::vector<bool> done(entries.size(), false);
  for (size_t i = 0; i < entries.size(); ++i) {
    if (done[i]) continue;
    std::vector<Entry> alike;
    for (size_t j = i; j < entries.size(); ++j) {
      if (entries[j].x_dtype != entries[i].x_dtype || entries[j].*second != entries[i].*second) continue;
      alike.push_back(entries[j]);
      done[j] = true;
    }
    start(alike.data(), static_cast<int>(alike.size()));
  }
}

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

}  // namespace fastqat::cuda
