"""What tracking has found in a model: how many weights oscillate, how many are frozen, and in which layers.

Where the latent weights lie between the codes is here too; :mod:`fastqat.train.recorder` follows both through a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from fastqat.autograd import as_rows, flat, from_rows
from fastqat.dorefa import normalized
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.selection import names_of_modules
from fastqat.nn.twins import quantized_view
from fastqat.ops import reference

THRESHOLD = 0.005  # the frequency above which the paper calls a weight oscillating
KINDS = ("depthwise", "pointwise", "convolution", "linear", "embedding", "other")
COUNTS = ("weights", "oscillating", "frozen", "transitions", "oscillations")
STEP = len(COUNTS)  # behind them: the last tracked step, -1 where there is none


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of a layer, and its quantizer.

    Attributes:
        name: of the layer; of the weight where the layer has others.
        kind: one of :data:`KINDS`.
        layer: that holds the weight.
        parameter: name of the weight in it.
        quantizer: its own.
    """

    name: str
    kind: str
    layer: nn.Module
    parameter: str
    quantizer: FakeQuant

    def latent(self) -> Tensor:
        """The weight in float as the quantizer sees it, [output channels, ...], without its history for autograd."""
        weight: Tensor = getattr(self.layer, self.parameter).detach()
        return quantized_view(self.layer, weight).detach() if isinstance(self.layer, QuantizedLayer) else weight


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """Find the weights of a model that have a quantizer, in order of registration; a shared one once.

    Quantizers that a module calls in its own forward are none of a weight's, as far as can be seen.
    """
    names = names_of_modules(model)
    found: dict[FakeQuant, QuantizedWeight] = {}
    for module, (name, *_) in names.items():
        for parameter, holder, own, quantizer in _quantizers_of(module):
            single = parameter == "weight"
            full = name if single else f"{name}.{parameter}".lstrip(".")
            found.setdefault(quantizer, QuantizedWeight(full, kind_of_layer(module), holder, own, quantizer))
    return list(found.values())


def _quantizers_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, FakeQuant]]:
    """The name of each quantized weight, the module and the name under which its values are, and the quantizer."""
    if isinstance(module, QuantizedLayer):
        for parameter, quantizer in module.weight_quantizers().items():
            yield parameter, module, parameter, quantizer
    for parameter, chain in getattr(module, "parametrizations", {}).items():
        if isinstance(chain, ParametrizationList) and isinstance(chain[0], FakeQuant):
            yield parameter, chain, "original", chain[0]


def kind_of_layer(layer: nn.Module) -> str:
    """Say what kind of layer a module is: one of :data:`KINDS`.

    A convolution is depth-wise if each of its groups has one input channel, and point-wise if its kernel and its number
    of groups are 1.
    """
    if isinstance(layer, _ConvNd):
        if layer.groups > 1 and layer.groups == layer.in_channels:
            return "depthwise"
        return "pointwise" if layer.groups == 1 and set(layer.kernel_size) == {1} else "convolution"
    if isinstance(layer, (nn.Linear, nn.MultiheadAttention)):
        return "linear"
    return "embedding" if isinstance(layer, nn.Embedding) else "other"


def tracked(weights: Iterable[QuantizedWeight]) -> list[QuantizedWeight]:
    """Those whose tracker has a state, and whose quantizer a range: one of zeros has none until a step changes it."""

    def has_state(quantizer: FakeQuant) -> bool:
        return quantizer.tracker is not None and quantizer.tracker.is_materialized and quantizer.initialized

    return [each for each in weights if has_state(each.quantizer)]


@torch.no_grad()
def tracked_counts(weights: list[QuantizedWeight], threshold: float = THRESHOLD) -> Tensor:
    """Count what the trackers hold, without waiting for the device.

    Args:
        weights: tracked ones.
        threshold: of the frequency.

    Returns:
        int64 [len(weights), 6] on the device of the first: :data:`COUNTS`, and the last tracked step at :data:`STEP`.
    """
    rows = []
    for each in weights:
        tracker: Any = each.quantizer.tracker
        frozen = tracker.frozen()
        above = (tracker.frequency() > threshold) & ~frozen
        numbers = torch.stack([torch.full_like(tracker.counts[0], frozen.numel()), above.sum(), frozen.sum()])
        rows.append(torch.cat([numbers, tracker.counts[:2], tracker.clock[1:2].long()]))
    device = rows[0].device if rows else None
    return torch.stack([row.to(device) for row in rows]) if rows else torch.zeros(0, STEP + 1, dtype=torch.int64)


