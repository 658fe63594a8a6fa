"""The bit-widths that are learned: whose they are, and of which layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fastqat.adaqat.bit_width import BitWidth
from fastqat.cost import FLOAT_BITS
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.selection import names_of_modules
from fastqat.ops import checks

KINDS = ("weight", "activation")
Parts = dict[str, list[FakeQuant]]  # kind -> quantizers


@dataclass(eq=False)
class Width:
    """A learned bit-width and the quantizers that have it.

    Attributes:
        name: "weight" or "activation"; where each layer has its own, behind the name of the layer and a dot.
        kind: one of KINDS.
        number: N.
        quantizers: that have its ceiling.
        layers: that these belong to.
    """

    name: str
    kind: str
    number: BitWidth
    quantizers: list[FakeQuant]
    layers: list[str]

    @property
    def lower(self) -> int | None:
        """floor(N), and one less than the ceiling where N is an integer; None where the grid has no such codes."""
        bits = self.number.bits - 1
        return bits if bits >= max(q.fewest_bits for q in self.quantizers) else None


def quantized_layers(model: nn.Module) -> dict[str, Parts]:
    """The quantizers of weights and of activations of each prepared layer, by the layer's name."""
    names = {module: found[0] for module, found in names_of_modules(model).items()}
    layers = {name: module for module, name in names.items() if isinstance(module, QuantizedLayer)}
    found: dict[str, Parts] = {}
    for name, layer in layers.items():
        activation = [] if layer.activation_fake_quant is None else [layer.activation_fake_quant]
        weights = list(dict.fromkeys(layer.weight_quantizers().values()))
        if weights or activation:
            found[name] = {"weight": weights, "activation": activation}
    if not found:
        wanted = "a model with quantized layers (fastqat.prepare)"
        checks.fail(ValueError, "model", wanted, f"{type(model).__name__} without")
    return found


def learned_layers(layers: dict[str, Parts], fixed: Iterable[str] | None) -> dict[str, Parts]:
    """The layers that no pattern names; without patterns, all but the first and the last."""
    names = list(layers)
    if fixed is None:
        out = {names[0], names[-1]}
    else:
        patterns = [fixed] if isinstance(fixed, str) else list(fixed)
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                checks.fail(ValueError, "fixed", f"names or patterns of quantized layers: {', '.join(names)}", pattern)
        out = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    # A quantizer that a fixed layer shares is fixed.
    kept = {q for name in out for parts in layers[name].values() for q in parts}
    free = {
        name: {kind: [q for q in quantizers if q not in kept] for kind, quantizers in parts.items()}
        for name, parts in layers.items()
        if name not in out
    }
    free = {name: parts for name, parts in free.items() if any(parts.values())}
    if not free:
        checks.fail(
            ValueError, "fixed", "a quantized layer that is not fixed", f"{', '.join(sorted(out))}, which are all"
        )
    return free


def bits_of(quantizers: list[FakeQuant]) -> int:
    """The bit-width that they have; 32 of none."""
    return max((q.bits for q in quantizers), default=FLOAT_BITS)
