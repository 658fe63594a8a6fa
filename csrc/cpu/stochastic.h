// Stochastic rounding of one tensor as one loop over registers.
#pragma once

#include "noise.h"
#include "reduce.h"

namespace fastqat::cpu {

// Whether this machine can do so.
bool can_round_in_registers();

// y = value(clamp(floor(x / scale + u))) on the zero-point grid, for the elements [first, first + n), which lie between
// two multiples of 2^34; returns how many magnitudes exceed the limit.
// first: a multiple of kLanes; x, y: [n]
// extremes: null, or [2][kLanes], of -x and of x, which the finite elements of each lane raise
int64_t round_in_registers(const Uniforms& uniforms, const Channel& ch, float limit, int64_t first, int64_t n,
                           const float* x, float* y, float (*extremes)[kLanes]);

}  // namespace fastqat::cpu
