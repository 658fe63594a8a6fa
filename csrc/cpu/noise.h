// The random numbers of one tensor at one step.
#pragma once

#include "../torch_api.h"

namespace fastqat::cpu {

struct Uniforms {
  uint64_t seed;
  uint32_t step, tensor_id;

  // step: int64 [1]
  Uniforms(int64_t seed_, const Tensor& step_, int64_t tensor_id_)
      : seed(static_cast<uint64_t>(seed_)),
        step(static_cast<uint32_t>(step_.const_data_ptr<int64_t>()[0])),
        tensor_id(static_cast<uint32_t>(tensor_id_)) {}

  // Those of elements [first, first + n), in [0, 1). first: a multiple of 4; u: [n]
  void draw(int64_t first, int64_t n, float* u) const;
};

}  // namespace fastqat::cpu
