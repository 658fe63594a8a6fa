"""Bit-widths of a prepared model, layer by layer: what they are, and a change that keeps ranges, memory and graphs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.selection import names_of_modules, refuse_pattern
from fastqat.ops import checks


class BitWidths(NamedTuple):
    """Bit-widths of a layer; None where it has no quantizer, or, of what is to be set, where it stays as it is."""

    weight: int | None
    activation: int | None


class LayerQuantizers(NamedTuple):
    """The quantizers of a layer: of its weights, of which attention has several, and of its activation."""

    weights: tuple[FakeQuant, ...]
    activation: FakeQuant | None


def layer_quantizers(model: nn.Module) -> dict[str, LayerQuantizers]:
    """Find the quantizers of weights and activations, by the name of the layer, as :func:`fastqat.cost` has it.

    Layers that share a weight have one quantizer for it.

    Args:
        model: any module; layers without such quantizers are left out.
    """
    return {found[0]: quantizers for found, quantizers in _named_quantizers(model)}


def _named_quantizers(model: nn.Module) -> list[tuple[list[str], LayerQuantizers]]:
    """All names of each layer, and its quantizers."""
    found = []
    for module, names in names_of_modules(model).items():
        if isinstance(module, QuantizedLayer):
            quantizers = LayerQuantizers(tuple(module.weight_quantizers().values()), module.activation_fake_quant)
            if quantizers.weights or quantizers.activation is not None:
                found.append((names, quantizers))
    return found


def bit_widths(model: nn.Module) -> dict[str, BitWidths]:
    """Say at how many bits the layers of a prepared model quantize: layer -> (weight, activation).

    Args:
        model: any module; layers that :func:`fastqat.prepare` left in float are left out.

    Returns:
        what :func:`set_bit_widths` takes; of several weights of a layer the widest.
    """
    return {
        name: BitWidths(
            max((q.bits for q in quantizers.weights), default=None),
            None if quantizers.activation is None else quantizers.activation.bits,
        )
        for name, quantizers in layer_quantizers(model).items()
    }


def set_bit_widths(model: nn.Module, widths: Mapping[str, tuple[int | None, int | None]]) -> None:
    """Change bit-widths in place; ranges stay as far as the grids allow (see :meth:`fastqat.FakeQuant.change_bits`).

    Nothing is compiled anew, and the memory of parameters stays where it is. What was tracked of oscillations of a
    changed weight is forgotten. A state_dict holds the bit-widths: a model that is prepared at others has them after it
    was loaded.

    Args:
        model: prepared.
        widths: layer name or pattern (``fnmatch``) -> bits of the weight and of the activation; None leaves them. The
            last pattern that matches a layer decides. Layers that share a weight share its bits: one of them is enough.

    Raises:
        TypeError, ValueError: a pattern matches no quantized layer; bits are no int from 1 to 8 (from 2 where the grid
            of a quantizer says so); there is no such quantizer; two layers want different bits for one weight. The
            message names it, and the model is as it was.
    """
    layers = _named_quantizers(model)
    chosen: dict[str, tuple[LayerQuantizers, BitWidths]] = {}
    for pattern, wanted in widths.items():
        pair = _pair(pattern, wanted)
        matched = [(names[0], q) for names, q in layers if any(n == pattern or fnmatchcase(n, pattern) for n in names)]
        if not matched:
            refuse_pattern("bit-widths", pattern, "is quantized", [name for names, _ in layers for name in names])
        chosen.update({name: (quantizers, pair) for name, quantizers in matched})
    changes: dict[FakeQuant, tuple[str, int]] = {}
    for name, (quantizers, (weight, activation)) in chosen.items():
        activations = () if quantizers.activation is None else (quantizers.activation,)
        for tensor, found, bits in (("weight", quantizers.weights, weight), ("activation", activations, activation)):
            if bits is None:
                continue
            if not found:
                checks.fail(ValueError, f"layer {name!r}", f"None for its {tensor}, which is in float", f"{bits} bits")
            for quantizer in found:
                _enter(changes, quantizer, f"layer {name!r}, {tensor}", bits)
    for quantizer, (_, bits) in changes.items():
        quantizer.change_bits(bits)
        quantizer.bits_are_data = True


def _pair(pattern: str, wanted: object) -> BitWidths:
    """The bits of weight and activation that somebody gave."""
    if not isinstance(wanted, tuple) or len(wanted) != 2:
        checks.fail(TypeError, f"bit-widths of {pattern!r}", "(bits of weight, bits of activation)", repr(wanted))
    return BitWidths(*wanted)  # type: ignore[misc]  # two


def _enter(changes: dict[FakeQuant, tuple[str, int]], quantizer: FakeQuant, where: str, bits: int) -> None:
    """Check a change, and note it."""
    try:
        checks.bit_width(bits, lowest=quantizer.fewest_bits)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    first, before = changes.setdefault(quantizer, (where, bits))
    if before != bits:
        checks.fail(ValueError, f"{first}; {where}", "the same bits for what they share", f"{before} and {bits}")
