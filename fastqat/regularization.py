"""Losses that pull the weights of a quantized model towards their grid: dampening, and bin regularization.

Both take the grid as it is: they give the weights a gradient, and the parameters of the quantizers none. A frozen
weight is out of training, and neither counts nor gets a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastqat import functional
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.tracking import Dampening, value_at
from fastqat.nn.twins import quantized_view
from fastqat.ops import checks, words
from fastqat.schedules import Schedule


def dampening(
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    offset: Tensor | None = None,
    eps: float | None = None,
    aggregate: str = "kernel_mean",
    frozen: Tensor | None = None,
) -> Tensor:
    """Return the distance of a weight from its grid: the sum of (q(w) - clip(w, s*(qmin - z), s*(qmax - z)))^2 * a.

    q(w) is :func:`fastqat.functional.fake_quantize` and a constant, like the bounds: the gradient is
    2 * a * (w - q(w)) between the bounds, where they are included, and 0 outside.

    Args:
        w: float32, bfloat16 or float16, [C_out, ...].
        scale, zero_point, qmin, qmax, axis, group_size, offset, eps: the grid, see ``fake_quantize``.
        aggregate: "sum", a = 1; "mean", a = 1 / numel; "kernel_mean", a = C_out / numel: the sum over the output
            channels of the mean over each kernel.
        frozen: bool like w: weights that count for nothing.

    Returns:
        float32, 0-dim.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022.
    """
    factor = Dampening(aggregate=aggregate).factor(w)
    grid: dict[str, Any] = dict(qmin=qmin, qmax=qmax, axis=axis, group_size=group_size, offset=offset, eps=eps)

    def nearest(x: Tensor) -> Tensor:
        return functional.fake_quantize(x, scale, zero_point, **grid, out_dtype=torch.float32)

    with torch.no_grad():
        y = nearest(w)
        low, high = (nearest(torch.full_like(w, end)) for end in (-torch.inf, torch.inf))
    distance = _without(frozen, w.float().clamp(low, high) - y)
    return distance.square().sum() * factor


def bin_error(
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    offset: Tensor | None = None,
    eps: float | None = None,
    frozen: Tensor | None = None,
) -> Tensor:
    """Return the sum over the bins of a weight of the mean of (w - q(w))^2 in each.

    A bin is what has one code, over all channels. The mean is (mean(w) - q)^2 + var(w) of the bin where it has one
    scale, and the gradient 2 * (w - q(w)) / n with the n elements of the bin. Unlike in :func:`dampening`, values
    beyond the grid are not clipped.

    Args:
        w: float32, bfloat16 or float16, any shape.
        scale, zero_point, qmin, qmax, axis, group_size, offset, eps: the grid, see
            :func:`fastqat.functional.fake_quantize`.
        frozen: bool like w: weights that count for nothing.

    Returns:
        float32, 0-dim; an empty bin adds 0.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.

    Source: Han et al., "Improving Low-Precision Network Quantization via Bin Regularization", ICCV 2021.
    """
    grid: dict[str, Any] = dict(qmin=qmin, qmax=qmax, axis=axis, group_size=group_size, offset=offset, eps=eps)
    with torch.no_grad():
        codes = functional.quantize(w, scale, zero_point, **grid, dtype=torch.int32)
        y = functional.dequantize(codes, scale, zero_point, **grid)
        index = (codes - qmin).flatten().long()
        present = torch.ones_like(index) if frozen is None else (~frozen).flatten().long()
        counts = torch.zeros(qmax - qmin + 1, dtype=torch.int64, device=w.device).scatter_add_(0, index, present)
        share = counts.clamp(min=1).float().reciprocal()[index].view(w.shape)
    return (_without(frozen, w.float() - y).square() * share).sum()


def _without(frozen: Tensor | None, distance: Tensor) -> Tensor:
    if frozen is None:
        return distance
    if frozen.dtype != torch.bool or frozen.shape != distance.shape:
        wanted, got = f"bool of shape {list(distance.shape)}", f"{frozen.dtype} of shape {list(frozen.shape)}"
        checks.fail(ValueError, "frozen", wanted, got)
    return distance.masked_fill(frozen, 0.0)


def dampening_loss(model: nn.Module, weight: float | Tensor | Schedule = 0.1, aggregate: str = "kernel_mean") -> Tensor:
    """Return the dampening loss of a model: weight * sum of :func:`dampening` over its quantized weights.

    It is added to the loss of the task. ``QSpec(dampening=...)`` gives the same gradient at no cost, within the
    backward pass of the quantizer. Each weight counts once, whatever the number of its layers; where a quantizer is
    switched off, or has no range yet, it counts for nothing.

    Args:
        model: prepared by :func:`fastqat.prepare`, or with FakeQuant as a parametrization of weights.
        weight: lambda: a number, a tensor of one, or a schedule, which each weight's quantizer reads at its own step.
        aggregate: see :func:`dampening`.

    Returns:
        float32, 0-dim.

    Raises:
        TypeError, ValueError: the model has no quantized weight, or naming the argument, what was wanted, what came.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022.
    """
    return _summed(model, weight, lambda w, **grid: dampening(w, **grid, aggregate=aggregate))


def bin_regularization(model: nn.Module, weight: float | Tensor | Schedule = 1.0) -> Tensor:
    """Return the bin regularization of a model: weight * sum of :func:`bin_error` over its quantized weights.

    It is added to the loss of the task. The method begins with training that has none of it, which a step of a
    :mod:`fastqat.schedules` schedule gives.

    Args:
        model, weight: see :func:`dampening_loss`.

    Returns:
        float32, 0-dim.

    Raises:
        TypeError, ValueError: the model has no quantized weight, or naming the argument, what was wanted, what came.

    Source: Han et al., "Improving Low-Precision Network Quantization via Bin Regularization", ICCV 2021.
    """
    return _summed(model, weight, bin_error)


def _summed(model: nn.Module, weight: float | Tensor | Schedule, loss: Callable[..., Tensor]) -> Tensor:
    if not isinstance(weight, Tensor):
        Dampening(weight)  # checks it
    terms = []
    for w, quantizer in _quantized_weights(model):
        if quantizer.initialized and quantizer.fake_quant_enabled:
            factor = weight if isinstance(weight, Tensor) else value_at(weight, quantizer.step)
            terms.append(factor.reshape(()) * loss(w, **_grid(quantizer)))
        else:
            terms.append(w.new_zeros((), dtype=torch.float32))
    if not terms:
        got = f"{type(model).__name__} without any: see fastqat.prepare"
        checks.fail(ValueError, "model", "a model with quantized weights", got)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _grid(quantizer: FakeQuant) -> dict[str, Any]:
    """The grid of a quantizer, and which weights are frozen, as the losses take them."""
    if quantizer.normalize == "tanh":
        wanted = "a grid of the values of the weight themselves"
        checks.fail(ValueError, "quantizer of a weight", wanted, f"that of {quantizer.grid_kind}")
    qmin, qmax = quantizer.codes
    tracker = quantizer.tracker
    return {
        "scale": quantizer.scale,
        "zero_point": quantizer.zero_point,
        "offset": quantizer.grid_offset(),
        "qmin": qmin,
        "qmax": qmax,
        "axis": quantizer.axis,
        "group_size": quantizer.group_size,
        "eps": quantizer.eps,
        # Like the backward pass of the quantizer: a weight that this step has frozen is frozen from the next one on.
        "frozen": words.unpacked(tracker.words).settled if tracker is not None and tracker.is_materialized else None,
    }


def _quantized_weights(model: nn.Module) -> Iterator[tuple[Tensor, FakeQuant]]:
    """Each quantized weight of a model once, as its quantizer sees it and with its history, and the quantizer."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            for name, quantizer in module.weight_quantizers().items():
                weight = getattr(module, name)
                if id(weight) not in seen:
                    seen.add(id(weight))
                    yield quantized_view(module, weight), quantizer
        elif isinstance(module, ParametrizationList) and module.is_tensor:
            chain: list[Any] = list(module)
            for position, quantizer in enumerate(chain):
                if isinstance(quantizer, FakeQuant):
                    yield functools.reduce(lambda w, f: f(w), chain[:position], module.original), quantizer