def oscillation_summary(model: nn.Module, threshold: float = THRESHOLD) -> dict[str, Any]:
    """Sum up what the trackers of a model hold, in numbers that JSON can hold.

    A weight oscillates if the moving average f of its oscillations per step is above the threshold, and if it is not
    frozen: of a frozen weight, f says what was before.

    Args:
        model: with quantizers that track, see :class:`fastqat.Oscillation`.
        threshold: of f.

    Returns:
        a dict of::

            threshold             as given
            weights               how many are tracked
            oscillating, frozen   shares of them, 0..1
            transitions_per_step  changes of a code, per step from the first tracked one to the last
            oscillations          changes that reversed the change before, since the start
            layers                name -> a dict of kind (one of KINDS) and of the five above
            untracked             name -> why not, for the other quantized weights

        The state of all trackers is read from their device in one copy.

    Raises:
        ValueError: the threshold is negative, or NaN.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold: wanted a number of at least 0; got {threshold}")
    everything = quantized_weights(model)
    weights = tracked(everything)
    counts = dict(zip(weights, tracked_counts(weights, threshold).tolist(), strict=True))
    counts = {each: row for each, row in counts.items() if row[STEP] >= 0}
    layers = {each.name: {"kind": each.kind, **_shares(row)} for each, row in counts.items()}
    total = [sum(column) for column in zip(*counts.values(), strict=True)][:STEP] or [0] * STEP
    steps = max((row[STEP] for row in counts.values()), default=0)
    untracked = {each.name: _why_untracked(each.quantizer) for each in everything if each not in counts}
    return {"threshold": threshold, **_shares([*total, steps]), "layers": layers, "untracked": untracked}


def _shares(counts: list[int]) -> dict[str, Any]:
    weights, oscillating, frozen, transitions, oscillations, steps = counts
    return {
        "weights": weights,
        "oscillating": oscillating / max(weights, 1),
        "frozen": frozen / max(weights, 1),
        "transitions_per_step": transitions / max(steps, 1),
        "oscillations": oscillations,
    }


def _why_untracked(quantizer: FakeQuant) -> str:
    if quantizer.tracker is not None:
        return "no training step yet"
    options = quantizer.oscillation
    if options is not None and quantizer.bits > options.max_bits:
        return f"{quantizer.bits} bits, and no more than {options.max_bits} are tracked"
    return "its quantizer does not track"


def latent_codes(x: Tensor, quantizer: FakeQuant, channels: Tensor | None = None) -> Tensor:
    """Where latent weights lie on the axis of the codes: x / s + z, or (x - o) / s on the offset grid.

    Of DoReFa it is tanh(x) / max|tanh(x)|, from -1 to 1, that lies there.

    What rounds to a code, within the grid, lies no more than 1/2 from it; the thresholds lie half-way between codes.

    Args:
        x: a weight as the quantizer sees it, or some values of one; of DoReFa, which divides by the largest, all.
        quantizer: with a range.
        channels: int64 of the shape of x, of some values: which scale each one has, see :func:`channels_of`.

    Returns:
        float32 of the shape of x.
    """
    if quantizer.normalize == "tanh":
        return (normalized(x) + 1) * (quantizer.qrange[1] * 0.5)
    parameters = [quantizer.scale, quantizer.zero_point, quantizer.grid_offset()]
    values = [None if p is None else flat(p.detach()) for p in parameters]
    if channels is not None:
        return _on_code_axis(x, [None if p is None else p[channels] for p in values], quantizer, 0)
    rows, axis = as_rows(x, quantizer.axis, quantizer.group_size)
    return from_rows(_on_code_axis(rows, values, quantizer, axis), x, quantizer.axis, quantizer.group_size)


def channels_of(weight: Tensor, quantizer: FakeQuant) -> Tensor:
    """The index of the scale of each element of a weight among all scales: int64 of its shape."""
    numbers = torch.zeros_like(weight, dtype=torch.int64)
    rows, axis = as_rows(numbers, quantizer.axis, quantizer.group_size)
    if axis is not None:
        shape = [-1 if dimension == axis % rows.dim() else 1 for dimension in range(rows.dim())]
        rows = rows + torch.arange(rows.shape[axis], device=rows.device).view(shape)
    return from_rows(rows, numbers, quantizer.axis, quantizer.group_size)


def _on_code_axis(x: Tensor, parameters: list[Any], quantizer: FakeQuant, axis: int | None) -> Tensor:
    axis = None if axis is None else axis % x.dim()
    scale, zero_point, offset = parameters
    grid = reference.grid_of(x, scale, zero_point, offset, quantizer.qrange, axis, quantizer.eps)
    return reference.shifted(x, grid) / grid.scale + grid.zero
