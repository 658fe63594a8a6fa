"""Fake quantization of weights as DoReFa and SAT do it: normalized by tanh, and on levels from -1 to 1."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastqat.autograd import apply_plainly
from fastqat.ops import checks, select, two_widths  # noqa: F401  (importing select registers the ops)

_ops = torch.ops.fastqat


class Quantized(NamedTuple):
    """A weight at one bit-width.

    Args:
        value: like the weight, already rescaled.
        factor: float32 [1], of the rescaling; empty where there is none.
    """

    value: Tensor
    factor: Tensor


def quantized(
    weight: Tensor, low: Tensor, high: Tensor, qmax: Tensor, rescale: str | None, dtype: torch.dtype | None = None
) -> list[Quantized]:
    """Quantize a weight at one bit-width or two, from one read of it, without a graph.

    Args:
        weight: [output channels, ...], of a floating dtype.
        low, high: float32 [1], its extremes.
        qmax: int32 [1] or [2]: 2^bits - 1.
        rescale: None, "constant" or "std", see :class:`fastqat.QSpec`.
        dtype: of the results; None is that of the weight.
    """
    widths, dtype = qmax.numel(), dtype or weight.dtype
    # What is multiplied afterwards is not rounded before.
    values = [torch.empty_like(weight, dtype=torch.float32 if rescale else dtype) for _ in range(widths)]
    none = weight.new_empty(0)
    both = qmax if widths == 2 else qmax.expand(2).contiguous()
    sums = torch.empty((2, 2) if rescale else 0, dtype=torch.int64, device=weight.device)
    _ops.dorefa_fake_quantize(weight, low, high, both, sums, values[0], values[1] if widths == 2 else none)
    if rescale is None:
        return [Quantized(value, qmax.new_empty(0, dtype=torch.float32)) for value in values]
    wanted = target_deviation(weight, rescale)
    factors = [factor_of(sums[k], qmax[k], weight.numel(), wanted) for k in range(widths)]
    return [Quantized(value.mul_(factor).to(dtype), factor) for value, factor in zip(values, factors, strict=True)]


def normalized(weight: Tensor) -> Tensor:
    """tanh(w) / max|tanh(w)|: what is rounded. float32 of the shape of the weight."""
    return two_widths.tanh(weight.detach().float()) / two_widths.largest_tanh(*_ops.minmax(weight, None))[1]


def target_deviation(weight: Tensor, rescale: str) -> Tensor:
    """The standard deviation that a quantized weight is to have: float64, 0-dim."""
    if rescale == "std":
        return weight.detach().double().std()
    outputs = weight.shape[0] * (weight[0, 0].numel() if weight.dim() > 2 else 1)
    return torch.full((), outputs**-0.5, dtype=torch.float64, device=weight.device)


def factor_of(sums: Tensor, qmax: Tensor, count: int, wanted: Tensor) -> Tensor:
    """What brings a quantized weight to a standard deviation; 1 where all its values are equal.

    Args:
        sums: int64 [2]: of its codes r, and of r^2.
        qmax: int32, 0-dim: n of its values (2 r - n) / n.
        count: of its elements.
        wanted: float64, 0-dim.

    Returns:
        float32 [1].
    """
    total, squares = sums.double().unbind()
    variance = (squares - total * total / count) / max(count - 1, 1)
    deviation = variance.clamp(min=0).sqrt() * 2 / qmax
    return torch.where(deviation > 0, wanted / deviation, 1.0).float().view(1)


class _DoReFa(torch.autograd.Function):
    """Saves the weight, which is alive anyway, its extremes and the factor."""

    @staticmethod
    def forward(ctx, weight, qmax, rescale, dtype):
        low, high = _ops.minmax(weight, None)
        made = quantized(weight, low, high, qmax, rescale, dtype)[0]
        ctx.save_for_backward(weight, low, high, made.factor)
        ctx.set_materialize_grads(False)
        return made.value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if g is None:
            return None, None, None, None
        weight, low, high, factor = ctx.saved_tensors
        dw = torch.empty_like(weight)
        _ops.dorefa_fake_quantize_backward(g, weight, low, high, factor, dw)
        return dw, None, None, None


def dorefa_fake_quantize(
    weight: Tensor, qmax: Tensor, rescale: str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Quantize a weight: tanh(w) / max|tanh(w)| on the levels (2 r - n) / n, r = 0 .. n.

    The gradient goes through rounding as it is, and through tanh and the maximum, not through the rescaling.

    Args:
        weight: [output channels, ...], float32, bfloat16 or float16.
        qmax: int32 [1]: n = 2^bits - 1.
        rescale: None, "constant" or "std", see :class:`fastqat.QSpec`.
        dtype: of the result; None is that of the weight.

    Returns:
        Tensor of the shape of the weight.

    Raises:
        NotImplementedError: under a torch.func transform.

    Source: DoReFa-Net (1606.06160), section 2.3; SAT (1912.10207) for the rescaling.
    """
    if torch._C._are_functorch_transforms_active():
        checks.fail(NotImplementedError, "DoReFa", "no torch.func transform, but functional_call alone", "one")
    arguments: tuple[Any, ...] = (weight, qmax, rescale, dtype)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return _DoReFa.apply(*arguments)
    return apply_plainly(_DoReFa, arguments)
