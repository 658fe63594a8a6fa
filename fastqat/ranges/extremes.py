"""Ranges from the extreme values of tensors: of all of them, averaged, or without their outermost values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastqat import functional
from fastqat.ops import checks
from fastqat.ops.grids import grid_from_range, moving_average


@dataclass(frozen=True)
class GridSpec:
    """What a range estimator must know of a quantizer: its granularity and its codes, as ints."""

    axis: int | None
    group_size: int | None
    qmin: int
    qmax: int
    symmetric: bool


class Estimator(Protocol):
    """What all range estimators do."""

    def observe(self, x: Tensor) -> None:
        """Take a tensor into account. x: any floating dtype."""

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 of the shape of a scale."""


class MinMax:
    """The smallest and largest value of all observed tensors."""

    def __init__(self, spec: GridSpec) -> None:
        self.spec = spec
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Range of one tensor, of the shape of a scale."""
        return functional.minmax(x.detach(), axis=self.spec.axis, group_size=self.spec.group_size)

    def merge(self, old: Tensor, new: Tensor, lower: bool) -> Tensor:
        """Bound of all tensors so far from that of the earlier ones and that of the newest."""
        return torch.minimum(old, new) if lower else torch.maximum(old, new)

    def observe(self, x: Tensor) -> None:
        """Take a tensor into account. x: any floating dtype."""
        low, high = self.extremes(x)
        self.low = low if self.low is None else self.merge(self.low, low, True)
        self.high = high if self.high is None else self.merge(self.high, high, False)

    def join(self, other: MinMax) -> None:
        """Take in what another estimator of the same kind has observed in another process."""
        (low, high), (other_low, other_high) = self.bounds(), other.bounds()
        self.low, self.high = torch.minimum(low, other_low), torch.maximum(high, other_high)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The range itself, of the shape of a scale; not finite where there is no data."""
        assert self.low is not None and self.high is not None, "observe() comes first"
        return self.low, self.high

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 of the shape of a scale."""
        return grid_from_range(*self.bounds(), self.spec.qmin, self.spec.qmax, self.spec.symmetric)


class _Mean(MinMax):
    """A range that is averaged over processes."""

    weight = 0  # of this estimator beside others: processes, or tensors

    def join(self, other: MinMax) -> None:
        """Average with another, which may have more to say."""
        assert isinstance(other, _Mean)
        self.weight += other.weight
        share = other.weight / self.weight
        pairs = zip(self.bounds(), other.bounds(), strict=True)
        self.low, self.high = (_mean(mine, theirs, share) for mine, theirs in pairs)


def _mean(mine: Tensor, theirs: Tensor, share: float) -> Tensor:
    """Both weighted; a bound that is not finite comes from no data and does not count."""
    mean = torch.where(mine.isfinite(), mine + (theirs - mine) * share, theirs)
    return torch.where(theirs.isfinite(), mean, mine)


class RunningMinMax(_Mean):
    """Exponential moving average of the extremes: range = momentum * range + (1 - momentum) * newest.

    Over processes, whose tensors come in no order, the mean of their averages.
    """

    def __init__(self, spec: GridSpec, momentum: float) -> None:
        super().__init__(spec)
        self.momentum = momentum
        self.weight = 1

    def merge(self, old: Tensor, new: Tensor, lower: bool) -> Tensor:
        """Moving average of a bound."""
        return moving_average(old, new, self.momentum)


class Percentile(_Mean):
    """Mean over the observed tensors of the values that leave (100 - percentile) % beyond them on either side."""

    def __init__(self, spec: GridSpec, percentile: float) -> None:
        super().__init__(spec)
        self.percentile = percentile

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two percentiles of each row; values that are not finite count as 0."""
        rows = rows_of(x, self.spec).float()
        rows = torch.where(rows.isfinite(), rows, 0.0)
        n = rows.shape[1]
        k = min(n, max(1, round(n * self.percentile / 100)))
        shape = checks.scale_shape(x, self.spec.axis, self.spec.group_size)
        return rows.kthvalue(n + 1 - k, 1).values.view(shape), rows.kthvalue(k, 1).values.view(shape)

    def observe(self, x: Tensor) -> None:
        """Take a tensor into account. x: any floating dtype."""
        self.weight += 1
        super().observe(x)

    def merge(self, old: Tensor, new: Tensor, lower: bool) -> Tensor:
        """Running mean of a bound."""
        return _mean(old, new, 1 / self.weight)


def rows_of(x: Tensor, spec: GridSpec) -> Tensor:
    """x: any shape -> [scales, elements of each]."""
    x = x.detach()
    if spec.axis is None:
        return x.reshape(1, -1)
    x = x.movedim(spec.axis, 0)
    return x.reshape(math.prod(checks.scale_shape(x, 0, spec.group_size)), -1)
