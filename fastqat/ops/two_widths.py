"""The definition of the ops on a weight that is wanted at two bit-widths, in plain torch: see :mod:`.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastqat.ops import reference
from fastqat.ops.one_tensor import dense

# tanh(x) = x P(x^2) / Q(x^2) on [-9, 9], lowest coefficient first: a least-squares fit, 7 ulp at most off the truth.
TANH_P = (0.99999994, 0.12919264, 0.0029207976, 9.267716e-06, -1.2781207e-08, 1.8256886e-11)
TANH_Q = (1.0, 0.46252546, 0.023763318, 0.00022810494)
TANH_END = 9.0


def fake_quantize_two_widths(x, scales, zero_points, offsets, qranges, axis, eps, first, second):
    """first, second = fake_quantize of x on either grid."""
    for k, y in enumerate((first, second)):
        zero_point = None if zero_points is None else zero_points[k]
        offset = None if offsets is None else offsets[k]
        reference.fake_quantize(x, scales[k], zero_point, offset, qranges[k], axis, eps, y.dtype, y)


def tanh(x: Tensor) -> Tensor:
    """tanh of float32 by sums and products that are rounded one by one, which every backend does alike. NaN stays."""
    x = x.clamp(-TANH_END, TANH_END)
    square = x * x
    return (x * _polynomial(TANH_P, square) / _polynomial(TANH_Q, square)).clamp(-1.0, 1.0)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result


def largest_tanh(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """m = max(|low|, |high|) of extremes, 0 where there was no finite value; and tanh(m), or 1 where m is 0. 0-dim."""
    m = torch.maximum(low.abs(), high.abs()).view(())
    m = torch.where(m.isfinite(), m, 0.0)
    return m, torch.where(m > 0, tanh(m), 1.0)


def dorefa_fake_quantize(x, low, high, qmax, sums, first, second):
    """y = (2 r - n) / n with r = clamp(rint(u n/2 + n/2), 0, n) and u = tanh(x) / tanh(m); u = tanh(x) where m is 0."""
    _, largest = largest_tanh(low, high)
    u = tanh(x.float()) / largest
    for k, y in enumerate((first, second)):
        if not y.numel():
            continue
        n = qmax[k].float()
        r = (u * (n * 0.5) + n * 0.5).round().clamp(torch.zeros_like(n), n)
        y.copy_((2 * r - n) / n)
        if sums.numel():
            r = torch.where(r.isnan(), 0.0, r).long()
            sums[k] = torch.stack([r.sum(), (r * r).sum()])


def dorefa_fake_quantize_backward(g, x, low, high, factor, dx):
    """dx = f (1 - tanh(x)^2) / tanh(m) * (g - [|x| = m] sign(x) sum(g u) / ties): through rounding as it is, through m.

    What is not finite in x adds to no sum and has dx = 0; where m is 0, dx is 0.
    """
    finite = x.isfinite()
    x, g = torch.where(finite, dense(x).float(), 0.0), torch.where(finite, g.float(), 0.0)
    m, largest = largest_tanh(low, high)
    t = tanh(x)
    tied = x.abs() == m
    terms = g.double() * (t / largest).double()
    share = reference.ordered_sum(terms, None) / tied.sum().clamp(min=1)
    through = torch.where(tied, x.sign() * share.float().view(()), 0.0)
    slope = (1 - t * t) / largest * (factor.view(()) if factor.numel() else 1.0)
    dx.copy_(torch.where(m > 0, slope * (g - through), 0.0))
