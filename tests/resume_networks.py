"""Networks for the tests of resuming and of several processes."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor, nn


class Dropped(nn.Module):
    """A small convolutional classifier of 8x8 digits with BN, and with dropout, which draws random numbers."""

    def __init__(self, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(8 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.linear(self.dropout(torch.relu(self.depthwise(x)).flatten(1)))


def without_batch_norm(num_classes: int) -> nn.Module:
    """A classifier that sees every image by itself."""
    convolution = nn.Conv2d(1, 8, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, num_classes))


class Stopping(Dropped):
    """Asks the second process to stop in its training step number STOP_AT, if the environment has one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        if self.training and str(self.steps) == os.environ.get("STOP_AT") and os.environ.get("RANK") == "1":
            signal.raise_signal(signal.SIGTERM)
        return super().forward(x)
