"""From a range to a quantization grid, and from the ranges of many tensors to one."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_from_range(
    low: Tensor, high: Tensor, qmin: Tensor | int, qmax: Tensor | int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [low, high] and holds 0 exactly.

    symmetric:  s = max(|low|, |high|) / qmax  (|high| alone for unsigned codes),  z = 0
    affine:     s = (high - low) / (qmax - qmin),  z = qmin - low / s, unrounded

    A range without extent (all zeros, or no finite value) takes the largest scale of the others, or 1.

    Args:
        low, high: float32, any shape; widened to hold 0.
        qmin, qmax: lowest and highest code, ints or 0-dim tensors on the device of low.
        symmetric: no zero point.

    Returns:
        scale and zero_point, float32, like low.
    """
    low = torch.where(low.isfinite(), low, 0.0).clamp(max=0)
    high = torch.where(high.isfinite(), high, 0.0).clamp(min=0)
    qmin, qmax = (torch.as_tensor(q, dtype=torch.float32, device=low.device) for q in (qmin, qmax))
    if symmetric:
        extent = torch.where(qmin < 0, torch.maximum(-low, high), high)
        scale = extent / torch.where(qmax > 0, qmax, 1.0)  # signed codes of 1 bit are -1 and 0
    else:
        scale = (high - low) / (qmax - qmin)
    scale = filled(scale)
    zero_point = torch.zeros_like(scale) if symmetric else (qmin - low / scale)
    return scale, zero_point


def filled(scale: Tensor) -> Tensor:
    """Scales with the largest of them, or 1, in the place of those that are 0."""
    largest = scale.amax()
    return torch.where(scale > 0, scale, torch.where(largest > 0, largest, 1.0))


def moving_average(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """momentum * old + (1 - momentum) * new; a bound that is not finite comes from no data and does not count.

    What comes again as it was is its own average, without rounding.
    """
    average = torch.where(old == new, old, momentum * old + (1 - momentum) * new)
    average = torch.where(old.isfinite(), average, new)
    return torch.where(new.isfinite(), average, old)
