"""Fake quantization of activations: one scale per tensor, and one read of it gives all that is wanted.

Where the range is not learned, or is PACT's, the gradient needs one bit of each element (two for PACT): no tensor is
kept for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastqat.autograd import apply_plainly
from fastqat.ops import select  # noqa: F401  (importing it registers the ops)

_ops = torch.ops.fastqat


class Options(NamedTuple):
    """What stays from step to step of the quantization of an activation.

    Args:
        eps: floor of the scale.
        clip: x is clamped to [0, clip] first: inf is a ReLU, 6 a ReLU6; 0 leaves it as it is.
        rounded: the mask is that of the rounded value.
        pact: the scale has the gradient of PACT, which is that of codes from 0 without a zero point.
        code_bits: of the packed codes, which are a second result; 0: none are made.
        seed, tensor_id: of stochastic rounding; tensor_id -1 rounds to nearest.
        grad_scale: factor on PACT's gradient.
        out_dtype: of the result; None is that of x.
    """

    eps: float
    clip: float = 0.0
    rounded: bool = True
    pact: bool = False
    code_bits: int = 0
    seed: int = 0
    tensor_id: int = -1
    grad_scale: float | None = None
    out_dtype: torch.dtype | None = None


class Observed(NamedTuple):
    """What each tensor that is quantized adds to, in place; None is not asked for.

    Args:
        low, high: float32 [1], widened to hold its finite values.
        limit: float32 [1].
        beyond: int64 [1], grows by the number of elements of a magnitude above the limit.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    limit: Tensor | None = None
    beyond: Tensor | None = None


NOTHING = Observed()


class Grid(NamedTuple):
    """The grid of a tensor with one scale.

    Args:
        scale, zero_point, offset: float32 [1]; at most one of the last two.
        qrange: int32 [2].
    """

    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    qrange: Tensor


class Quantized(NamedTuple):
    """What was made of x; the last three are uint8, and empty where they are not wanted (fastqat.ops.schema)."""

    y: Tensor
    inside: Tensor
    above: Tensor
    codes: Tensor


def quantized(
    x: Tensor, grid: Grid, step: Tensor | None, options: Options, observed: Observed = NOTHING, *, bits: bool = False
) -> Quantized:
    """Quantize x without a graph.

    Args:
        x: of a floating dtype, any shape and strides.
        grid: of one scale.
        step: int64 [1], of stochastic rounding; None without it.
        options, observed: what else is wanted.
        bits: make those that a backward pass needs.
    """

    def packed(width: int) -> Tensor:
        return torch.empty((x.numel() * width + 7) // 8, dtype=torch.uint8, device=x.device)

    inside, above, codes = packed(int(bits)), packed(int(bits and options.pact)), packed(options.code_bits)
    y = torch.empty_like(x, dtype=options.out_dtype or x.dtype)
    none = packed(0)
    low, high, limit, beyond = (none if t is None else t for t in observed)
    _ops.fake_quantize_tensor(
        x,
        *grid,
        options.eps,
        options.clip,
        options.rounded,
        options.seed,
        options.tensor_id,
        none if step is None else step,
        limit,
        options.code_bits,
        low,
        high,
        beyond,
        inside,
        above,
        codes,
        y,
    )
    return Quantized(y, inside, above, codes)


def _gradients(
    g: Tensor, inside: Tensor, above: Tensor, qrange: Tensor, layout: Any, dtype: torch.dtype, pact: bool
) -> tuple[Tensor, Tensor]:
    """dx, of a shape and strides and a dtype; PACT's gradient of the scale, else an empty tensor."""
    dx = torch.empty_strided(*layout, dtype=dtype, device=g.device)
    dscale = torch.empty(int(pact), dtype=torch.float32, device=g.device)
    _ops.fake_quantize_tensor_backward(g, inside, above, qrange, dx, dscale)
    return dx, dscale


class _FakeQuantizeTensor(torch.autograd.Function):
    """Saves a bit of each element, two for PACT."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, offset, qrange, step, options, *observed):
        made = quantized(x, Grid(scale, zero_point, offset, qrange), step, options, Observed(*observed), bits=True)
        ctx.save_for_backward(made.inside, made.above, qrange)
        ctx.layout, ctx.dtype = (made.y.shape, made.y.stride()), x.dtype
        ctx.pact, ctx.grad_scale = options.pact, options.grad_scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(made.codes)
        return made.y, made.codes

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * 11
        # Only a second derivative needs a graph of the backward pass itself.
        run = _Gradients.apply if torch.is_grad_enabled() else _gradients
        dx, dscale = run(g, *ctx.saved_tensors, ctx.layout, ctx.dtype, ctx.pact)
        if ctx.grad_scale is not None:
            dscale = dscale * ctx.grad_scale
        return dx, dscale if ctx.pact else None, *(None,) * 9


class _Gradients(torch.autograd.Function):
    """The gradients as a function of their own, which is linear in g."""

    @staticmethod
    def forward(ctx, g, inside, above, qrange, layout, dtype, pact):
        ctx.save_for_backward(inside, above, qrange)
        ctx.layout, ctx.dtype, ctx.pact = layout, g.dtype, pact
        return _gradients(g, inside, above, qrange, layout, dtype, pact)

    @staticmethod
    def backward(ctx, gdx, gdscale):
        inside, above, qrange = ctx.saved_tensors
        none = above.new_empty(0)
        dg = _gradients(gdx, inside, none, qrange, ctx.layout, ctx.dtype, False)[0]
        if ctx.pact:
            along = (gdscale * qrange[1]).expand(dg.shape) if dg.dim() else (gdscale * qrange[1]).view(())
            dg = dg + _gradients(along, above, none, qrange, ctx.layout, ctx.dtype, False)[0]
        return dg, *(None,) * 6


def fake_quantize_tensor(
    x: Tensor, grid: Grid, step: Tensor | None, options: Options, observed: Observed = NOTHING
) -> tuple[Tensor, Tensor]:
    """Differentiable fake quantization of checked arguments: dx by the straight-through estimator, PACT's dscale.

    Args:
        x, grid, step, options, observed: as for :func:`quantized`.

    Returns:
        y, and its packed codes where options ask for them.
    """
    arguments = (x, *grid, step, options, *observed)
    if torch.compiler.is_compiling():
        return _FakeQuantizeTensor.apply(*arguments)
    if torch.is_grad_enabled() and (x.requires_grad or (options.pact and grid.scale.requires_grad)):
        return apply_plainly(_FakeQuantizeTensor, arguments)
    made = quantized(x, grid, step, options, observed)
    return made.y, made.codes


def dequantized(codes: Tensor, grid: Grid, options: Options, like: Any, dtype: torch.dtype) -> Tensor:
    """The values of packed codes, equal to those that they were made with.

    Args:
        codes: as :func:`quantized` packed them, with ``options.code_bits``.
        grid, options: the same.
        like: shape and strides of y.
        dtype: of the result.
    """
    y = torch.empty_strided(*like, dtype=dtype, device=codes.device)
    _ops.dequantize_tensor(codes, *grid, options.eps, options.code_bits, y)
    return y
