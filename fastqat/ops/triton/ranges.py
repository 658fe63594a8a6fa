"""How the range of a tensor moves from step to step: csrc/ranges.h in Triton, the same names in the same order.

All functions work on float32 scalars; fastqat/ops/one_tensor.py defines them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton.math import clamp


@triton.jit
def is_finite(v):
    """Neither Inf nor NaN."""
    return v - v == 0.0


@triton.jit
def moving_average(old, now, momentum, rest):
    """momentum * old + rest * now, old where both are equal; a bound that is not finite does not count."""
    average = tl.where(is_finite(old), momentum * old + rest * now, now)
    return tl.where(is_finite(now) & (old != now), average, old)


@triton.jit
def scale_of_range(low, high, qmin, qmax, SYMMETRIC: tl.constexpr):
    """The scale of the grid that covers [low, high] and holds 0; 1 where that has no extent."""
    low = tl.where(is_finite(low) & (low < 0.0), low, 0.0)
    high = tl.where(is_finite(high) & (high > 0.0), high, 0.0)
    if SYMMETRIC:
        extent = tl.where((qmin < 0.0) & (-low > high), -low, high)
        scale = tl.div_rn(extent, tl.where(qmax > 0.0, qmax, 1.0))
    else:
        scale = tl.div_rn(high - low, qmax - qmin)
    return tl.where(scale > 0.0, scale, 1.0)


@triton.jit
def zero_point_of_range(low, scale, qmin):
    """Its zero point, unrounded, on an affine grid."""
    return qmin - tl.div_rn(tl.where(is_finite(low) & (low < 0.0), low, 0.0), scale)


@triton.jit
def largest_magnitude(low, high):
    """max|g| of a gradient with these extremes; 0 where it has no finite value."""
    largest = tl.where(-low > high, -low, high)
    return tl.where(is_finite(largest) & (largest > 0.0), largest, 0.0)


@triton.jit
def moved_gamma(gamma, beyond, seen, ALPHA: tl.constexpr, qmax, stride, smallest):
    """gamma of the next step (LBT, section 4.3). beyond, seen: int64; ALPHA: no argument, which would be float32."""
    wanted = tl.full((), ALPHA, tl.float64) * seen.to(tl.float64)
    excess = beyond.to(tl.float64) * (2.0 * qmax.to(tl.float64) + 1.0) - wanted
    moved = tl.where(excess > 0.0, gamma + stride, tl.where(excess < 0.0, gamma - stride, gamma))
    return tl.where(seen == 0, gamma, clamp(moved, smallest, 1.0))
