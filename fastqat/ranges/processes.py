"""One range for all processes of data-parallel training."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastqat.ranges.extremes import Estimator

T = TypeVar("T")


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def merged(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest lower and largest upper bounds of all processes, in one all_reduce on the device.

    For ranges that follow the data while training: every process calls it in the same forward, and none waits for the
    host. Where torch.distributed is not initialized, the bounds come back as they are.

    Args:
        low, high: float32 of one shape; +inf and -inf where a process has no data.

    Returns:
        The bounds of all; low and high stay as they are.
    """
    if not _initialized():
        return low, high
    bounds = torch.stack([-low, high])
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    return -bounds[0], bounds[1]


def gathered(fact: T, device: torch.device | str = "cpu") -> list[T]:
    """What each process has, by rank.

    Args:
        fact: anything that can be pickled.
        device: where its tensors are put.
    """
    if not _initialized() or dist.get_world_size() == 1:
        return [fact]
    buffer = io.BytesIO()  # of torch.save, which lets tensors of one GPU be read on another
    torch.save(fact, buffer)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, buffer.getvalue())
    return [torch.load(io.BytesIO(part), map_location=device, weights_only=False) for part in parts]


def joined(estimators: Mapping[bool, Any], device: torch.device | str = "cpu") -> dict[bool, Estimator]:
    """The estimators of one quantizer with what all processes have observed, the same to the bit in each.

    Args:
        estimators: by the sign of their codes, of this process; empty where it has observed nothing. A sign that is
            ruled out in one process is so in all.
        device: of the quantizer.
    """
    of_ranks = [each for each in gathered(dict(estimators), device) if each]
    signs = [sign for sign in (False, True) if of_ranks and all(sign in each for each in of_ranks)]
    for sign in signs:
        for other in of_ranks[1:]:
            of_ranks[0][sign].join(other[sign])
    return {sign: of_ranks[0][sign] for sign in signs}
