// The ops of the CPU backend.
#pragma once

#define FASTQAT_BACKEND cpu
#include "../ops.h"
