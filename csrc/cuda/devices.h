#pragma once

#include <vector>

namespace fastqat::cuda {

// Compute capability of each visible GPU, 90 for 9.0. Throws where the driver is missing, or too old for the runtime.
std::vector<int> capabilities();

}  // namespace fastqat::cuda
