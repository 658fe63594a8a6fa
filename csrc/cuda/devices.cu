// The GPUs that the library's own CUDA runtime sees. Beside launch.cuh the one file that names it: nothing here is a
// kernel, and nothing makes a context on a device.
#ifndef FASTQAT_CUDA_ON_HOST
#include "devices.h"
#include "launch.cuh"

namespace fastqat::cuda {

std::vector<int> capabilities() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "CUDA devices");
  std::vector<int> found;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "CUDA devices");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "CUDA devices");
    found.push_back(10 * major + minor);
  }
  return found;
}

}  // namespace fastqat::cuda
#endif
