"""The ``torch.autograd.Function`` of fake quantization, its second derivative, and its rule for vmap.

Grouped tensors become rows here: with group_size a tensor is viewed (or copied) as [C * groups, group_size] with one
scale per row, which is all that the ops know.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqat.ops import reference, select  # noqa: F401  (importing select registers the ops)

_ops = torch.ops.fastqat


def as_rows(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, int | None]:
    """A grouped tensor as [C * groups, group_size] with axis 0; others as they are."""
    if group_size is None or axis is None:
        return x, axis
    return x.movedim(axis, 0).reshape(-1, group_size), 0


def from_rows(y: Tensor, like: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Undo :func:`as_rows`: the shape of `like` and the strides that empty_like gives it."""
    if group_size is None or axis is None:
        return y
    y = _viewed_as(y, like, axis)
    result = torch.empty_like(like, dtype=y.dtype)
    return y if y.stride() == result.stride() else result.copy_(y)


def _viewed_as(y: Tensor, like: Tensor, axis: int) -> Tensor:
    """Rows with the shape of `like`, in whatever strides that takes no copy."""
    return y.view(like.movedim(axis, 0).shape).movedim(0, axis)


def flat(p: Any) -> Any:
    """A parameter of the grid as one value per row or channel."""
    return p if p is None or p.dim() == 1 else p.reshape(-1)


def needs_grad(x: Tensor, scale: Tensor, zero_point: Tensor | None, offset: Tensor | None) -> bool:
    """True if any of them requires a gradient."""
    return (
        x.requires_grad
        or scale.requires_grad
        or (zero_point is not None and zero_point.requires_grad)
        or (offset is not None and offset.requires_grad)
    )


# Where x is clamped first, by the name of what that computes: to [0, clip].
CLIPS = {None: 0.0, "relu": math.inf, "relu6": 6.0}


def activated(x: Tensor, clip: float) -> Tensor:
    """x clamped to [0, clip], one of CLIPS, by torch."""
    return F.relu(x) if clip == math.inf else F.relu6(x) if clip else x


def _clipped_forward(x, scale, zero_point, offset, qrange, eps, clip, out_dtype) -> Tensor:
    """Quantize x, clamped to [0, clip], in the same pass."""
    y, none = torch.empty_like(x, dtype=out_dtype or x.dtype), qrange.new_empty(0, dtype=torch.uint8)
    nothing = (none,) * 6  # no extremes, no counts, no bits, no codes
    _ops.fake_quantize_tensor(x, scale, zero_point, offset, qrange, eps, clip, True, 0, -1, none, none, 0, *nothing, y)
    return y


def _vmap_fold(x: Tensor, batch: int, dim: int | None, axis: int | None) -> Tensor:
    """x with its batch at `dim` as [batch * C, ...] (C = 1 per tensor): one row per example and channel."""
    x = x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
    return (x.unsqueeze(1) if axis is None else x.movedim(axis + 1, 1)).flatten(0, 1)


def _vmap_unfold(y: Tensor, batch: int, axis: int | None) -> Tensor:
    """Inverse of :func:`_vmap_fold`, with the batch in front."""
    y = y.unflatten(0, (batch, -1))
    return y.squeeze(1) if axis is None else y.movedim(1, axis + 1)


def _vmap_parameter(p: Tensor | None, batch: int, dim: int | None) -> Tensor | None:
    """A parameter [C] or [C, groups] as [batch * C, ...]."""
    return None if p is None else _vmap_fold(p, batch, dim, 0)


