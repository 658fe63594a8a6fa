"""Oscillation tracking and freezing in Triton: twin of csrc/oscillation.h, with the same names in the same order.

All functions work element by element on tensors that broadcast against each other; what a word means is said in
fastqat/ops/words.py, and fastqat/ops/multi_tensor.py defines the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# 1.5 * 2^52: adding and subtracting it rounds a float64 of at most 2^51 to an integer, ties to even.
_ROUNDER = tl.constexpr(6755399441055744.0)
kLargestGrowth = tl.constexpr(2.0**60)
kNone, kUp, kDown = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # directions
kSettled = tl.constexpr(4)  # flags of a weight that is at its frozen code; above: pending


@triton.jit
def kCodeBits(dtype: tl.constexpr):
    """Bits of the index in a word of a dtype."""
    return 5 if dtype == tl.uint8 else 8


@triton.jit
def index_of(word):
    """Index of the code in a word: code - qmin. int32."""
    return word.to(tl.int32) & ((1 << kCodeBits(word.dtype)) - 1)


@triton.jit
def flags_of(word):
    """Direction, and 4 where frozen. int32."""
    return word.to(tl.int32) >> kCodeBits(word.dtype)


@triton.jit
def make_word(index, flags, dtype: tl.constexpr):
    """A word of the dtype. index, flags: int32."""
    return (index | (flags << kCodeBits(dtype))).to(dtype)


@triton.jit
def power(base, exponent):
    """base^exponent by repeated squaring. base: float64 scalar; exponent: int64 scalar."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


class Moment(NamedTuple):
    """One step of tracking, as all weights of a tensor see it; for the meaning of the fields see csrc/oscillation.h."""

    acts: tl.tensor
    first: tl.tensor
    activates: tl.tensor
    sweeps: tl.tensor
    rescale: tl.tensor
    threshold: tl.tensor
    growth: tl.tensor
    increment: tl.tensor
    previous_growth: tl.tensor
    decay: tl.tensor
    previous_decay: tl.tensor


@triton.jit
def moment(step, clock_ptr, threshold, MOMENTUM: tl.constexpr):
    """What a step means. step: int64, threshold: float32 scalars; clock: float64 [3]."""
    limit = threshold.to(tl.float64)
    previous_threshold = tl.load(clock_ptr + 2)
    tracked = tl.load(clock_ptr + 1)
    elapsed = step - tracked.to(tl.int64)
    first = tracked < 0
    passed = power(tl.full((), 1.0 / (1.0 - MOMENTUM), tl.float64), elapsed)
    growth = tl.where(first, 1.0, tl.load(clock_ptr) * passed)
    too_large = growth > kLargestGrowth
    rescale = tl.where(too_large, 1.0 / growth, 1.0)
    growth = tl.where(too_large, 1.0, growth)
    activates = (limit > 0) & (previous_threshold <= 0)
    falls = (limit > 0) & (limit * passed < previous_threshold)  # faster than a frequency decays
    before = growth * tl.full((), 1.0 - MOMENTUM, tl.float64)
    return Moment(
        elapsed != 0,  # a step that was set back begins where it is
        first,
        activates,
        too_large | activates | falls,
        rescale.to(tl.float32),
        threshold,
        growth,
        (tl.full((), MOMENTUM, tl.float64) * growth).to(tl.float32),
        before.to(tl.float32),
        (1.0 / growth).to(tl.float32),
        1.0 / before,
    )


class Tracked(NamedTuple):
    """A weight and its state, taken apart: int32, int32, float32, float32.

    While it is pending, `average` is the index of its own code in that step.
    """

    index: tl.tensor
    flags: tl.tensor
    frequency: tl.tensor
    average: tl.tensor


class Event(NamedTuple):
    """What a step counts of a weight."""

    changes: tl.tensor
    oscillates: tl.tensor
    freezes: tl.tensor


@triton.jit
def frozen_index(index, deviation, qmin, qmax):
    """The index of the code nearest to an average, of two the even code; for the rest see csrc/oscillation.h.

    index: int32; deviation: float64; qmin, qmax: float32 scalars.
    """
    low, high = qmin.to(tl.float64), qmax.to(tl.float64)
    mean = low + index.to(tl.float64) + deviation
    mean = tl.where(mean > low, mean, low)
    mean = tl.where(mean < high, mean, high)
    return (((mean + _ROUNDER) - _ROUNDER) - low).to(tl.int32)


@triton.jit
def record(weight, now, number, at, qmin, qmax, USE_AVERAGE: tl.constexpr):
    """The index that a weight has in this step, its new state, and what is counted.

    now: int32, index of its own code; number: it is no NaN. A weight that is frozen here has its own code until the
    next step, where the frozen one, which its word has already, is a change against it.
    """
    free = weight.flags < kSettled
    pending = weight.flags > kSettled
    direction = weight.flags & 3
    index = tl.where(free, now, weight.index)
    last = tl.where(pending, weight.average, weight.index.to(tl.float32))
    changes = number & (index.to(tl.float32) != last) & (free | pending)
    way = tl.where(index.to(tl.float32) > last, kUp, kDown)
    oscillates = changes & (direction != kNone) & (way != direction)
    frequency = weight.frequency * at.rescale
    frequency = tl.where(oscillates, frequency + at.increment, frequency)

    average = weight.average * at.rescale
    limit = tl.where(at.threshold > 0, at.threshold, float("inf"))
    due = free & number & tl.where(at.sweeps, True, changes) & (frequency * at.decay > limit)
    frozen = index
    if USE_AVERAGE:
        mean = frozen_index(weight.index, average.to(tl.float64) * at.previous_decay, qmin, qmax)
        frozen = tl.where(at.activates, index, mean)
    average = tl.where(changes, average + (weight.index - index).to(tl.float32) * at.previous_growth, average)
    average = tl.where(at.activates, 0.0, average)
    average = tl.where(due, index.to(tl.float32), tl.where(free, average, weight.average))
    flags = tl.where(changes, way, direction) | (weight.flags & kSettled) | tl.where(due, kSettled, 0)
    flags = tl.where(number & (weight.flags >= kSettled), kSettled, flags)

    index = tl.where(at.first, now, index)
    later = Tracked(
        tl.where(at.first, now, tl.where(number, tl.where(due, frozen, index), weight.index)),
        tl.where(at.first, kNone, flags),
        tl.where(at.first, 0.0, frequency),
        tl.where(at.first, 0.0, average),
    )
    event = Event(
        tl.where(at.first, False, changes), tl.where(at.first, False, oscillates), tl.where(at.first, False, due)
    )
    return index, later, event
