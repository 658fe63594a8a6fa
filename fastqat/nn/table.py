"""Plain text tables for people: aligned columns, and one line for repeated blocks of a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def collapsed(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Join rows that are equal but for the numbers in their name, and add up their last cells.

    Args:
        rows: (dotted name, ..., number). In the name of several, ``*`` stands for the components that are numbers.
    """
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for name, *cells, number in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        groups.setdefault((pattern, *cells), []).append((name, number))
    return [
        (key[0] if len(found) > 1 else found[0][0], *key[1:], sum(number for _, number in found))
        for key, found in groups.items()
    ]


def table(heading: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    """Align rows under a heading; the last column holds numbers. Nothing for no rows, and no column without content.

    Args:
        heading: one word per column.
        rows: as many cells each.
    """
    if not rows:
        return ""
    lines = [[str(cell) if i < len(row) - 1 else f"{cell:,}" for i, cell in enumerate(row)] for row in rows]
    kept = [i for i in range(len(heading)) if any(line[i] for line in lines)]
    lines = [[line[i] for i in kept] for line in (list(heading), *lines)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: list[str], widths: list[int]) -> str:
    *texts, number = line
    left = [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
    return "  " + "  ".join([*left, number.rjust(widths[-1])]).rstrip()
