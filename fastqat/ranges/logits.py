"""Ranges for the logits of a classifier, where the order of the largest matters more than the error of each."""

from __future__ import annotations

import torch
from torch import Tensor

from fastqat import functional
from fastqat.ranges.extremes import GridSpec, MinMax
from fastqat.ranges.search import fractions, least


class CrossEntropy(MinMax):
    """The candidate grid with the least cross-entropy H(softmax(v), softmax(v_hat)) over all observed logits.

    The candidates are those of the mean squared error, of the range of all tensors. The logits, [..., classes], are
    kept until the grid is known; those of an example with a value that is not finite are left out.

    Source: White Paper on Neural Network Quantization (2106.08295), section 3.1, cross-entropy.
    """

    def __init__(self, spec: GridSpec) -> None:
        super().__init__(spec)
        self.logits: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        """Take logits into account. x: any floating dtype, [..., classes]."""
        super().observe(x)
        rows = x.detach().reshape(-1, x.shape[-1] if x.dim() else 1)
        self.logits.append(rows[rows.isfinite().all(1)].float())  # a copy: what comes next may change x in place

    def join(self, other: MinMax) -> None:
        """Take in what another one has observed in another process."""
        assert isinstance(other, CrossEntropy)
        super().join(other)
        self.logits += other.logits

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 [1]."""
        scales, zero_points = fractions(self.spec, *self.bounds())
        losses = torch.zeros_like(scales, dtype=torch.float64)
        for v in self.logits:
            target = v.double().softmax(1)
            for k, (scale, zero_point) in enumerate(zip(scales, zero_points, strict=True)):
                y = functional.fake_quantize(
                    v,
                    scale,
                    None if self.spec.symmetric else zero_point,
                    qmin=self.spec.qmin,
                    qmax=self.spec.qmax,
                )
                losses[k] -= (target * y.double().log_softmax(1)).sum()
        blind = torch.stack([(v == 0).all() for v in self.logits]).all().view(1)
        return least(losses, scales, zero_points, blind)
