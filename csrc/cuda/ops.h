// The ops of the CUDA backend.
#pragma once

#define FASTQAT_BACKEND cuda
#include "../ops.h"
