"""Ranges of weights that began at zero: they grow with the weight until that has settled.

The first update of such a weight says how large a step of the optimizer is, not how large the weight will be. A range
that is estimated from it once would hold the weight there: what leaves the range gets no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastqat import ranges
from fastqat.nn.sharded import is_sharded

if TYPE_CHECKING:
    from fastqat.nn.ranged import RangedQuantizer

FIRST_LOOK = 128  # steps until the range is looked at; again at 256, 512, ...
LAST_WAIT = 1024  # steps until a channel that is still zero is waited for no longer
WIDENING = 1.25  # by which a range that has settled widens at most while the number of steps doubles


class Growth(nn.Module):
    """Min-max range of the channels of a weight that were zero when the quantizer first saw it.

    In training, each of these channels has the range of its weights, as with range="minmax". It has settled when the
    range has widened by less than a quarter while the number of steps doubled (looked at after 128, 256, 512, ... steps).
    Then it stays, or is learned from there on. One that is still zero after 1024 steps takes the largest scale of the
    others.

    Args:
        shape: of the scale.
        device: of the state.

    Attributes:
        growing: bool, like the scale; channels that follow their weights.
        low, high: float32, like the scale; the range in the last training forward.
        reference: float32, like the scale; the extent when it was last looked at.
        steps: int64 [1], since the weight was first seen to be not zero.
    """

    growing: Tensor
    low: Tensor
    high: Tensor
    reference: Tensor
    steps: Tensor

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.register_buffer("growing", torch.zeros(shape, dtype=torch.bool, device=device))
        for name in ("low", "high", "reference"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64, device=device))
        self._count = 0  # the steps, on the host

    @property
    def extent(self) -> Tensor:
        """Largest magnitude of each channel: float32, like the scale."""
        return torch.maximum(-self.low, self.high)

    @torch.no_grad()
    def observe(self, low: Tensor, high: Tensor) -> None:
        """Take in the range of the weight as it is now: device operations only, the same again for the same weight.

        Args:
            low, high: float32 like the scale; not finite where no weight is.
        """
        known = low.isfinite() & high.isfinite()
        self.low.copy_(torch.where(known, low.clamp(max=0), self.low))
        self.high.copy_(torch.where(known, high.clamp(min=0), self.high))

    @torch.no_grad()
    def write(self, quantizer: RangedQuantizer) -> None:
        """Give the growing channels the grid of their range, past the version counters of autograd.

        What an earlier forward of this step has saved for its backward pass keeps its values.
        """
        grid = ranges.grid_from_range(self.low, self.high, *quantizer.levels, quantizer.symmetric)
        has_range = self.growing & (self.extent > 0)
        self._put(quantizer, has_range, *grid)

    def _put(self, quantizer: RangedQuantizer, where: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        values = [(quantizer.scale, scale)]
        if zero_point is not None:
            values.append((quantizer.zero_point, zero_point))  # type: ignore[arg-type]  # None is passed over below
            values.append((quantizer.offset, -scale * zero_point))  # type: ignore[arg-type]
        for parameter, value in values:
            if parameter is not None and not is_sharded(parameter):
                parameter.data.copy_(torch.where(where, value, parameter.data))

    @torch.no_grad()
    def advance(self, quantizer: RangedQuantizer) -> bool:
        """Go on by an optimizer step; what that did to the scale of a growing channel is undone.

        Returns:
            True while a channel grows.
        """
        self._count += 1
        self.steps.add_(1)
        self.write(quantizer)
        is_power_of_two = not self._count & (self._count - 1)
        if self._count < FIRST_LOOK or not is_power_of_two or is_sharded(quantizer.scale) or _is_capturing():
            return True
        extent = self.extent
        growing = self.growing & ~((extent > 0) & (extent <= WIDENING * self.reference))
        if self._count >= LAST_WAIT:
            given_up = growing & (extent == 0)
            self._put(quantizer, given_up, quantizer.scale.data.amax().expand_as(extent), None)
            growing &= ~given_up
        self.growing.copy_(growing)
        self.reference.copy_(extent)
        return bool(growing.any())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if prefix + "growing" not in state_dict:  # the quantizer knows what that means
            return
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._count = int(self.steps)


def _is_capturing() -> bool:
    """True while a CUDA graph is captured, in which nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
