"""Which bit-widths a pass of AdaQAT changes, and what its loss says of each: one a pass, or many at once."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fastqat.adaqat.widths import Width
from fastqat.ops import checks

PASSES = 2  # of a step, at most


class Differences(Protocol):
    """How differences of losses are measured, each between two neighbouring bit-widths: L(upper) - L(upper - 1)."""

    def choose(self, step: int, widths: Sequence[Width]) -> list[list[Width]]:
        """The widths that each pass of a step changes."""

    def of(self, widths: Sequence[Width], passes: list[list[Width]], rises: list[float]) -> dict[str, float]:
        """The difference of each width, by name, from loss here - loss there of each pass; without those unknown."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""


class EachAlone:
    """A pass for each width: the differences are those of the losses, and nothing is kept from step to step."""

    def choose(self, step: int, widths: Sequence[Width]) -> list[list[Width]]:
        """One width for each pass."""
        return [[width] for width in widths]

    def of(self, widths: Sequence[Width], passes: list[list[Width]], rises: list[float]) -> dict[str, float]:
        """The differences of those whose loss is finite."""
        pairs = [(chosen[0], rise) for chosen, rise in zip(passes, rises, strict=True) if math.isfinite(rise)]
        return {width.name: _sign(width) * rise for width, rise in pairs}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class ManyAtOnce:
    """Two passes for all widths: each changes a random part of them, and a linear model says whose difference it was.

    A pass changes each width with probability 1/4. With s_l = 1 where width l is lowered by a bit, -1 where it is
    raised (at its lower bound), and 0 where it stays, the model is::

        loss here - loss there = sum_l s_l d_l + noise

    and d_l, the running estimate of the difference of width l, is fitted by recursive least squares, which forget::

        d <- d + P s e / (f + s' P s)        e = rise - s' d        P <- (P - P s s' P / (f + s' P s)) / f

    At first widths of a kind are taken to be alike, P = SPREAD on the diagonal + 1 between widths of a kind in units of
    the noise, so that the first steps do what one width for all would do. Where the two neighbours of a width become
    others, its estimate is multiplied by 4 for a bit less and divided by 4 for one more, as the power of the noise of
    rounding is, and its row of P begins anew. Where no more than two widths are free, a pass changes one of them.

    The draws follow from the seed and the step alone, and all sums are made one term after another, so that processes
    that see the same losses have the same estimates.

    Args:
        widths: all that are learned.
        seed: of the draws.
        memory: steps after which what was seen counts 1/e.
    """

    PROBABILITY = 0.25
    SPREAD = 0.03

    def __init__(self, widths: Sequence[Width], seed: int, memory: int) -> None:
        self.names = [width.name for width in widths]
        self.seed, self.keep = seed, math.exp(-1 / (PASSES * memory))
        self.uppers = [width.upper for width in widths]
        self.estimates = [0.0] * len(widths)
        alike = torch.tensor([[float(a.kind == b.kind) for b in widths] for a in widths], dtype=torch.float64)
        self.covariance = alike + self.SPREAD * torch.eye(len(widths), dtype=torch.float64)

    def choose(self, step: int, widths: Sequence[Width]) -> list[list[Width]]:
        """A random part of them for each of two passes, none of which is empty."""
        if len(widths) <= PASSES:
            return [[width] for width in widths]
        draws = random.Random(f"{self.seed} {step}")
        passes = [[width for width in widths if draws.random() < self.PROBABILITY] for _ in range(PASSES)]
        return [chosen or [draws.choice(widths)] for chosen in passes]

    def of(self, widths: Sequence[Width], passes: list[list[Width]], rises: list[float]) -> dict[str, float]:
        """The running estimates, with these losses taken in as far as they are finite; none where no loss is."""
        place = {name: i for i, name in enumerate(self.names)}
        for width in widths:
            self._follow(place[width.name], width.upper)
        seen = [(chosen, rise) for chosen, rise in zip(passes, rises, strict=True) if math.isfinite(rise)]
        for chosen, rise in seen:
            self._learn([(place[width.name], _sign(width)) for width in chosen], rise)
        return {width.name: self.estimates[place[width.name]] for width in widths} if seen else {}

    def _learn(self, signs: list[tuple[int, int]], rise: float) -> None:
        gain = torch.zeros(len(self.names), dtype=torch.float64)
        for i, sign in signs:
            gain += sign * self.covariance[i]
        along = gain.tolist()
        scale = self.keep + sum(sign * along[i] for i, sign in signs)
        error = rise - sum(sign * self.estimates[i] for i, sign in signs)
        self.estimates = [d + g * error / scale for d, g in zip(self.estimates, along, strict=True)]
        self.covariance = (self.covariance - gain[:, None] * gain / scale) / self.keep

    def _follow(self, i: int, upper: int) -> None:
        """Go over to another pair of neighbours."""
        before = self.uppers[i]
        if upper == before:
            return
        self.estimates[i] *= 4.0 ** (before - upper)
        self.uppers[i] = upper
        self.covariance[i] = 0.0
        self.covariance[:, i] = 0.0
        self.covariance[i, i] = self.SPREAD

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {
            "uppers": list(self.uppers),
            "estimates": list(self.estimates),
            "covariance": self.covariance.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is of another number of widths.
        """
        uppers, estimates, count = list(state["uppers"]), list(state["estimates"]), len(self.names)
        covariance = torch.tensor(state["covariance"], dtype=torch.float64)
        got = (len(uppers), len(estimates), *covariance.shape)
        if got != (count, count, count, count):
            checks.fail(ValueError, "differences", f"values for {count} widths", f"for {', '.join(map(str, got))}")
        self.uppers, self.estimates, self.covariance = uppers, estimates, covariance


def _sign(width: Width) -> int:
    """1 where the other width is one bit less: loss here - loss there is the difference then; else -1."""
    return 1 if width.other < width.upper else -1
