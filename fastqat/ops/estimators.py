"""Gradient estimators: which there are, and what the kernels call them.

An estimator replaces the derivative of rounding, 1 in the straight-through estimator, by a factor E. With r = x / s,
f = r - rint(r), level = code - z and the mask of the straight-through estimator::

    dx = g * E   inside, 0 outside            ds = sum g * (level - E * r)   inside, g * level outside

E is the same float32 on every backend, but for that of the sigmoid: it is within 6 + 1.25 k units in the last place of
float64 for slopes k up to 80, and within 1e-30 beyond.
"""

from __future__ import annotations

import math

# Name -> (number in the kernels, default strength). The twin of the numbers is csrc/estimators.h.
ESTIMATORS: dict[str, tuple[int, float | None]] = {
    "ste": (0, None),  # E = 1
    "ewgs": (1, 0.2),  # E = 1 + delta * sign(g) * f                                       delta, in steps of the grid
    "sigmoid": (2, 1.0),  # E = (k/2) / tanh(k/2) * sech(k * (1/2 - |f|))^2, k = a / 2     a
    "dsq": (2, 0.2),  # the same with k = ln(2 / alpha - 1)                                alpha
    "psg": (3, 1.0),  # E = lambda * |x - y|                                               lambda
    "pact": (4, None),  # E = 1, and ds = 0 inside
    "stochastic": (5, None),  # E = 1 about floor(r + u), u uniform, in training
}
STE, EWGS, SIGMOID, PSG, PACT, STOCHASTIC = range(6)


def kernel_strength(estimator: str, strength: float) -> float:
    """The parameter of the kernel for an estimator's strength: the slope k of a sigmoid, else the strength itself."""
    if estimator == "sigmoid":
        return strength / 2
    return math.log(2 / strength - 1) if estimator == "dsq" else strength
