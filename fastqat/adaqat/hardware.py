"""What bit-widths cost in hardware, as one number: the part of AdaQAT's loss that wants fewer bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastqat.cost import Cost, cost
from fastqat.ops import checks

# Bits of each quantized layer, by name: (of its weight, of its activation); 32 where a tensor is not quantized.
LayerBits = Mapping[str, tuple[int, int]]
HardwareCost = Callable[[LayerBits], float]
COSTS = ("product", "bit_operations", "weight_bits")


def hardware_cost(kind: str | HardwareCost, model: nn.Module, learned: list[str], example_inputs: Any) -> HardwareCost:
    """Return the cost as a function of the bits of each quantized layer.

    Args:
        kind: "product": the mean over the learned layers of (bits of the weight) * (bits of the activation), which is
            N_w N_a where all have the same (AdaQAT, eq. 2, with a factor of 1). "bit_operations": the same mean over
            all layers, each weighted with its multiply-accumulates. "weight_bits": the mean bits of a weight. Or a
            function of one's own, such as the sum over a table of latencies.
        model: prepared.
        learned: names of the layers whose bit-widths are learned.
        example_inputs: a batch as :func:`fastqat.cost` takes it; for "bit_operations", and "weight_bits".

    Raises:
        ValueError: an unknown kind, or no example_inputs where they are needed.
    """
    if not isinstance(kind, str):
        if not callable(kind):
            checks.fail(TypeError, "cost", f"one of {', '.join(COSTS)}, or a function of bits", repr(kind))
        return kind
    checks.choice("cost", kind, COSTS)
    if kind == "product":
        return lambda bits: sum(bits[name][0] * bits[name][1] for name in learned) / len(learned)
    if example_inputs is None:
        checks.fail(ValueError, "example_inputs", f"a batch beside cost={kind!r}", None)
    return _weighted(kind, cost(model, example_inputs))


def checked_cost(cost: HardwareCost, layers: LayerBits) -> HardwareCost:
    """The cost, if it gives a finite number for the bits that layers have; else a TypeError or ValueError says so."""
    value = cost(layers)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        checks.fail(TypeError, "cost", "a function of the bits of layers that returns a number", type(value).__name__)
    if not math.isfinite(value):
        checks.fail(ValueError, "cost", "a finite number for the bits of the layers", value)
    return cost


def _weighted(kind: str, counted: Cost) -> HardwareCost:
    """The mean of bit_operations or weight_bits over what was counted."""
    macs = {layer.layer: layer.macs for layer in counted.layers}
    weights = {layer.layer: layer.weights for layer in counted.layers}
    if kind == "weight_bits":
        return lambda bits: sum(weights[name] * bits[name][0] for name in bits) / sum(weights[name] for name in bits)
    return lambda bits: sum(macs[name] * bits[name][0] * bits[name][1] for name in bits) / sum(macs[n] for n in bits)
