"""Scales at their floor: quantizers whose tensor is 0, or clipped to next to nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastqat.nn.fake_quant import FakeQuant


@torch.no_grad()
def count_at_floor(quantizer: Any) -> int:
    """How many scales of a quantizer are not above its eps, which then stands for them; reads them back.

    Channels of a weight that is still zero, or grows from there, are none; nor is a scale that is not set yet.
    """
    if not isinstance(quantizer, FakeQuant) or not quantizer.initialized or is_lazy(quantizer.scale):
        return 0
    low = ~(quantizer.scale > quantizer.eps)  # NaN, too
    if quantizer.growing and quantizer.growth is not None:
        low &= quantizer.growth.growing == 0
    return int(low.sum())


def scales_at_floor(model: nn.Module) -> dict[str, int]:
    """Quantizers with scales at their floor: what they quantize is 0, or is clipped to next to nothing.

    Args:
        model: any module.

    Returns:
        name of the quantizer in the model -> number of its scales that are not above eps; only those that have any.
    """
    found = {name: count_at_floor(module) for name, module in model.named_modules() if isinstance(module, FakeQuant)}
    return {name: count for name, count in found.items() if count}
