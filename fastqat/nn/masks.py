"""ReLU and ReLU6 that keep a bit of each element for their backward pass, and the modules that become their twins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastqat.autograd import apply_plainly
from fastqat.nn import recompute
from fastqat.nn.recompute import mark, recipe_of, refuse_second_derivative, saves_for_backward
from fastqat.ops.one_tensor import in_memory_order

_ops = torch.ops.fastqat


class _MaskedReLU(torch.autograd.Function):
    """ReLU or ReLU6 that saves one bit of each element: whether its gradient passes."""

    @staticmethod
    def forward(ctx, x, compute, clip, inplace):
        y = compute(x, inplace=inplace)
        if inplace:
            ctx.mark_dirty(x)
        values = in_memory_order(y)
        stops = values <= 0  # the gradient of NaN passes; of ReLU6, torch's own depends on its place in the tensor
        if clip:
            stops |= values >= clip
        ctx.save_for_backward(_ops.pack(stops.logical_not_().view(torch.uint8), 1))
        ctx.layout, ctx.dtype, ctx.clip = (y.shape, y.stride()), y.dtype, clip
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 4
        refuse_second_derivative()
        (bits,) = ctx.saved_tensors
        none, qrange = bits.new_empty(0), bits.new_empty(2, dtype=torch.int32)
        dx = torch.empty_strided(*ctx.layout, dtype=ctx.dtype, device=g.device)
        _ops.fake_quantize_tensor_backward(g, bits, none, qrange, dx, dx.new_empty(0, dtype=torch.float32))
        return _with_strides_of_torch(dx, g, ctx.clip), None, None, None


def _with_strides_of_torch(dx: Tensor, g: Tensor, clip: float) -> Tensor:
    """dx with the strides that torch's own backward pass gives it, which decide how those before it sum."""
    if dx.stride() == g.stride():
        return dx
    # ReLU6 asks its gradient first, ReLU its result; the kernel for no device of hardtanh_backward gets that wrong.
    metas = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (g, dx)]
    strides = torch.ops.aten.threshold_backward(*(reversed(metas) if clip else metas), 0).stride()
    return dx if dx.stride() == strides else dx.new_empty_strided(dx.shape, strides).copy_(dx)


class _ReLU(nn.Module):
    """Mixin of the twins of ReLU and ReLU6."""

    compute: ClassVar[Any]
    clip: ClassVar[float]
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """As torch's layer; saves a bit of each element."""
        if not saves_for_backward(input) or (self.inplace and not _is_dense(input)):
            return super().forward(input)
        source = recipe_of(input)
        y = apply_plainly(_MaskedReLU, (input, self.compute, self.clip, self.inplace))
        if source is not None and source.unchanged():
            compute = partial(_rectified, self.compute, source.compute)
            mark(y, compute, source.tensors, sums=source.sums, kept=source.kept)
        else:
            mark(y, _itself, (y,), kept=True)
        return y


def _itself(y: Tensor) -> Tensor:
    return y


def _is_dense(x: Tensor) -> bool:
    return torch.empty_like(x, device="meta").stride() == x.stride()


def _rectified(compute: Callable[..., Tensor], source: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    return compute(source(*tensors))


class ReLU(_ReLU, nn.ReLU):
    """``torch.nn.ReLU`` that saves a bit of each element for its backward pass."""

    compute, clip = staticmethod(F.relu), 0.0


class ReLU6(_ReLU, nn.ReLU6):
    """``torch.nn.ReLU6`` that saves a bit of each element for its backward pass."""

    compute, clip = staticmethod(F.relu6), 6.0


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    nn.BatchNorm1d: recompute.BatchNorm1d,
    nn.BatchNorm2d: recompute.BatchNorm2d,
    nn.BatchNorm3d: recompute.BatchNorm3d,
}
_ORIGINALS = {twin: original for original, twin in _TWINS.items()}


def keep_less(module: nn.Module) -> bool:
    """Make a module one of these twins, in place; False for one that has none."""
    module.__class__ = _TWINS.get(type(module), type(module))
    return type(module) in _ORIGINALS


def keep_as_torch(module: nn.Module) -> None:
    """Undo what :func:`fastqat.compress_saved_activations` did to one module."""
    module.__class__ = _ORIGINALS.get(type(module), type(module))
    module.__dict__.pop("saves_codes", None)
