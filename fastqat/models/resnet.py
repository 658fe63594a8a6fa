"""ResNet for CIFAR: He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2.

The shortcuts have no parameters (option A of the paper: stride, then zero channels), and the state_dict keys are those
of the public checkpoints of Y. Idelbayev (pytorch_resnet_cifar10).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut around them.

    Args:
        in_channels, channels: channels of the input and of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.stride = stride
        self.new_channels = channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every ``stride``-th pixel, half of the new zero channels before the old ones and half behind."""
        if self.stride == 1 and not self.new_channels:
            return x
        before = self.new_channels // 2
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for 32x32 colour images: three stages of 16, 32 and 64 channels.

    Args:
        blocks: blocks per stage; the depth is ``6 * blocks + 2``.
        num_classes: number of logits.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, dim=(2, 3)))


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20: 0.27 M parameters, 41 M multiply-adds per image."""
    return ResNet(3, num_classes)
