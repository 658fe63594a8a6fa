// philox_uniform: counter-based uniform numbers, the same on every backend and for any number of threads.
#include "elements.h"
#include "ops.h"

namespace fastqat::cpu {

void philox_uniform_out(Tensor step, int64_t seed, int64_t tensor_id, int64_t numel, Tensor u) {
  float* out = u.mutable_data_ptr<float>();
  const uint32_t time = static_cast<uint32_t>(step.const_data_ptr<int64_t>()[0]);
  torch::stable::parallel_for(0, (numel + 3) / 4, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Philox numbers =
          philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(block), time, static_cast<uint32_t>(tensor_id));
      for (int64_t lane = 0; lane < std::min<int64_t>(4, numel - block * 4); ++lane)
        out[block * 4 + lane] = uniform(numbers.lane[lane]);
    }
  });
}

}  // namespace fastqat::cpu