class _FakeQuantize(torch.autograd.Function):
    """Quantize-dequantize; saves its inputs, and nothing that is not alive elsewhere."""

    @staticmethod
    def forward(x, scale, zero_point, offset, qrange, axis, group_size, eps, rounded, lsq, factor, clip, out_dtype):
        if clip:
            return _clipped_forward(x, scale, zero_point, offset, qrange, eps, clip, out_dtype)
        if group_size is None:  # no rows to make: this function runs cold in training, where each call of another costs
            return _ops.fake_quantize(x, scale, zero_point, offset, qrange, axis, eps, out_dtype)
        rows, row_axis = as_rows(x, axis, group_size)
        y = _ops.fake_quantize(rows, flat(scale), flat(zero_point), flat(offset), qrange, row_axis, eps, out_dtype)
        return from_rows(y, x, axis, group_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:12]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 13
        learned = any(ctx.needs_input_grad[1:4])
        # Only a second derivative needs a graph of the backward pass itself.
        run = _FakeQuantizeBackward.apply if torch.is_grad_enabled() else _FakeQuantizeBackward.forward
        saved = ctx.saved_tensors  # read once: activation checkpointing hands them out only once
        dx, dscale, dshift = run(g, *saved, *ctx.options, learned)
        offset_grid = saved[3] is not None
        shifts = (None, dshift) if offset_grid else (dshift, None)
        return dx, dscale, *shifts, *(None,) * 9

    @staticmethod
    def vmap(info, in_dims, x, scale, zero_point, offset, qrange, axis, group_size, *options):
        if in_dims[4] is not None:
            raise ValueError("qmin, qmax: wanted the same for the whole batch of vmap; got a batch of them")
        batch = info.batch_size
        y = _FakeQuantize.apply(
            _vmap_fold(x, batch, in_dims[0], axis),
            *(_vmap_parameter(p, batch, dim) for p, dim in zip((scale, zero_point, offset), in_dims[1:4], strict=True)),
            qrange,
            0,
            group_size,
            *options,
        )
        return _vmap_unfold(y, batch, axis), 0


class _FakeQuantizeBackward(torch.autograd.Function):
    """The gradients of fake_quantize as a function of their own, so that they can be differentiated.

    dx is linear in g. The straight-through estimator makes the second derivatives by x vanish; those by scale and zero
    point are left only outside the range, where y = scale * (qmin - zero_point).
    """

    @staticmethod
    def forward(g, x, scale, zero_point, offset, qrange, axis, group_size, eps, rounded, lsq, factor, clip, learned):
        if group_size is None and learned and factor is None:  # the most frequent case, with few calls: see above
            dx, dscale, dshift = _ops.fake_quantize_backward(
                g, x, scale, zero_point, offset, qrange, axis, eps, rounded, lsq, clip
            )
            return dx, dscale, None if zero_point is None and offset is None else dshift
        rows, row_axis = as_rows(x, axis, group_size)
        g_rows, _ = as_rows(g, axis, group_size)
        grid = (flat(scale), flat(zero_point), flat(offset), qrange, row_axis, eps)
        if not (learned or clip):
            return (
                from_rows(_ops.fake_quantize_backward_input(g_rows, rows, *grid, rounded), x, axis, group_size),
                None,
                None,
            )
        dx, dscale, dshift = _ops.fake_quantize_backward(g_rows, rows, *grid, rounded, lsq, clip)
        if factor is not None:
            dscale, dshift = dscale * factor, dshift * factor
        has_shift = zero_point is not None or offset is not None
        return (
            from_rows(dx, x, axis, group_size),
            dscale.view(scale.shape),
            dshift.view(scale.shape) if has_shift else None,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:13]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, gdx, gdscale, gdshift):
        return *_second_order(*ctx.saved_tensors, *ctx.options, gdx, gdscale, gdshift), *(None,) * 9

    @staticmethod
    def vmap(info, in_dims, g, x, scale, zero_point, offset, qrange, axis, group_size, *options):
        batch = info.batch_size
        dx, dscale, dshift = _FakeQuantizeBackward.apply(
            _vmap_fold(g, batch, in_dims[0], axis),
            _vmap_fold(x, batch, in_dims[1], axis),
            *(_vmap_parameter(p, batch, dim) for p, dim in zip((scale, zero_point, offset), in_dims[2:5], strict=True)),
            qrange,
            0,
            group_size,
            *options,
        )
        parameters = [None if p is None else _vmap_unfold(p, batch, 0) for p in (dscale, dshift)]
        return (_vmap_unfold(dx, batch, axis), *parameters), tuple(None if r is None else 0 for r in (dx, *parameters))


