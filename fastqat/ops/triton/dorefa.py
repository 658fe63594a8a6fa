"""DoReFa's weights: csrc/dorefa.h in Triton, the same names in the same order.

All functions work element by element on float32 tensors; fastqat/ops/two_widths.py defines them. FAST is dorefa.h's
template parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastqat.ops.triton.math import Channel, clamp, make_channel, quotient, round_even
from fastqat.ops.triton.ranges import largest_magnitude

# tanh(x) = x P(x^2) / Q(x^2) up to here, where it is 1.
kTanhEnd = tl.constexpr(9.0)


@triton.jit
def tanh(x):
    """By sums and products that are rounded one by one; NaN stays NaN."""
    x = clamp(x, -kTanhEnd, kTanhEnd)
    square = x * x
    p = 1.8256886e-11 * square + -1.2781207e-08
    p = p * square + 9.267716e-06
    p = p * square + 0.0029207976
    p = p * square + 0.12919264
    p = p * square + 0.99999994
    q = 0.00022810494 * square + 0.023763318
    q = q * square + 0.46252546
    q = q * square + 1.0
    return clamp(tl.div_rn(x * p, q), -1.0, 1.0)


@triton.jit
def divisor(v):
    """What quotient() divides by; nothing else of the channel is of use."""
    return make_channel(v, 0.0, 0.0, 0.0, True, 0.0, 0.0)


class Normalizer(NamedTuple):
    """How one tensor is normalized; for the meaning of the fields see csrc/dorefa.h."""

    m: tl.tensor
    largest: Channel


@triton.jit
def make_normalizer(low, high):
    """low, high: the extremes of the finite values, or +Inf and -Inf where there are none."""
    m = largest_magnitude(low, high)
    return Normalizer(m, divisor(tl.where(m > 0.0, tanh(m), 1.0)))


@triton.jit
def normalized(t, by, FAST: tl.constexpr):
    """u of t = tanh(x). FAST: is_fast_scale(largest.scale)."""
    return quotient(t, by.largest, FAST)


@triton.jit
def dorefa_level(u, n):
    """r = clamp(rint(u n/2 + n/2), 0, n). n: divisor(2^bits - 1). NaN stays NaN."""
    half = n.scale * 0.5
    return round_even(clamp(u * half + half, 0.0, n.scale))


@triton.jit
def dorefa_value(r, n):
    """(2 r - n) / n, correctly rounded."""
    return quotient(2.0 * r - n.scale, n, True)


@triton.jit
def through_largest(x, share):
    """What passes through m of an element with |x| = m, in units of g."""
    return tl.where(x < 0.0, -share, share)


@triton.jit
def dorefa_dx(g, t, through, factor, by, FAST: tl.constexpr):
    """dx of an element with t = tanh(x); 0 instead where m is 0 or x not finite. through: 0, or through_largest()."""
    return quotient(1.0 - t * t, by.largest, FAST) * factor * (g - through)
