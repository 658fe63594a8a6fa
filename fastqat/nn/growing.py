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
LEARNED_WIDENING = 1.25  # by which a range at most widens while the steps double before it is learned instead


class Growth(nn.Module):
    """Min-max range of the channels of a weight that were zero when its quantizer first saw it.

    In training, each of these channels has the range of its weights, as with range="minmax", until it has settled: it
    has not widened while the number of steps doubled, which is looked at after 128, 256, 512, ... steps. Then it stays.
    A learned one goes on by itself: it has settled where it has widened by less than a quarter. A channel that is
    still zero after 1024 steps takes the largest scale of the others.

    Args:
        shape: of the scale.
        device: of the state.

    Attributes:
        growing: float32, like the scale; not 0 for channels that follow their weights. No bool: averages of models take
            differences.
        low, high: float32, like the scale; the range in the last training forward.
        reference: float32, like the scale; the extent when it was last looked at.
        steps: int64 [1], since the weight was first seen to be not zero.
    """

    growing: Tensor
    low: Tensor
    high: Tensor
    reference: Tensor
    steps: Tensor

    @torch.inference_mode(False)  # what inference makes, training could not change
    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        for name in ("growing", "low", "high", "reference"):
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
        """Give the growing channels the grid of their range."""
        qmin, qmax = quantizer.qrange.unbind()  # of the device: another bit-width may be tried
        if quantizer.count_from == "lowest":
            qmin, qmax = -(qmax // 2), qmax // 2
        scale, zero_point = ranges.grid_from_range(self.low, self.high, qmin, qmax, quantizer.symmetric)
        has_range = (self.growing > 0) & (self.extent > 0)
        _put(quantizer.scale, has_range, scale)
        if quantizer.zero_point is not None:
            _put(quantizer.zero_point, has_range, zero_point)
        if quantizer.offset is not None:
            _put(quantizer.offset, has_range, -scale * zero_point)

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
        if self._count < FIRST_LOOK or not is_power_of_two or _is_capturing():
            return True
        extent, growing = self.extent, self.growing > 0
        widening = 1.0 if quantizer.learn is None else LEARNED_WIDENING
        growing &= ~((extent > 0) & (extent <= widening * self.reference))
        if self._count >= LAST_WAIT:
            given_up = growing & (extent == 0)
            _put(quantizer.scale, given_up, _whole(quantizer.scale).amax())
            growing &= ~given_up
        self.growing.copy_(growing)
        self.reference.copy_(extent)
        return bool(growing.any())

    def count_from(self, other: Growth) -> None:
        """Be as far as another one, on the host; tensors are not copied."""
        self._count = other._count

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if prefix + "growing" not in state_dict:  # the quantizer knows what that means
            return
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._count = int(self.steps)


def _whole(parameter: Any) -> Tensor:
    return parameter.full_tensor() if is_sharded(parameter) else parameter.data


def _put(parameter: Any, where: Tensor, value: Tensor) -> None:
    """Write into a parameter, past the version counters of autograd.

    What an earlier forward pass of this step has saved for its backward pass keeps its values.
    """
    new = torch.where(where, value, _whole(parameter))
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor  # not in every build of torch

        mesh, placements = parameter.device_mesh, parameter.placements
        parameter.copy_(distribute_tensor(new, mesh, placements, src_data_rank=None))  # all processes have all of it
    else:
        parameter.data.copy_(new)


def _is_capturing() -> bool:
    """True while a CUDA graph is captured, in which nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