def _second_order(
    g, x, scale, zero_point, offset, qrange, axis, group_size, eps, rounded, lsq, factor, clip, gdx, gdscale, gdshift
) -> tuple[Tensor, None, Tensor | None, Tensor | None, None]:
    """Gradients of (dx, dscale, dshift) by (g, x, scale, zero_point, offset), in plain torch."""
    rows, row_axis = as_rows(x, axis, group_size)
    g_rows, _ = as_rows(g, axis, group_size)
    passes, rows = reference.passes_clip(rows, clip), reference.clipped(rows, clip)
    grid = reference.grid_of(rows, flat(scale), flat(zero_point), flat(offset), qrange, row_axis, eps)
    r = reference.shifted(rows, grid) / grid.scale
    mask = reference.inside(r, grid, rounded)
    outside = ~mask & ~r.isnan()
    weight = torch.ones_like(grid.scale) if factor is None else torch.full_like(grid.scale, factor)
    if lsq:
        weight = weight * reference.lsq_factor(rows, scale, qrange).float()

    dg = torch.zeros_like(g_rows, dtype=torch.float32)
    if gdx is not None:
        dg = torch.where(mask & passes, as_rows(gdx, axis, group_size)[0].float(), dg)
    outside_sum = (
        reference.ordered_sum(torch.where(outside, g_rows.double(), 0.0), row_axis).float().view_as(grid.scale)
    )
    dscale = dzero = None
    if gdscale is not None:
        along = gdscale.reshape(grid.scale.shape) * weight
        slope = reference.level(torch.where(r.isnan(), 0.0, r), grid) - torch.where(mask, r, 0.0)
        dg = dg + along * torch.where(r.isnan(), 0.0, slope)
        dzero = -along * weight * outside_sum  # a second derivative passes the gradient scale of both parameters
    if gdshift is not None:
        along = gdshift.reshape(grid.scale.shape) * weight
        dg = dg + torch.where(outside, along if offset is not None else -grid.scale * along, 0.0)
        dscale = -along * weight * outside_sum
    learned_zero = zero_point is not None and offset is None
    dg = dg.to(g.dtype)
    return (
        dg if group_size is None else _viewed_as(dg, x, axis),  # vmap cannot copy into a tensor outside its batch
        None,
        dscale.view(scale.shape) if dscale is not None and learned_zero else None,
        dzero.view(scale.shape) if dzero is not None and learned_zero else None,
        None,
    )


class Options(NamedTuple):
    """What a call asks for beside its tensors, in the order in which the functions of this module take it.

    Attributes:
        qrange: int32 [2], qmin and qmax.
        axis: in [0, x.dim()), or None.
        group_size, eps, out_dtype: as for :func:`fastqat.functional.fake_quantize`.
        rounded: the mask tests rint(x / s), else x / s.
        lsq: the gradients of the grid take the factor of LSQ; else `factor`, where it is not None.
        clip: one of CLIPS; x is clamped to [0, clip] first where it is not 0.
    """

    qrange: Tensor
    axis: int | None
    group_size: int | None
    eps: float
    rounded: bool
    lsq: bool
    factor: float | None
    clip: float
    out_dtype: torch.dtype | None


def lsq_or_factor(grad_scale: float | str | None) -> tuple[bool, float | None]:
    """The two options that a `grad_scale` stands for."""
    return (True, None) if isinstance(grad_scale, str) else (False, grad_scale)


def apply_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, offset: Tensor | None, options: Options
) -> Tensor:
    """Differentiable fake quantization of checked arguments."""
    transformed = torch._C._are_functorch_transforms_active()
    if options.clip and (options.axis is not None or transformed):
        x, options = activated(x, options.clip), options._replace(clip=0.0)  # what clamps in one pass knows one scale
    arguments = (x, scale, zero_point, offset, *options)
    if transformed or torch.compiler.is_compiling():
        return _FakeQuantize.apply(*arguments)
    if torch.is_grad_enabled() and needs_grad(x, scale, zero_point, offset):
        return apply_plainly(_FakeQuantize, arguments)
    return _FakeQuantize.forward(*arguments)


def apply_plainly(function: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> Any:
    """Function.apply without what only torch.func needs: it binds the arguments to a signature that it inspects anew.

    Measured for one call on a small tensor, checks included: 16 us instead of 53.
    """
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
