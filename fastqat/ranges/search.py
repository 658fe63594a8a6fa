"""Ranges by search: of many candidate grids the one with the least quantization error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastqat import functional
from fastqat.ops.grids import filled, grid_from_range
from fastqat.ranges.extremes import GridSpec, MinMax, rows_of
from fastqat.ranges.histogram import Histogram

FRACTIONS = 100  # ranges tried on a symmetric grid: max|x| * k / 100
FRACTIONS_PER_SIDE = 16  # on an affine grid: lower bounds times upper bounds
STEP_SIZES, STEP_SIZES_AFFINE, OFFSETS = 101, 17, 21
MIN_RANGE = 0.01

Candidates = Callable[[GridSpec, Tensor, Tensor], tuple[Tensor, Tensor]]


def fractions(spec: GridSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Grids that cover fractions of a range.

    ``FRACTIONS`` of max|x| on a symmetric grid, all pairs of ``FRACTIONS_PER_SIDE`` fractions of the two bounds on an
    affine one. Source of the setting: Nagel et al. (ICML 2022).

    Args:
        spec: of the quantizer.
        low, high: float32, of the shape of a scale.

    Returns:
        scales and zero points, float32 [K, *scale].
    """
    if spec.symmetric:
        shrink_low = shrink_high = torch.arange(1, FRACTIONS + 1, dtype=low.dtype, device=low.device) / FRACTIONS
    else:
        side = torch.arange(1, FRACTIONS_PER_SIDE + 1, dtype=low.dtype, device=low.device) / FRACTIONS_PER_SIDE
        shrink_low, shrink_high = torch.cartesian_prod(side, side).unbind(1)
    shape = (-1,) + (1,) * low.dim()
    return _grids(spec, low * shrink_low.view(shape), high * shrink_high.view(shape))


def step_sizes(spec: GridSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Grids of AIMET's "tf_enhanced": step sizes that are fractions of that of the whole range, and offsets.

    ``STEP_SIZES`` of k/100 on a symmetric grid. On an affine one ``STEP_SIZES_AFFINE`` of k/16, each with ``OFFSETS``
    places of 0 on the grid, no further than the range itself, and the whole range. A range has at least ``MIN_RANGE``.
    Departure: in AIMET a step size that was cut at the range stays so for the offsets that follow.

    Args, returns: as :func:`fractions`.

    Source: AIMET (2201.08442), TfEnhancedEncodingAnalyzer.
    """
    low, high = (torch.where(bound.isfinite(), bound, 0.0) for bound in (low, high))
    low, high = low.clamp(max=0), high.clamp(min=0)
    high = torch.maximum(high, low + MIN_RANGE)
    shape = (-1,) + (1,) * low.dim()
    if spec.symmetric:
        fraction = torch.arange(1, STEP_SIZES + 1, dtype=low.dtype, device=low.device).view(shape) / (STEP_SIZES - 1)
        return _grids(spec, low * fraction, high * fraction)
    size = torch.arange(1, STEP_SIZES_AFFINE + 1, dtype=low.dtype, device=low.device) / (STEP_SIZES_AFFINE - 1)
    place = torch.linspace(0, 1, OFFSETS, dtype=low.dtype, device=low.device)
    size, place = (v.view(shape) for v in torch.cartesian_prod(size, place).unbind(1))
    length = (high - low) * size
    tried_low, tried_high = torch.maximum(low, -length * place), torch.minimum(high, length * (1 - place))
    none = tried_high <= tried_low
    tried_low, tried_high = torch.where(none, low, tried_low), torch.where(none, high, tried_high)
    return _grids(spec, torch.cat([tried_low, low[None]]), torch.cat([tried_high, high[None]]))


def _grids(spec: GridSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points of many ranges: [K, *scale]."""
    each = torch.vmap(lambda a, b: grid_from_range(a, b, spec.qmin, spec.qmax, spec.symmetric))
    return each(low, high)


def least(errors: Tensor, scales: Tensor, zero_points: Tensor, blind: Tensor) -> tuple[Tensor, Tensor]:
    """The first candidate with the least error.

    Args:
        errors, scales, zero_points: [K, *scale].
        blind: bool [*scale], where there is no data; the largest scale of the others will do.
    """
    best = errors.argmin(0, keepdim=True)
    return filled(torch.where(blind, 0.0, scales.gather(0, best)[0])), zero_points.gather(0, best)[0]


class MeanSquaredError(MinMax):
    """The candidate grid with the least squared error on one tensor, to the digit."""

    def observe(self, x: Tensor) -> None:
        """Look at the tensor, which must not change until the grid is known. x: any floating dtype."""
        super().observe(x)
        self._x = x.detach()

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 of the shape of a scale."""
        spec = self.spec
        scales, zero_points = fractions(spec, *self.bounds())
        errors = functional.range_search(
            self._x,
            scales,
            None if spec.symmetric else zero_points,
            qmin=spec.qmin,
            qmax=spec.qmax,
            axis=spec.axis,
            group_size=spec.group_size,
        )
        return least(errors, scales, zero_points, (errors == 0).all(0))


class HistogramSearch(MinMax):
    """The candidate grid with the least error over all observed tensors, which are kept as a histogram.

    The candidates are those of the range of all tensors, of which the last may be the largest.

    Args:
        spec: of the quantizer.
        candidates: :func:`fractions` or :func:`step_sizes`.
        bins: of the histogram, on either side of 0.
        beyond: weight of the squared errors of values outside the grid.
    """

    def __init__(self, spec: GridSpec, candidates: Candidates, bins: int, beyond: float) -> None:
        super().__init__(spec)
        self.candidates, self.beyond = candidates, beyond
        self.histogram = Histogram(bins)

    def observe(self, x: Tensor) -> None:
        """Take a tensor into account. x: any floating dtype."""
        super().observe(x)
        extent = torch.stack([b.where(b.isfinite(), 0).abs() for b in self.bounds()]).amax(0)
        self.histogram.add(rows_of(x, self.spec), extent.flatten())

    def join(self, other: MinMax) -> None:
        """Take in what another one has observed in another process."""
        assert isinstance(other, HistogramSearch)
        super().join(other)
        self.histogram.join(other.histogram)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 of the shape of a scale."""
        low, high = self.bounds()
        scales, zero_points = self.candidates(self.spec, low, high)
        found = self.histogram.squared_errors(
            scales.flatten(1), zero_points.flatten(1), self.spec.qmin, self.spec.qmax, self.beyond
        )
        blind = self.histogram.counts.sum(1).view(low.shape) == 0
        return least(found.view_as(scales), scales, zero_points, blind)
