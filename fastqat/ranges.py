"""Range estimators: from the tensors that a quantizer sees to the scale and zero point of its grid.

Each estimator observes any number of tensors and then gives one grid. Source of all: White Paper on Neural Network
Quantization (2106.08295), section 3.1; settings of the mean squared error search after Nagel et al. (ICML 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastqat import functional
from fastqat.ops import checks
from fastqat.ops.grids import filled, grid_from_range, moving_average

CANDIDATES = 100  # ranges tried by the search on a symmetric grid: max|x| * k / 100
CANDIDATES_PER_SIDE = 16  # on an affine grid: lower bounds times upper bounds


@dataclass(frozen=True)
class GridSpec:
    """What a range estimator must know of a quantizer: its granularity and its codes, as ints."""

    axis: int | None
    group_size: int | None
    qmin: int
    qmax: int
    symmetric: bool


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

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 of the shape of a scale."""
        assert self.low is not None and self.high is not None, "observe() comes first"
        return grid_from_range(self.low, self.high, self.spec.qmin, self.spec.qmax, self.spec.symmetric)


class RunningMinMax(MinMax):
    """Exponential moving average of the extremes: range = momentum * range + (1 - momentum) * newest."""

    def __init__(self, spec: GridSpec, momentum: float) -> None:
        super().__init__(spec)
        self.momentum = momentum

    def merge(self, old: Tensor, new: Tensor, lower: bool) -> Tensor:
        """Moving average of a bound."""
        return moving_average(old, new, self.momentum)


class Percentile(MinMax):
    """Mean over the observed tensors of the values that leave (100 - percentile) % beyond them on either side."""

    def __init__(self, spec: GridSpec, percentile: float) -> None:
        super().__init__(spec)
        self.percentile = percentile
        self.count = 0

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two percentiles of each row; values that are not finite count as 0."""
        shape = checks.scale_shape(x, self.spec.axis, self.spec.group_size)
        rows = x.detach().float()
        if self.spec.axis is not None:
            rows = rows.movedim(self.spec.axis, 0)
        rows = rows.reshape(torch.Size(shape).numel(), -1)
        rows = torch.where(rows.isfinite(), rows, 0.0)
        n = rows.shape[1]
        k = min(n, max(1, round(n * self.percentile / 100)))
        return rows.kthvalue(n + 1 - k, 1).values.view(shape), rows.kthvalue(k, 1).values.view(shape)

    def merge(self, old: Tensor, new: Tensor, lower: bool) -> Tensor:
        """Running mean of a bound."""
        self.count += lower
        return old + (new - old) / (self.count + 1)


class MeanSquaredError:
    """The candidate grid with the least squared quantization error over all observed tensors.

    The candidates are fractions of the range of the first tensor: ``CANDIDATES`` of max|x| on a symmetric grid, and all
    pairs of ``CANDIDATES_PER_SIDE`` fractions of its two bounds on an affine one.
    """

    def __init__(self, spec: GridSpec) -> None:
        self.spec = spec
        self.scales: Tensor  # [K, *scale], from the first tensor on
        self.zero_points: Tensor
        self.errors: Tensor | None = None  # float64 [K, *scale]

    def _candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = functional.minmax(x, axis=self.spec.axis, group_size=self.spec.group_size)
        if self.spec.symmetric:
            shrink_low = shrink_high = torch.arange(1, CANDIDATES + 1, device=x.device) / CANDIDATES
        else:
            side = torch.arange(1, CANDIDATES_PER_SIDE + 1, device=x.device) / CANDIDATES_PER_SIDE
            shrink_low, shrink_high = torch.cartesian_prod(side, side).unbind(1)

        def grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return grid_from_range(low * a, high * b, self.spec.qmin, self.spec.qmax, self.spec.symmetric)

        return torch.vmap(grid)(shrink_low, shrink_high)

    def observe(self, x: Tensor) -> None:
        """Add the errors of a tensor. x: any floating dtype."""
        x = x.detach()
        if self.errors is None:
            self.scales, self.zero_points = self._candidates(x)
            self.errors = torch.zeros_like(self.scales, dtype=torch.float64)
        self.errors += functional.range_search(
            x,
            self.scales,
            None if self.spec.symmetric else self.zero_points,
            qmin=self.spec.qmin,
            qmax=self.spec.qmax,
            axis=self.spec.axis,
            group_size=self.spec.group_size,
        )

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 of the shape of a scale."""
        assert self.errors is not None, "observe() comes first"
        best = self.errors.argmin(0, keepdim=True)
        blind = (self.errors == 0).all(0)  # no data but zeros: every candidate is as good
        scale = torch.where(blind, 0.0, self.scales.gather(0, best)[0])
        return filled(scale), self.zero_points.gather(0, best)[0]


Estimator = MinMax | MeanSquaredError
ESTIMATORS = ("minmax", "running_minmax", "percentile", "mse")


def estimator(name: str, spec: GridSpec, *, momentum: float, percentile: float) -> Estimator:
    """Make a range estimator by its name, one of :data:`ESTIMATORS`."""
    checks.choice("range", name, ESTIMATORS)
    if name == "minmax":
        return MinMax(spec)
    if name == "running_minmax":
        return RunningMinMax(spec, momentum)
    if name == "percentile":
        return Percentile(spec, percentile)
    return MeanSquaredError(spec)
