"""Weights for the ops of two bit-widths, and an oracle of DoReFa's in numpy that calls no code of fastqat.

Values are of float32, every product, sum and quotient rounded by itself; sums of codes are integers of Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cases
import numpy as np
import oracle
import torch
from oracle import F32, F64, Within
from torch import Tensor

TANH_P = (0.99999994, 0.12919264, 0.0029207976, 9.267716e-06, -1.2781207e-08, 1.8256886e-11)
TANH_Q = (1.0, 0.46252546, 0.023763318, 0.00022810494)
BITS = ((3, 2), (1, 8), (4, 3), (8, 7), (2, 1), (5, 6), (7, 4))


@dataclass(frozen=True)
class Weight:
    """A weight, its extremes, and what is wanted: bit-widths, dtypes of the values (None: not asked for), sums."""

    label: str
    x: Tensor
    low: Tensor
    high: Tensor
    bits: tuple[int, int] = (3, 2)
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (torch.float32, torch.float32)
    sums: bool = True

    @property
    def qmax(self) -> Tensor:
        """2^bits - 1 of both widths."""
        return torch.tensor([2**b - 1 for b in self.bits], dtype=torch.int32)


def weight_of(label: str, x: Tensor, number: int = 0, plain: bool = False) -> Weight:
    """A weight of which more or less is wanted, by the number of the case."""
    low, high = oracle.minmax(x, None)
    if plain:
        return Weight(label, x, low, high, dtypes=(x.dtype, x.dtype))
    dtypes = (x.dtype, *cases.DTYPES)
    wanted = (dtypes[number % 4], None if number % 3 == 2 else dtypes[number // 2 % 4])
    label = f"{label} {x.dtype} -> {wanted} number {number}"
    return Weight(label, x, low, high, BITS[number % 7], wanted, number % 4 != 1)


def spoiled(values: Tensor, number: int) -> Tensor:
    """What weights may be besides ordinary: with several largest magnitudes, not finite, all 0, tiny, huge."""
    flat = values.flatten()
    if flat.numel() == 0:
        return values
    kind = number % 9
    if kind in (1, 6):  # ties of both signs, also at both ends
        largest = flat.abs().max()
        flat[:: max(flat.numel() // 5, 1)] = largest
        flat[-1] = -largest
    elif kind == 2:
        flat[0], flat[flat.numel() // 2], flat[-1] = torch.nan, torch.inf, -torch.inf
    elif kind == 3:
        flat.zero_()
    elif kind == 4:
        flat *= 1e-15 if flat.dtype != torch.float16 else 1e-4
    elif kind == 5:
        flat *= 40.0
    return flat.view(values.shape)


def weights(dtype: torch.dtype, few: bool) -> Iterator[Weight]:
    """Every shape in every layout, the kinds of spoiled() by turns."""
    turn = cases.DTYPES.index(dtype)
    shapes = cases.FEW_SHAPES[turn : turn + 1] + cases.TURN_SHAPES[turn::3] if few else cases.SHAPES
    number = turn
    for shape in shapes:
        for layout in cases.LAYOUTS[number % 2 :: 2] if few else cases.LAYOUTS:
            values = spoiled((cases.random(shape, number) * 0.4).to(dtype), number)
            if (x := cases.with_layout(values, layout)) is not None:
                yield weight_of(f"shape {shape} {layout}", x, number)
            number += 1


def polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    result = np.full_like(x, F32(coefficients[-1]))
    for c in reversed(coefficients[:-1]):
        result = (result * x).astype(F32) + F32(c)
    return result


def tanh(x: np.ndarray) -> np.ndarray:
    """tanh(x) = x P(x^2) / Q(x^2) of float32 within [-9, 9]."""
    x = np.clip(x, F32(-9), F32(9))
    square = x * x
    return np.clip(x * polynomial(TANH_P, square) / polynomial(TANH_Q, square), F32(-1), F32(1))


def normalizer(low: Tensor, high: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """max|x| of finite values, or 0, and what tanh(x) is divided by. 0-dim."""
    m = np.maximum(np.abs(low.numpy()), np.abs(high.numpy())).reshape(())
    m = np.where(np.isfinite(m), m, F32(0))
    return m, np.where(m > 0, tanh(m), F32(1)).astype(F32)


def codes(x: Tensor, low: Tensor, high: Tensor, n: int) -> np.ndarray:
    """r = clamp(rint(u n/2 + n/2), 0, n), ties to even; NaN stays NaN."""
    u = tanh(oracle.as_float32(x)) / normalizer(low, high)[1]
    half = F32(n) / F32(2)
    return np.clip(np.rint((u * half).astype(F32) + half), F32(0), F32(n))


def dorefa_fake_quantize(weight: Weight) -> tuple[Tensor, ...]:
    """Sums (of the widths that are asked for; [2, 2] or empty), first, second."""
    sums, values = [[0, 0], [0, 0]], []
    with np.errstate(all="ignore"):
        for k, dtype in enumerate(weight.dtypes):
            if dtype is None:
                values.append(torch.empty(0))
                continue
            n = int(weight.qmax[k])
            r = codes(weight.x, weight.low, weight.high, n)
            values.append(oracle.rounded_to(((F32(2) * r - F32(n)) / F32(n)).astype(F32), dtype))
            counted = np.where(np.isnan(r), F32(0), r).astype(np.int64).reshape(-1)
            sums[k] = [int(counted.sum()), int((counted * counted).sum())]
    return torch.tensor(sums if weight.sums else [], dtype=torch.int64), *values


def dorefa_fake_quantize_backward(g: Tensor, weight: Weight, factor: float) -> Within:
    """dx: equal where |x| < m; where |x| = m to 1e-6 of the sum of absolute terms, and the roundings after it."""
    x, wide = oracle.as_float32(weight.x), oracle.as_float32(g)
    finite = np.isfinite(x)
    x, wide = np.where(finite, x, F32(0)), np.where(finite, wide, F32(0))
    with np.errstate(all="ignore"):
        m, largest = normalizer(weight.low, weight.high)
        t, tied = tanh(x), np.abs(x) == m
        terms, ties = wide.astype(F64) * (t / largest).astype(F64), max(int(tied.sum()), 1)
        share = F32(terms.sum() / ties)
        slope = ((F32(1) - t * t) / largest) * F32(factor)
        rest = wide - np.where(tied, np.sign(x) * share, F32(0))
        dx = np.where(m > 0, slope * rest, F32(0))
        exact = oracle.rounded_to(dx, weight.x.dtype).double()
        bound = np.abs(slope) * (1e-6 * np.abs(terms).sum() / ties + 2.0**-22 * (np.abs(wide) + np.abs(share)))
        if weight.x.dtype != torch.float32:
            bound = bound + np.abs(dx) * 2.0**-7 + 2.0**-24
        bound = np.where(tied & (m > 0), bound + 2.0**-149, 0.0)
    return Within(exact, torch.from_numpy(np.asarray(bound, F64)))
