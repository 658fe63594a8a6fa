"""The scalar truth in Triton: twin of csrc/math.h, with the same names in the same order.

All functions work element by element on float32 tensors that broadcast against each other. A level is a code relative
to the zero point: level = code - z, clamped to [low, high] = [qmin - z, qmax - z]. On the offset grid z = 0, and x is
shifted by o before and after. FAST, OFFSET and ROUNDED are math.h's template parameters.

No bare ``/`` on float32 (Triton's is approximate), and kernels are launched without contraction (see launch.py).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# 1.5 * 2^23: adding and subtracting it rounds |v| <= 2^22 to an integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


class Channel(NamedTuple):
    """Constants of one scale; for the meaning of the fields see csrc/math.h."""

    scale: tl.tensor
    reciprocal: tl.tensor
    low: tl.tensor
    high: tl.tensor
    shift: tl.tensor
    below: tl.tensor
    above: tl.tensor


# Scales in [2^-40, 2^40] may use the three-step quotient; all others divide.
kSmallestFastScale = tl.constexpr(2.0**-40)
kLargestFastScale = tl.constexpr(2.0**40)


@triton.jit
def round_even(v):
    """rint(v) for |v| <= 2^22; NaN stays NaN. Everything here is clamped to a few levels before it is rounded."""
    return (v + _ROUNDER) - _ROUNDER


@triton.jit
def clamp(v, low, high):
    """v clamped to [low, high]; NaN stays NaN."""
    return tl.minimum(tl.maximum(v, low, propagate_nan=_KEEP_NAN), high, propagate_nan=_KEEP_NAN)


@triton.jit
def clipped(x, clip):
    """x as a ReLU (clip: inf) or a ReLU6 (clip: 6) leaves it; NaN stays NaN."""
    return clamp(x, 0.0, clip)


@triton.jit
def passes_clip(x, clip):
    """Where its derivative is 1."""
    return (x > 0.0) & (x < clip)


@triton.jit
def is_fast_scale(scale):
    """True if the three-step quotient is exact for this scale."""
    return (scale >= kSmallestFastScale) & (scale <= kLargestFastScale)


@triton.jit
def make_channel(scale, eps, zero_point, offset, OFFSET: tl.constexpr, qmin, qmax):
    """Channel of scale max(scale, eps) and zero point clamp(rint(zero_point), qmin, qmax); NaN where one of them is."""
    scale = tl.where(scale < eps, eps, scale).to(tl.float32)
    if OFFSET:
        zero = 0.0
    else:
        has_zero = zero_point == zero_point
        scale = tl.where(has_zero, scale, float("nan"))
        zero = round_even(clamp(tl.where(has_zero, zero_point, 0.0), qmin, qmax))  # integer bounds: the same value
    low = qmin - zero
    high = qmax - zero
    shift = offset if OFFSET else zero
    return Channel(scale, tl.div_rn(1.0, scale), low, high, shift, scale * (low - 1.0), scale * (high + 1.0))


@triton.jit
def quotient(t, ch, FAST: tl.constexpr):
    """RN(t / scale); FAST: for t clamped to [below, above] and a fast scale (the proof is in csrc/math.h)."""
    if FAST:
        q = t * ch.reciprocal
        e = tl.fma(-q, ch.scale, t)
        return tl.fma(e, ch.reciprocal, q)
    else:
        return tl.div_rn(t, ch.scale)


@triton.jit
def ratio(t, ch, FAST: tl.constexpr):
    """t / scale, saturated one level beyond the range; NaN stays NaN. t: x, or x - o on the offset grid."""
    if FAST:
        return quotient(clamp(t, ch.below, ch.above), ch, FAST)
    else:
        return clamp(quotient(t, ch, FAST), ch.low - 1.0, ch.high + 1.0)


@triton.jit
def level(t, ch, FAST: tl.constexpr):
    """clamp(rint(t / scale), low, high); NaN stays NaN."""
    if FAST:
        return round_even(quotient(clamp(t, ch.scale * ch.low, ch.scale * ch.high), ch, FAST))
    else:
        return round_even(clamp(quotient(t, ch, FAST), ch.low, ch.high))


@triton.jit
def shifted(x, ch, OFFSET: tl.constexpr):
    """x; x - o on the offset grid."""
    return x - ch.shift if OFFSET else x


@triton.jit
def value(lev, ch, OFFSET: tl.constexpr):
    """s * level; s * level + o with two roundings on the offset grid."""
    y = ch.scale * lev
    return y + ch.shift if OFFSET else y


@triton.jit
def fake_quantize(x, ch, FAST: tl.constexpr, OFFSET: tl.constexpr):
    """x rounded to the grid."""
    return value(level(shifted(x, ch, OFFSET), ch, FAST), ch, OFFSET)


@triton.jit
def quantize(x, ch, FAST: tl.constexpr, OFFSET: tl.constexpr):
    """The integer code; that of NaN is the zero point."""
    lev = level(shifted(x, ch, OFFSET), ch, FAST)
    lev = tl.where(lev == lev, lev, clamp(0.0, ch.low, ch.high))  # NaN in x or in the scale
    return lev if OFFSET else lev + ch.shift


@triton.jit
def dequantize(code, ch, OFFSET: tl.constexpr):
    """The value of an integer code."""
    return value(code if OFFSET else code - ch.shift, ch, OFFSET)


class Gradient(NamedTuple):
    """What one element adds to the gradients; for the meaning of the fields see csrc/math.h."""

    dx: tl.tensor
    scale: tl.tensor
    outside: tl.tensor


@triton.jit
def _ratio_with_sign(t, ch, FAST: tl.constexpr):
    """ratio() that is 0 only where RN(t / scale) is: a bound of the unrounded mask may be 0.

    Below about 2^-100 the remainder in quotient() is no longer exact, so t is taken away from there.
    """
    if FAST:
        return quotient(clamp(t, ch.below, ch.above) * 2.0**64, ch, FAST) * 2.0**-64
    else:
        return ratio(t, ch, FAST)


@triton.jit
def _gradient_unit(ch):
    """1 for a fast scale, else a power of two near 1 / scale, which keeps the terms of ds away from 0 and Inf.

    A departure from csrc/math.h, which divides in float64 there: that took 60 more registers in every thread.
    """
    exponent = (ch.scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = ((254 - tl.minimum(tl.maximum(exponent, 1), 253)) << 23).to(tl.float32, bitcast=True)
    return tl.where(is_fast_scale(ch.scale), 1.0, power)


@triton.jit
def grad_scale_divisor(ch):
    """What the sum of Gradient.scale must be divided by. float64."""
    return (ch.scale * _gradient_unit(ch)).to(tl.float64)


class Extras(NamedTuple):
    """What tracking, an estimator and dampening change in the gradient of an element; None: nothing."""

    held: tl.tensor | None  # level of a frozen weight, which passes nothing to x; NaN: not frozen
    factor: tl.tensor | None  # of the estimator, in the place of the derivative of rounding
    dampening: tl.tensor | None  # k: adds k * (x - y) to dx inside the range
    drawn: tl.tensor | None  # what stochastic rounding makes of t / scale


@triton.jit
def fake_quantize_backward(
    g,
    x,
    ch,
    FAST: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    extras,
    WITHIN: tl.constexpr,
):
    """Gradient of one element; the term of ds is multiplied by grad_scale_divisor().

    extras: Extras; WITHIN: whether a value inside the range adds to ds.
    """
    t = shifted(x, ch, OFFSET)
    r = ratio(t, ch, FAST) if ROUNDED else _ratio_with_sign(t, ch, FAST)
    k = round_even(r) if extras.drawn is None else extras.drawn
    tested = k if ROUNDED else r
    inside = (tested >= ch.low) & (tested <= ch.high)
    lev = tl.minimum(tl.maximum(k, ch.low), ch.high)  # NaN becomes the lowest level, so that no term is NaN
    in_range = (t >= ch.scale * ch.low) & (t <= ch.scale * ch.high)
    if extras.held is not None:
        free = extras.held != extras.held
        inside, in_range = inside & free, in_range & free
        lev = tl.where(free, lev, extras.held)
    valid = tl.where(x == x, g, 0.0)
    passed = tl.where(inside, t, 0.0)
    unit = 1.0 if FAST else _gradient_unit(ch)
    dx = g
    used = passed * unit
    if extras.factor is not None:
        factor = tl.where(inside, extras.factor, 1.0)  # outside it may be NaN
        used = factor * (passed * unit)
        dx = g * extras.factor
    slope = tl.fma(lev, ch.scale * unit, -used)
    if extras.factor is not None:
        slope -= tl.fma(factor, passed * unit, -used)  # what the product was rounded by
    if not WITHIN:
        slope = tl.where(inside, 0.0, slope)
    dx = tl.where(inside, dx, 0.0)
    if extras.dampening is not None:
        distance = tl.where(r == r, tl.fma(-lev, ch.scale, t), float("nan"))  # Inf / Inf has no level
        pull = tl.where(extras.dampening != 0.0, extras.dampening * distance, 0.0)
        dx = tl.where(in_range, dx + pull, dx)
    return Gradient(dx, valid * slope, tl.where(inside, 0.0, valid))


class Philox(NamedTuple):
    """Four 32-bit numbers of one counter."""

    lane0: tl.tensor
    lane1: tl.tensor
    lane2: tl.tensor
    lane3: tl.tensor


@triton.jit
def philox(seed, block, step, tensor_id):
    """Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (block low, block high, step, tensor id).

    seed: 64-bit scalar; block: int64 [n]; step, tensor_id: uint32 [n].
    """
    c0, c1, c2, c3 = tl.philox(seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), step, tensor_id)
    return Philox(c0, c1, c2, c3)


@triton.jit
def uniform(bits):
    """In [0, 1), a multiple of 2^-24. bits: uint32."""
    return (bits >> 8).to(tl.float32) * 2.0**-24
