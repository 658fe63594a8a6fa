"""The bit-widths that are learned: whose they are, and of which layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from fastqat.adaqat.bit_width import BitWidth
from fastqat.bit_widths import layer_quantizers
from fastqat.cost import FLOAT_BITS
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.selection import refuse_pattern
from fastqat.ops import checks

KINDS = ("weight", "activation")
Parts = dict[str, list[FakeQuant]]  # kind -> quantizers


@dataclass(eq=False)
class Share:
    """What has one bit-width.

    Attributes:
        name: "weight" or "activation"; where each layer has its own, behind the name of the layer and a dot.
        kind: one of KINDS.
        quantizers: all of a kind, or those of a layer and of the layers that share them.
        layers: that these belong to.
    """

    name: str
    kind: str
    quantizers: list[FakeQuant] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Width(Share):
    """A learned bit-width and what has it.

    Attributes:
        number: N.
    """

    number: BitWidth = field(kw_only=True)

    @property
    def upper(self) -> int:
        """The upper one of the two bit-widths whose difference is the gradient: ceil(N), also where N is an integer.

        At the lower bound, below which N cannot go, it is one more.
        """
        return max(self.number.bits, self.number.lowest + 1)

    @property
    def other(self) -> int:
        """The one of the two that the quantizers do not have."""
        return self.upper - 1 if self.upper == self.number.bits else self.upper

    def cost_at(self, bits: int, layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Bits of all layers (see :mod:`fastqat.adaqat.hardware`) with others for this width."""
        changed = dict(layers)
        for name in self.layers:
            weight, activation = changed[name]
            changed[name] = (bits, activation) if self.kind == "weight" else (weight, bits)
        return changed


def quantized_layers(model: nn.Module) -> dict[str, Parts]:
    """The quantizers of weights and of activations of each prepared layer, by the layer's name.

    Raises:
        ValueError: the model has none.
    """
    found = {
        name: {"weight": list(dict.fromkeys(of.weights)), "activation": [of.activation] if of.activation else []}
        for name, of in layer_quantizers(model).items()
    }
    if not found:
        wanted = "a model with quantized layers (fastqat.prepare)"
        checks.fail(ValueError, "model", wanted, f"{type(model).__name__} without")
    return found


def learned_layers(layers: dict[str, Parts], fixed: Iterable[str] | None) -> dict[str, Parts]:
    """The layers that no pattern names; without patterns, all but the first and the last.

    Raises:
        ValueError: a pattern matches no layer, or nothing is left.
    """
    names = list(layers)
    if fixed is None:
        out = {names[0], names[-1]}
    else:
        patterns = [fixed] if isinstance(fixed, str) else list(fixed)
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                refuse_pattern("fixed", pattern, "is quantized", names)
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
        got = f"fixed ones alone: {', '.join(name for name in names if name in out)}"
        checks.fail(ValueError, "fixed", "a quantized layer that is not fixed", got)
    return free


def shares(layers: dict[str, Parts], per_layer: bool) -> list[Share]:
    """What has a bit-width of its own: all weights and all activations, or those of each layer.

    Args:
        layers: whose bit-widths are learned.
        per_layer: layers that share a quantizer have one width.
    """
    found: list[Share] = []
    for kind in KINDS:
        of_kind: list[Share] = []
        for layer, parts in layers.items():
            quantizers = parts[kind]
            if not quantizers:
                continue
            joined = [s for s in of_kind if not per_layer or set(s.quantizers) & set(quantizers)]
            if not joined:
                of_kind.append(Share(f"{layer}.{kind}" if per_layer else kind, kind))
                joined = of_kind[-1:]
            first, *rest = joined
            for other in rest:
                of_kind.remove(other)
                first.layers += other.layers
                quantizers = [*other.quantizers, *quantizers]
            first.layers.append(layer)
            first.quantizers = list(dict.fromkeys([*first.quantizers, *quantizers]))
        found += of_kind
    return found


def bits_of(quantizers: list[FakeQuant]) -> int:
    """The bit-width that they have; 32 of none."""
    return max((q.bits for q in quantizers), default=FLOAT_BITS)
