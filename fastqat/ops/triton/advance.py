"""advance_range and advance_interval: the range of the next step, from what was seen in this one; a single program."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton import ranges
from fastqat.ops.triton.launch import launch


@triton.jit
def advance_range_kernel(
    qrange_ptr,
    step_ptr,
    low_ptr,
    high_ptr,
    new_low_ptr,
    new_high_ptr,
    observed_step_ptr,
    scale_ptr,
    zero_point_ptr,  # or None: a symmetric grid
    momentum,
    rest,  # 1 - momentum
    ALWAYS: tl.constexpr,
):
    """All are of one element; see fastqat.ops.schema. Thread 0 alone stores, after its own loads."""
    SYMMETRIC: tl.constexpr = zero_point_ptr is None
    step = tl.load(step_ptr)
    low, high = tl.load(low_ptr), tl.load(high_ptr)
    if ALWAYS or step != tl.load(observed_step_ptr):
        low = ranges.moving_average(low, tl.load(new_low_ptr), momentum, rest)
        high = ranges.moving_average(high, tl.load(new_high_ptr), momentum, rest)
        tl.store(low_ptr, low)
        tl.store(high_ptr, high)
        tl.store(new_low_ptr, float("inf"))
        tl.store(new_high_ptr, float("-inf"))
    tl.store(observed_step_ptr, step)
    qmin, qmax = tl.load(qrange_ptr).to(tl.float32), tl.load(qrange_ptr + 1).to(tl.float32)
    scale = ranges.scale_of_range(low, high, qmin, qmax, SYMMETRIC)
    tl.store(scale_ptr, scale)
    if not SYMMETRIC:
        tl.store(zero_point_ptr, ranges.zero_point_of_range(low, scale, qmin))


@triton.jit(do_not_specialize=["numel"])
def advance_interval_kernel(
    low_ptr,
    high_ptr,
    qrange_ptr,
    step_ptr,
    gamma_ptr,
    beyond_ptr,
    seen_ptr,
    observed_step_ptr,
    limit_ptr,
    scale_ptr,
    numel,
    stride,
    smallest,
    ALPHA: tl.constexpr,
    ALWAYS: tl.constexpr,
):
    """All but qrange are of one element; see fastqat.ops.schema. Thread 0 alone stores, after its own loads."""
    step, qmax = tl.load(step_ptr), tl.load(qrange_ptr + 1).to(tl.float32)
    gamma, seen = tl.load(gamma_ptr), tl.load(seen_ptr)
    if ALWAYS or step != tl.load(observed_step_ptr):
        gamma = ranges.moved_gamma(gamma, tl.load(beyond_ptr), seen, ALPHA, qmax, stride, smallest)
        seen = seen * 0
        tl.store(gamma_ptr, gamma)
        tl.store(beyond_ptr, seen)
    tl.store(observed_step_ptr, step)
    largest = ranges.largest_magnitude(tl.load(low_ptr), tl.load(high_ptr))
    tl.store(seen_ptr, tl.where(largest > 0.0, seen + numel, seen))
    limit = gamma * largest
    tl.store(limit_ptr, limit)
    tl.store(scale_ptr, tl.div_rn(limit, qmax))


def advance_range(qrange, step, always, momentum, low, high, new_low, new_high, observed_step, scale, zero_point):
    """The moving average of the range takes in what was seen since, once per step; then the grid of it."""
    state = (low, high, new_low, new_high, observed_step, scale, zero_point if zero_point.numel() else None)
    launch(advance_range_kernel, 1, qrange, step, *state, momentum, 1 - momentum, ALWAYS=always)


def advance_interval(
    low,
    high,
    qrange,
    step,
    always,
    numel,
    alpha,
    stride,
    smallest,
    gamma,
    beyond,
    seen,
    observed_step,
    limit,
    scale,
):
    """gamma moves by at most one stride per step; then the interval of g: see fastqat.ops.schema."""
    state = (gamma, beyond, seen, observed_step, limit, scale)
    arguments = (low, high, qrange, step, *state, numel, stride, smallest)
    launch(advance_interval_kernel, 1, *arguments, ALPHA=alpha, ALWAYS=always)
