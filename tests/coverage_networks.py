"""A network whose largest layer no quantizer takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mixing(nn.Module):
    """Products with a Parameter that are no layer of torch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix


def mostly_float(num_classes: int) -> nn.Module:
    """4,096 of 4,736 multiplications are in float."""
    return nn.Sequential(nn.Flatten(), Mixing(64), nn.Linear(64, num_classes))
