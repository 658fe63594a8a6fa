// The ops of the CUDA backend under their names. Importing the module of module.cpp registers them.
#include "ops.h"
// After it.
#include "../register.h"

// The same kernels on the CPU have a namespace of their own, which whoever loads them has defined.
#ifdef FASTQAT_CUDA_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(fastqat_cuda_on_host, CPU, m) { FASTQAT_REGISTER_ALL(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(fastqat, CUDA, m) { FASTQAT_REGISTER_ALL(m); }
#endif
