"""Gradient estimators in Triton: twin of csrc/estimators.h, with the same names in the same order.

The numbers are those of fastqat/ops/estimators.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton.math import round_even

kSte, kEwgs, kSigmoid, kPsg, kPact, kStochastic = (tl.constexpr(number) for number in range(6))


@triton.jit
def exp_of_minus(v):
    """e^-v for v in [0, 80], within 2 units in the last place."""
    n = round_even(v * -1.44269504)
    rest = tl.fma(n, -0.693145752, -v)  # log 2 in two parts
    rest = tl.fma(n, -1.42860677e-6, rest)
    p = tl.fma(rest, 1.98756915e-4, 1.39819994e-3)
    p = tl.fma(p, rest, 8.33345205e-3)
    p = tl.fma(p, rest, 4.16657962e-2)
    p = tl.fma(p, rest, 1.66666657e-1)
    p = tl.fma(p, rest, 0.5)
    p = tl.fma(p, rest * rest, rest) + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid_peak(k):
    """(k/2) / tanh(k/2): the derivative of the sigmoid of slope k at a threshold."""
    e = exp_of_minus(tl.where(k < 80.0, k, 80.0))  # NaN too, which no integer holds
    series = 1.0 + k * k * (1.0 / 12.0) * (1.0 - k * k * (1.0 / 60.0))  # where 1 - e^-k has lost its digits
    return tl.where(k < 0.25, series, tl.div_rn(0.5 * k * (1.0 + e), 1.0 - e))


@triton.jit
def estimator_factor(g, r, scale, strength, ESTIMATOR: tl.constexpr):
    """The factor E on the gradient g of an element. r = x / s; strength: scalar."""
    f = r - round_even(r)
    if ESTIMATOR == kEwgs:
        sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
        return 1.0 + strength * sign * f
    elif ESTIMATOR == kSigmoid:
        # sech(v)^2 = 4 q / (1 + q)^2 with q = e^-2v
        v = 2.0 * strength * (0.5 - tl.abs(f))
        v = tl.where(v > 0.0, v, 0.0)  # NaN too, as x may be
        q = exp_of_minus(tl.where(v < 80.0, v, 80.0))
        return tl.div_rn(sigmoid_peak(strength) * 4.0 * q, (1.0 + q) * (1.0 + q))
    else:
        tl.static_assert(ESTIMATOR == kPsg)
        return strength * (tl.abs(f) * scale)
