#include "kernels.h"
#include "launch.cuh"

namespace fastqat::cuda {

void clear(void* data, int64_t bytes, void* stream) {
  if (bytes) set_to_zero(data, bytes, stream);
}

}  // namespace fastqat::cuda
