// The current device and its stream.
#include "glue.h"

namespace fastqat::cuda {

#ifdef FASTQAT_CUDA_ON_HOST
Device::Device(const Tensor&) {}
#else
Device::Device(const Tensor& t) : guard_(t.get_device_index()) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
}
#endif

}  // namespace fastqat::cuda
