"""``Histogram``: how often values occur, and from that the squared error of any number of candidate grids."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**17  # values counted at a time: their indices stay in a cache
MOST_BINS = 2**21  # of all scales together, 16 MiB; then each has fewer
FEWEST_BINS = 64
SMALLEST_EXPONENT = -100  # narrower bins than these would leave the range of float32
ROWS_AT_ONCE = 16  # scales whose candidates are tried together


class Histogram:
    """Counts of the values of any number of tensors, for each scale in bins of one width.

    Widths are powers of two, and edges multiples of them: a range that grows, and the histogram of another process, are
    taken in without any loss, as pairs of bins become one. Zeros are not counted, for every grid holds 0.

    Args:
        bins: on either side of 0, a power of two, of which the values fill at least half; fewer for many scales.

    Attributes:
        counts: int64 [scales, 2 * bins], from the first tensor on.
        exponent: int64 [scales]; the bins lie between -2^exponent and 2^exponent.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.counts: Tensor
        self.exponent: Tensor | None = None

    def add(self, rows: Tensor, extent: Tensor) -> None:
        """Count values.

        Args:
            rows: floating [scales, elements]; values that are not finite are left out.
            extent: float32 [scales], the largest finite magnitude of each.
        """
        exponent = torch.frexp(extent).exponent.long().clamp(min=SMALLEST_EXPONENT)
        exponent = torch.where(extent > 0, exponent, SMALLEST_EXPONENT)  # nothing to hold yet
        if self.exponent is None:
            while self.bins > FEWEST_BINS and 2 * self.bins * len(rows) > MOST_BINS:
                self.bins //= 2
            self.counts = torch.zeros(len(rows), 2 * self.bins, dtype=torch.int64, device=rows.device)
            self.exponent = exponent
        self._widen(exponent)
        per_unit = torch.ldexp(torch.full_like(extent, self.bins), -self.exponent)[:, None]
        first = (torch.arange(len(rows), device=rows.device) * 2 * self.bins + self.bins)[:, None]
        total = self.counts.numel()
        for piece in rows.split(max(1, max(PIECE, total) // max(1, len(rows))), 1):
            piece = piece.float()
            index = (piece * per_unit).floor_().long() + first
            index = torch.where(piece.isfinite() & (piece != 0), index, total)
            self.counts += torch.bincount(index.reshape(-1), minlength=total + 1)[:-1].view_as(self.counts)

    def join(self, other: Histogram) -> None:
        """Add the counts of another one of the same scales."""
        assert other.exponent is not None and self.exponent is not None, "add() comes first"
        self._widen(other.exponent)
        other._widen(self.exponent)
        self.counts += other.counts

    def _widen(self, exponent: Tensor) -> None:
        """Make the bins reach at least to 2^exponent."""
        assert self.exponent is not None
        doublings = (exponent - self.exponent).clamp(0, 62)[:, None]
        if not doublings.any():
            return
        index = torch.arange(-self.bins, self.bins, device=exponent.device) >> doublings
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, index + self.bins, self.counts)
        self.exponent = torch.maximum(exponent, self.exponent)

    def squared_errors(self, scales: Tensor, zero_points: Tensor, qmin: int, qmax: int, beyond: float) -> Tensor:
        """Sum of (fake_quantize(v) - v)^2 over all values, each taken to lie in the middle of its bin.

        Args:
            scales, zero_points: float32 [K, scales].
            qmin, qmax: of the codes.
            beyond: weight of the errors of values outside the grid.

        Returns:
            float64 [K, scales].
        """
        assert self.exponent is not None, "add() comes first"
        width = torch.ldexp(torch.ones_like(self.exponent, dtype=torch.float64), self.exponent) / self.bins
        zeros = zero_points.double().round().clamp(qmin, qmax)
        pieces = (v.split(ROWS_AT_ONCE, -1) for v in (self.counts.t(), width, scales.double(), zeros))
        each = [_errors(n.t(), w, s, z, qmin, qmax, beyond) for n, w, s, z in zip(*pieces, strict=True)]
        return torch.cat(each, -1)


def _errors(counts: Tensor, width: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int, beyond: float) -> Tensor:
    """Squared errors from sums of v^0, v^1 and v^2 over the bins below an edge; all in float64.

    Args:
        counts: int64 [R, bins]; width: [R].
        s, z: [K, R], z an integer.
        qmin, qmax, beyond: as for Histogram.squared_errors.
    """
    bins = counts.shape[1]
    middles = (torch.arange(bins, dtype=torch.float64, device=counts.device) - bins // 2 + 0.5) * width[:, None]
    moments = [counts * middles**power for power in range(3)]
    below = [torch.nn.functional.pad(m.cumsum(1), (1, 0)) for m in moments]  # [R, bins + 1]

    def sums_below(edge: Tensor) -> list[Tensor]:
        """Of the bins whose middle is below an edge. [K, R, E] -> three of [K, R, E]."""
        index = ((edge / width[:, None] - 0.5).ceil() + bins // 2).clamp(0, bins).long()
        return [sums.expand(len(s), -1, -1).gather(2, index) for sums in below]

    s, z = s[..., None], z[..., None]
    codes = torch.arange(qmin, qmax + 1, device=s.device, dtype=s.dtype)
    values = s * (codes - z)  # [K, R, codes]
    number, total, squares = (m.sum(1)[:, None].expand(len(s), -1, -1) for m in moments)
    edges = sums_below(s * (codes[:-1] + 0.5 - z))
    none = torch.zeros_like(s)
    count, first = (torch.cat([none, e, all_], 2).diff() for e, all_ in ((edges[0], number), (edges[1], total)))
    errors = squares[..., 0] - 2 * (values * first).sum(2) + (values**2 * count).sum(2)
    if beyond != 1:
        low, high = values[..., :1], values[..., -1:]
        n, v, v2 = sums_below(low)
        m, w, w2 = (all_ - some for all_, some in zip((number, total, squares), sums_below(high), strict=True))
        saturated = v2 - 2 * low * v + low**2 * n + w2 - 2 * high * w + high**2 * m
        errors = errors + (beyond - 1) * saturated[..., 0]
    return errors.clamp(min=0)
