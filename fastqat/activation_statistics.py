"""What the quantizers of activations do to what they see: how much of it they clip, and how much noise they add."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastqat.autograd import CLIPS, activated
from fastqat.nn.calibrate import called_quantizers
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import eagerly, evaluating, nothing_changes, run_batch
from fastqat.nn.selection import names_of_modules
from fastqat.ops import checks
from fastqat.ranges import GridSpec, rows_of


@dataclass(frozen=True)
class ActivationStatistics:
    """What :func:`activation_statistics` finds of one quantizer.

    Attributes:
        layer: name of the layer; of the quantizer itself where a module calls it.
        tensor: "input" or "output" of the layer; "tensor" where a module calls it.
        bits: its bit-width.
        values: how many finite values it saw; without one, or without a range, the numbers below are NaN.
        low, high: the smallest and largest of them.
        range_low, range_high: lowest and highest value of its grid; of many scales the outermost.
        clipped: fraction of the values that lie outside the grid.
        sqnr: 10 log10(sum x^2 / sum (quantized x - x)^2) in dB; inf without an error.
    """

    layer: str
    tensor: str
    bits: int
    values: int
    low: float
    high: float
    range_low: float
    range_high: float
    clipped: float
    sqnr: float


@torch.no_grad()
def activation_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> list[ActivationStatistics]:
    """Measure what the quantizers of activations clip, and their signal to quantization noise ratio.

    The model runs in evaluation mode, eagerly, with its quantizers switched on, and stays as it is. A quantizer that
    computes an activation function first is judged by what it quantizes.

    Args:
        model, batches, forward: see :func:`fastqat.calibrate`.

    Returns:
        One row per quantizer of activations, in order of registration.

    Raises:
        ValueError: there is no such quantizer, or no batch.
    """
    called, of_weights = called_quantizers(model)
    sums = {q: _Sums(q) for q in called.values() if q not in of_weights}
    if not sums:
        checks.fail(ValueError, "model", "a model with quantizers of activations", type(model).__name__)
    count = 0
    with evaluating(model), eagerly(), nothing_changes(m for m in model.modules() if isinstance(m, FakeQuant)):
        hooks = [q.register_forward_pre_hook(each.add) for q, each in sums.items()]
        try:
            for batch in batches:
                (forward or run_batch)(model, batch)
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    if not count:
        checks.fail(ValueError, "batches", "at least one", "none")
    names = _names(model)
    return [each.statistics(*names.get(q, ("", "tensor"))) for q, each in sums.items()]


def _names(model: nn.Module) -> dict[FakeQuant, tuple[str, str]]:
    """The layer that each quantizer belongs to, and what it quantizes there."""
    found: dict[FakeQuant, tuple[str, str]] = {}
    for module, (name, *_) in names_of_modules(model).items():
        if isinstance(module, QuantizedLayer):
            for tensor, quantizer in module.quantizers():
                if isinstance(quantizer, FakeQuant):
                    found.setdefault(quantizer, (name, tensor))
        elif isinstance(module, FakeQuant):
            found.setdefault(module, (name, "tensor"))
    return found


class _Sums:
    """Sums over all values that one quantizer sees, on its device."""

    def __init__(self, quantizer: FakeQuant) -> None:
        self.quantizer = quantizer
        self.values = 0
        self.sums: Tensor | None = None  # float64: finite values, values outside, their squares, those of the errors
        self.extremes: Tensor | None = None  # float32: low, high

    def add(self, quantizer: FakeQuant, args: tuple[Any, ...]) -> None:
        """Look at a tensor before it is quantized."""
        if not (quantizer.initialized and args[0].numel()):
            return
        x = activated(args[0].detach(), CLIPS[quantizer.activation])
        y = FakeQuant.forward(quantizer, args[0].detach(), torch.float32)
        spec = GridSpec(quantizer.axis, quantizer.group_size, *quantizer.codes, quantizer.symmetric)
        x, y = rows_of(x, spec).float(), rows_of(y, spec)
        low, high = (bound.view(-1, 1) for bound in _bounds(quantizer))
        finite = x.isfinite()
        outside = finite & ((x < low) | (x > high))
        squares = (torch.where(finite, v, 0.0).square().sum(dtype=torch.float64) for v in (x, y - x))
        sums = torch.stack([finite.sum().double(), outside.sum().double(), *squares])
        lowest, highest = torch.where(finite, x, torch.inf), torch.where(finite, -x, torch.inf)
        extremes = torch.stack([lowest.amin(), highest.amin()])
        self.sums = sums if self.sums is None else self.sums + sums
        self.extremes = extremes if self.extremes is None else torch.minimum(self.extremes, extremes)

    def statistics(self, layer: str, tensor: str) -> ActivationStatistics:
        """The row of this quantizer."""
        q = self.quantizer
        values, outside, signal, noise = (0.0,) * 4 if self.sums is None else self.sums.tolist()
        if not values or self.extremes is None:
            return ActivationStatistics(layer, tensor, q.bits, 0, *[math.nan] * 6)
        low, high = self.extremes.tolist()
        bounds = _bounds(q)
        sqnr = 10 * math.log10(signal / noise) if signal and noise else math.inf if signal else math.nan
        return ActivationStatistics(
            layer,
            tensor,
            q.bits,
            int(values),
            low,
            -high,
            bounds[0].min().item(),
            bounds[1].max().item(),
            outside / values,
            sqnr,
        )


def _bounds(quantizer: FakeQuant) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of the grid, of the shape of its scale."""
    qmin, qmax = quantizer.codes
    scale = quantizer.scale.detach().clamp(min=quantizer.eps)
    offset = quantizer.grid_offset()
    if offset is not None:
        return scale * qmin + offset.detach(), scale * qmax + offset.detach()
    zero = 0.0 if quantizer.zero_point is None else quantizer.zero_point.detach().round().clamp(qmin, qmax)
    return scale * (qmin - zero), scale * (qmax - zero)
