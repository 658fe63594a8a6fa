"""Ranges that go on following the data while training: what they keep, and how they move from step to step.

The current and the running min-max take in a tensor before it is quantized, which reads it twice. In hindsight, a range
takes in what was seen before; what it is used for is read once. Source of that: Fournarakis and Nagel, In-Hindsight
Quantization Range Estimation (2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastqat import functional, ranges
from fastqat.nn.sharded import is_sharded, write_parameter
from fastqat.nn.spec import FOLLOWING
from fastqat.nn.state import QuantizerState
from fastqat.ops import one_tensor

_ops = torch.ops.fastqat


class FollowingRange(QuantizerState):
    """Base of quantizers: the state of a range that follows the data; all None where it does not."""

    scale: nn.Parameter
    zero_point: nn.Parameter | None
    qrange: Tensor
    range_low: Any  # Tensor or None, like the scale; the range that is used now
    range_high: Any
    new_low: Any  # what was seen since it moved, of "in_hindsight"
    new_high: Any
    observed_step: Any  # int64 [1], when it moved
    tracked: bool
    sync_range: bool
    axis: int | None
    group_size: int | None
    range: str
    learn: str | None
    momentum: float

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        for name in ("range_low", "range_high", "new_low", "new_high", "observed_step"):
            self.register_buffer(name, None)

    def _make_range(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Make the state, of the shape of the scale, once it is known."""
        if self.range not in FOLLOWING or self.learn is not None or self.range_low is not None:
            return
        self.range_low, self.range_high = (torch.zeros(shape, device=device, dtype=torch.float32) for _ in range(2))
        self.observed_step = torch.full((1,), -1, dtype=torch.int64, device=device)
        if self.range == "in_hindsight":
            self.new_low = torch.full(shape, torch.inf, dtype=torch.float32, device=device)
            self.new_high = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)

    def _begin_range(self, low: Tensor, high: Tensor) -> None:
        """Begin with a range, and with nothing seen since."""
        self.range_low.copy_(low)
        self.range_high.copy_(high)
        self.observed_step.copy_(self.step)
        if self.new_low is not None:
            self.new_low.fill_(torch.inf)
            self.new_high.fill_(-torch.inf)

    @torch.no_grad()
    def grid_for(self, x: Tensor, gathers: bool = False) -> tuple[Tensor, Tensor | None]:
        """Grid of the data so far, for the ranges that follow it: device operations only.

        Time is an optimizer step: of a quantizer that follows a weight the range moves with the first tensor of a step,
        so that a forward that is computed again sees the same range. "in_hindsight" moves it by what was seen before,
        and takes note of every tensor. Returns new tensors; what earlier forwards saved stays as it was.

        Args:
            x: the tensor, behind its activation function.
            gathers: whoever quantizes x widens new_low and new_high himself, and calls :meth:`merge_ranks`.
        """
        if self.new_low is None:
            return self._advance(*self.merge_ranks(*self._extremes(x)))
        grid = self._advance(self.new_low, self.new_high)
        if not gathers:
            low, high = self._extremes(x)
            self.new_low.copy_(torch.minimum(self.new_low, low))
            self.new_high.copy_(torch.maximum(self.new_high, high))
            self.merge_ranks(self.new_low, self.new_high)
        return grid

    def write_range_to_shards(self) -> None:
        """Let the parameters be the grid of the range, where what a forward pass wrote into them is lost at its end."""
        if self.range_low is None or not is_sharded(self._parameters["scale"]):
            return
        codes = self.qrange[0], self.qrange[1]
        bounds = self.range_low, self.range_high
        scale, zero_point = ranges.grid_from_range(*bounds, *codes, symmetric=self.zero_point is None)
        write_parameter(self.scale, scale)
        if self.zero_point is not None:
            write_parameter(self.zero_point, zero_point)

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.minmax(x.detach(), axis=self.axis, group_size=self.group_size)

    def _advance(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Move the range by what was seen, once per step, and return its grid."""
        advance = _ops.advance_range if self.axis is None else one_tensor.advance_range  # the op knows one scale
        scale = torch.empty_like(self.scale)
        zero_point = torch.empty_like(scale if self.zero_point is not None else scale[:0])
        advance(
            self.qrange,
            self.step,
            not self.tracked,
            0.0 if self.range == "minmax" else self.momentum,
            self.range_low,
            self.range_high,
            low,
            high,
            self.observed_step,
            scale,
            zero_point,
        )
        self.scale.copy_(scale)
        if self.zero_point is None:
            return scale, None
        self.zero_point.copy_(zero_point)
        return scale, zero_point

    def merge_ranks(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Widen both, in place, to hold those of all processes, where that is wanted."""
        if self.sync_range and self.training:  # evaluation may be of one process alone
            for mine, of_all in zip((low, high), ranges.merged(low, high), strict=True):
                mine.copy_(of_all)
        return low, high
