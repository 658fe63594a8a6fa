"""A depth-wise separable network for the 8x8 digits: MobileNet's building block, small enough to train in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class SeparableBlock(nn.Sequential):
    """A depth-wise 3x3 and a point-wise 1x1 convolution, each with BN and ReLU (Howard et al., "MobileNets", 2017).

    Args:
        in_channels, channels: channels of the input and of the output.
        stride: of the depth-wise convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = _conv_bn_relu(in_channels, in_channels, 3, stride, groups=in_channels)
        self.pointwise = _conv_bn_relu(in_channels, channels, 1)


class DigitsNet(nn.Module):
    """Classifier of 8x8 gray images: one convolution, three separable blocks, global average, one linear layer.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(1, 16, 3)
        self.blocks = nn.Sequential(SeparableBlock(16, 32, 1), SeparableBlock(32, 64, 2), SeparableBlock(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, 8, 8] to logits [N, num_classes]."""
        x = self.blocks(self.stem(x))
        return self.linear(torch.mean(x, dim=(2, 3)))
