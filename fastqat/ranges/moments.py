"""Ranges from the spread of values, where learning begins: their standard deviation, or their mean magnitude."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastqat.ops.grids import filled
from fastqat.ranges.extremes import GridSpec, MinMax, rows_of

HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |v| for v of a standard normal distribution


class Moments(MinMax):
    """Number, mean, squared deviations and mean magnitude of all finite values of all observed tensors.

    Args:
        spec: of the quantizer, whose grid is symmetric.
        name: "std": the range, of which qmax is the end, is 3 standard deviations; of unsigned codes 3 std / sqrt(1 -
            2/pi), as if the values were the positive half of a normal distribution. "std_open": the same, and qmax is a
            step below its end. "mean_abs": the scale is 2 mean|x| / sqrt(qmax).

    Source: LBT (ECCV 2024) and EWGS (2104.00903) for "std"; TRS (2404.19248), section 3, for "std_open"; LSQ
        (1902.08153), section 2.1, for "mean_abs".
    """

    def __init__(self, spec: GridSpec, name: str) -> None:
        super().__init__(spec)
        self.name = name
        self.sums: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # float64 [scales] each

    def observe(self, x: Tensor) -> None:
        """Take a tensor into account. x: any floating dtype."""
        super().observe(x)
        rows = rows_of(x, self.spec).double()
        finite = rows.isfinite()
        rows = torch.where(finite, rows, 0.0)
        count = finite.sum(1).double()
        mean = rows.sum(1) / count.clamp(min=1)
        deviations = torch.where(finite, rows - mean[:, None], 0.0).square().sum(1)
        self._take(count, mean, deviations, rows.abs().sum(1))

    def join(self, other: MinMax) -> None:
        """Take in what another one has observed in another process."""
        assert isinstance(other, Moments) and other.sums is not None
        super().join(other)
        self._take(*other.sums)

    def _take(self, count: Tensor, mean: Tensor, deviations: Tensor, magnitude: Tensor) -> None:
        """Add the sums of other values; squared deviations are about the mean of each part, and move to that of all."""
        if self.sums is None:
            self.sums = count, mean, deviations, magnitude
            return
        n, m, d, a = self.sums
        total = (n + count).clamp(min=1)
        shift = mean - m
        deviations = d + deviations + shift.square() * n * count / total
        self.sums = n + count, m + shift * count / total, deviations, a + magnitude

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 of the shape of a scale."""
        assert self.sums is not None, "observe() comes first"
        count, _, deviations, magnitude = self.sums
        qmax = max(self.spec.qmax, 1)
        if self.name == "mean_abs":
            scale = 2 * magnitude / count.clamp(min=1) / math.sqrt(qmax)
        else:
            std = (deviations / (count - 1).clamp(min=1)).sqrt()
            end = self.spec.qmax + 1 if self.name == "std_open" else qmax
            scale = 3 * std / (1.0 if self.spec.qmin < 0 else HALF_NORMAL) / end
        scale = filled(scale.float()).view(self.bounds()[0].shape)
        return scale, torch.zeros_like(scale)
