"""Bit-widths that a recipe gives to single layers: how they are written, and what they make of a layer's quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from fastqat.nn.selection import refuse_pattern
from fastqat.nn.spec import QConfig
from fastqat.ops import checks

FLOAT = "float"
WANTED = "bits from 1 to 8 or 'float': for both tensors, as 4/6 for weight/activation, or {weight: 4, activation: 6}"


class LayerBits(NamedTuple):
    """Bits of the weight and of the activation of a layer: 1 to 8, "float", or None, which leaves what there is."""

    weight: int | str | None
    activation: int | str | None


def parse(pattern: str, value: Any) -> LayerBits:
    """Read what a recipe says of the layers that a pattern matches.

    Args:
        pattern: for messages.
        value: a number or "float" for both, "4/6", or a mapping of weight and activation, or of one of them.

    Raises:
        ValueError: it is something else; the message names the pattern.
    """
    parts: Any = (value, value)
    if isinstance(value, str) and "/" in value:
        parts = tuple(int(part) if part.isdecimal() else part for part in value.split("/"))
    elif isinstance(value, Mapping):
        parts = tuple(value.get(name) for name in LayerBits._fields)
        if not value or not set(value) <= set(LayerBits._fields) or None in value.values():
            parts = ()
    if len(parts) != 2 or not all(part is None or _is_width(part) for part in parts) or value is None:
        checks.fail(ValueError, f"bits of {pattern!r}", WANTED, repr(value))
    return LayerBits(*parts)


def _is_width(part: object) -> bool:
    return part == FLOAT or (isinstance(part, int) and not isinstance(part, bool) and 1 <= part <= 8)


def layer_bits(bits: Mapping[str, Any], names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, LayerBits]:
    """Find what each layer is given: by the last pattern that matches one of its names.

    Args:
        bits: layer name or pattern (``fnmatch``) -> what :func:`parse` takes.
        names: of the layers that can be quantized.

    Raises:
        ValueError: a pattern matches none; the message names it.
    """
    found: dict[nn.Module, LayerBits] = {}
    for pattern, value in bits.items():
        matched = [m for m, known in names.items() if any(n == pattern or fnmatchcase(n, pattern) for n in known)]
        if not matched:
            refuse_pattern("bits", pattern, "can be quantized", [name for known in names.values() for name in known])
        found.update(dict.fromkeys(matched, parse(pattern, value)))
    return found


def with_bits(present: QConfig | None, full: QConfig, bits: LayerBits) -> QConfig | None:
    """The quantizers of a layer at other bits.

    Args:
        present: what the layer would have; None is float.
        full: where those come from that it would not have.
        bits: what it is given.

    Returns:
        None where all is in float.

    Raises:
        ValueError: bits that a grid cannot have.
    """
    base = present or replace(full, weight=None, activation=None)
    specs = {}
    for name, wanted in bits._asdict().items():
        spec = getattr(base, name)
        if wanted == FLOAT:
            spec = None
        elif wanted is not None:
            spec = replace(spec or getattr(full, name), bits=wanted)
        specs[name] = spec
    return replace(base, **specs) if any(specs.values()) else None
