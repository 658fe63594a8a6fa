"""What AdaQAT did, update by update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Update:
    """An update of the bit-widths.

    Attributes:
        step: number of the call of :meth:`AdaQAT.step`, from 1 on.
        loss: of the task, at the ceilings; where it is not finite, no width moved.
        hardware: cost of the ceilings, without lambda.
        widths: N of each width after the update.
        differences: of the loss, between the two bit-widths about N of each width (see :attr:`Width.upper`): as it was
            measured in this step, or the running estimate where each layer has widths of its own; None where there is
            none, or it is not finite: this width did not move.
        oscillations: of each width so far.
        frozen: whether each width stays.
    """

    step: int
    loss: float
    hardware: float
    widths: tuple[float, ...]
    differences: tuple[float | None, ...]
    oscillations: tuple[int, ...]
    frozen: tuple[bool, ...]


def to_columns(history: Sequence[Update]) -> dict[str, list[Any]]:
    """A list for each attribute: small, and made of what JSON knows."""
    return {each.name: [getattr(update, each.name) for update in history] for each in fields(Update)}


def from_columns(columns: dict[str, list[Any]]) -> list[Update]:
    """The updates that :func:`to_columns` was given; what was a tuple may have become a list."""
    history = []
    for row in zip(*(columns[each.name] for each in fields(Update)), strict=True):
        values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in row]
        history.append(Update(*values))
    return history
