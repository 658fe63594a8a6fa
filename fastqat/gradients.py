"""Quantization of gradients: an identity whose backward pass quantizes, and the grids that follow a gradient.

A layer y = W x has two products in its backward pass, dx = W^T g and dW = g x^T. Quantized once, where it comes in, g
is the same in both: what a machine with integer products would multiply.

Symmetric grids cover [-c, c] with c = gamma * max|g| (LBT: Kim et al., Toward INT4 fixed-point training via exploring
quantization error for gradients, ECCV 2024). Codes are those of the zero-point grid, s = c / qmax: the released code
counts from -c, which differs at ties alone, and noise leaves none. Affine grids cover a range that follows the data
(Fournarakis and Nagel, In-hindsight quantization range estimation, 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastqat.one_tensor import Grid, Observed, Options, quantized

_ops = torch.ops.fastqat


class Interval(NamedTuple):
    """State of a symmetric grid, changed in place.

    Args:
        gamma, limit, scale: float32 [1]; limit = gamma * max|g|.
        beyond, seen: int64 [1], elements beyond the limit, and all of them, since gamma last moved.
        observed_step: int64 [1], the step at which it did.
    """

    gamma: Tensor
    limit: Tensor
    scale: Tensor
    beyond: Tensor
    seen: Tensor
    observed_step: Tensor


class Range(NamedTuple):
    """State of an affine grid, changed in place.

    Args:
        low, high: float32 [1], of the grid in use; new_low, new_high: what was seen since.
        scale, zero_point: float32 [1].
        observed_step: int64 [1], the step that the grid is of.
    """

    low: Tensor
    high: Tensor
    new_low: Tensor
    new_high: Tensor
    scale: Tensor
    zero_point: Tensor
    observed_step: Tensor


class Time(NamedTuple):
    """When a gradient is quantized.

    Args:
        step: int64 [1]; noise depends on it, and state moves once per value of it.
        always: state moves with every gradient, as no optimizer counts the steps.
    """

    step: Tensor
    always: bool


class Rule(NamedTuple):
    """How gamma moves: by +-stride, towards a fraction alpha / (2 qmax + 1) of elements beyond; not below smallest."""

    alpha: float
    stride: float
    smallest: float


def quantize_in_interval(
    g: Tensor, state: Interval, qrange: Tensor, time: Time, rule: Rule, options: Options
) -> Tensor:
    """Quantize a gradient on the symmetric grid of its own largest magnitude, and count what lies beyond it.

    Two reads of g and one write. All-zero gradients and those without a finite value leave gamma as it is. +-Inf
    saturates, but for float16: there one such value makes the whole result NaN, as loss scaling has to see it.

    Args:
        g: float32, bfloat16 or float16, any shape and strides; it stays as it is.
        state: see :class:`Interval`.
        qrange: int32 [2], -qmax and qmax.
        time, rule: see :class:`Time`, :class:`Rule`.
        options: of the rounding; see :class:`fastqat.one_tensor.Options`.

    Returns:
        like g, dense.
    """
    low, high = _extremes(g)
    _ops.advance_interval(
        low,
        high,
        qrange,
        time.step,
        time.always,
        g.numel(),
        *rule,
        state.gamma,
        state.beyond,
        state.seen,
        state.observed_step,
        state.limit,
        state.scale,
    )
    # Extremes that are not finite make an offset of NaN, any others one of 0, which changes nothing.
    offset = (low - low) + (high - high) if g.dtype == torch.float16 else None
    grid = Grid(state.scale, None, offset, qrange)
    return quantized(g, grid, time.step, options, Observed(limit=state.limit, beyond=state.beyond)).y


def quantize_in_range(
    g: Tensor, state: Range, qrange: Tensor, time: Time, momentum: float, in_hindsight: bool, options: Options
) -> Tensor:
    """Quantize a gradient on the affine grid of the moving average of its range, which includes g itself or does not.

    In hindsight it is one read and one write, and what the pass sees counts from the next step on. Values that are not
    finite are as for :func:`quantize_in_interval`.

    Args:
        g, time, options: see there.
        state: see :class:`Range`.
        qrange: int32 [2], from 0.
        momentum: of the average.
        in_hindsight: the grid is that of the gradients before g.
    """
    observed = Observed(state.new_low, state.new_high)
    if not in_hindsight:
        low, high = _ops.minmax(g, None)
        state.new_low.copy_(low)
        state.new_high.copy_(high)
        observed = Observed()
    _ops.advance_range(
        qrange,
        time.step,
        time.always,
        momentum,
        state.low,
        state.high,
        state.new_low,
        state.new_high,
        state.observed_step,
        state.scale,
        state.zero_point,
    )
    y = quantized(g, Grid(state.scale, state.zero_point, None, qrange), time.step, options, observed).y
    # 0 times the sum is NaN where anything is not finite: float32 holds every sum of float16.
    return y.add_(g.sum(dtype=torch.float32) * 0) if g.dtype == torch.float16 else y


def _extremes(g: Tensor) -> tuple[Tensor, Tensor]:
    """Extremes as float32 [1]: of the finite values, but of all values of a float16 gradient."""
    if g.dtype != torch.float16:
        return _ops.minmax(g, None)
    low, high = torch.aminmax(g)
    return low.float().view(1), high.float().view(1)


def initial_gamma(g: Tensor, rule: Rule, qmax: int) -> Tensor:
    """The gamma at which a fraction alpha / (2 qmax + 1) of a gradient lies beyond gamma * max|g|, float32 [1].

    That is where LBT's updates come to rest (section 4.3), taken from the quantile instead of walking there.

    Args:
        g: with finite values, any shape.
        rule: its alpha and its smallest gamma.
        qmax: largest code.
    """
    magnitude = g.detach().float().abs().nan_to_num(0.0, 0.0, 0.0).flatten()
    beyond = int(magnitude.numel() * rule.alpha / (2 * qmax + 1))
    limit = magnitude.kthvalue(magnitude.numel() - beyond).values
    return (limit / magnitude.amax()).nan_to_num(1.0).clamp(rule.smallest, 1.0).view(1)


def most_similar_gamma(g: Tensor, qrange: Tensor, candidates: int) -> Tensor:
    """The gamma whose quantized gradient has the direction nearest to that of g, float32 [1].

    The clipping value of DSGC (Zhu et al., Towards unified INT8 training, CVPR 2020) minimises 1 - cos(g, Q(g)). It is
    chosen here among ``candidates`` values k / candidates on the device, and rounded to nearest: a golden section would
    wait for each cosine.

    Args:
        g: with finite values, any shape.
        qrange: int32 [2], -qmax and qmax.
        candidates: how many.
    """
    flat = g.detach().float().flatten().nan_to_num(0.0, 0.0, 0.0)
    flat = flat / flat.abs().amax()  # squares of tiny gradients would vanish
    gammas = torch.arange(1, candidates + 1, device=g.device, dtype=torch.float32) / candidates
    cosines = []
    for scale in (gammas / qrange[1]).split(1):
        q = _ops.fake_quantize(flat, scale, None, None, qrange, None, SMALLEST_SCALE, None)
        cosines.append(torch.dot(flat, q) / q.square().sum().sqrt())
    best = torch.stack(cosines).nan_to_num(-torch.inf).argmax()
    return gammas.index_select(0, best.view(1))  # an index would be read back


def large_error(g: Tensor, quantized: Tensor, alpha: float) -> Tensor:
    """E(G_L), the mean error of large gradients in units of the largest: LBT, section 4.2. float32 [1].

    E(G_L) = mean of |g - Q(g)| over the top fraction alpha of |g|, over max|g|

    Args:
        g, quantized: of one shape.
        alpha: that fraction; at least one element is large.
    """
    magnitude = g.detach().double().abs().flatten()
    count = max(int(magnitude.numel() * alpha), 1)
    largest = magnitude.topk(count)
    error = (g.detach().double() - quantized.double()).abs().flatten()[largest.indices]
    return (error.mean() / largest.values[0]).float().view(1)


SMALLEST_SCALE = 2.0**-126  # floor of a gradient's scale: the smallest normal float32, as gradients may be tiny


def with_quantized_gradient(y: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """Return y itself, to the values; in the backward pass its gradient is quantized.

    Args:
        y: any tensor that needs a gradient.
        quantize: called with the gradient, without a graph; returns one like it.
    """
    return _QuantizedGradient.apply(y, quantize)


class _QuantizedGradient(torch.autograd.Function):
    """Saves nothing. What is quantized is the state's of the backward pass, which is computed once."""

    @staticmethod
    def forward(ctx, y, quantize):
        ctx.quantize = quantize
        ctx.set_materialize_grads(False)
        return y.detach()  # no view of y to autograd: it may be changed in place, as a ReLU does

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return None, None
        if torch.is_grad_enabled():  # create_graph=True
            return _StraightThrough.apply(g, ctx.quantize), None
        return ctx.quantize(g), None


class _StraightThrough(torch.autograd.Function):
    """Quantization as a function of its own, whose derivative is taken to be 1."""

    @staticmethod
    def forward(ctx, g, quantize):
        return quantize(g)

    @staticmethod
    def backward(ctx, g):
        return g, None
