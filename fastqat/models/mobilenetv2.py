"""MobileNetV2: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), table 2.

The state_dict keys are those of the public checkpoints of torchvision, and of Y. Chen for CIFAR (pytorch-cifar-models).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastqat.ops.checks import fail

STAGES = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
STRIDES = (1, 2, 4, 8, 16, 32)
SMALLEST_MAP = 4  # edge of the last feature map below which an image is too small for the paper's strides


def scaled_channels(channels: int, width: float) -> int:
    """Multiply a number of channels and round it to a multiple of 8, at least 8 and never down by more than 10 %."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


class ConvBNReLU(nn.Sequential):
    """A convolution that keeps the edge of its image up to the stride, BN and ReLU6.

    Args:
        in_channels, channels: channels of the input and of the output.
        kernel, stride, groups: of the convolution.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expansion, depth-wise 3x3 and linear projection, with the input added where shapes allow it (table 1, figure 4).

    Args:
        in_channels, channels: channels of the input and of the output.
        stride: of the depth-wise convolution.
        expansion: the depth-wise convolution has so many times ``in_channels``; 1 leaves the expansion out.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [ConvBNReLU(in_channels, hidden, 1)]
        layers += [ConvBNReLU(hidden, hidden, 3, stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, channels, H / stride, W / stride]."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 for images of any size.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: multiplies all channels but those of the images and, below 1, of the last convolution (section 5).
        stride: edge of an image over the edge of the last feature map: 32 in the paper. Smaller ones make the first
            layers that would halve the image keep its size instead: the stem for 16, also the stage of 24 channels
            for 8, and so on.
        dropout: probability in front of the last layer.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        stride: int = 32,
        dropout: float = 0.2,
    ) -> None:
        if not _is_number(width) or not 0 < width < math.inf:
            fail(ValueError, "width", "a number above 0", repr(width))
        if not _is_number(stride) or stride not in STRIDES:
            fail(ValueError, "stride", f"one of {', '.join(map(str, STRIDES))}", repr(stride))
        if not _is_number(dropout) or not 0 <= dropout < 1:
            fail(ValueError, "dropout", "a probability below 1", repr(dropout))
        super().__init__()
        keep = STRIDES[-1] // stride  # halvings left out are log2 of this
        channels = scaled_channels(STEM_CHANNELS, width)
        layers: list[nn.Module] = [ConvBNReLU(in_channels, channels, 3, 2 if keep < 2 else 1)]
        keep //= 2
        for expansion, stage_channels, blocks, stage_stride in STAGES:
            if stage_stride == 2 and keep >= 2:
                stage_stride, keep = 1, keep // 2
            for block in range(blocks):
                out_channels = scaled_channels(stage_channels, width)
                layers.append(InvertedResidual(channels, out_channels, 1 if block else stage_stride, expansion))
                channels = out_channels
        features = scaled_channels(HEAD_CHANNELS, max(1.0, width))
        self.features = nn.Sequential(*layers, ConvBNReLU(channels, features, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        return self.classifier(torch.mean(self.features(x), dim=(2, 3)))


def stride_for(image_shape: tuple[int, int, int]) -> int:
    """Return the largest stride that leaves a last feature map of 4x4 or more: 32 for 224 pixels, 8 for 28 and 32."""
    edge = min(image_shape[1:])
    return max((stride for stride in STRIDES if -(-edge // stride) >= SMALLEST_MAP), default=1)


def mobilenetv2(
    num_classes: int,
    image_shape: tuple[int, int, int] = (3, 224, 224),
    *,
    width: float = 1.0,
    stride: int | None = None,
    dropout: float = 0.2,
) -> MobileNetV2:
    """Make a MobileNetV2 for images of a shape; options are those of :class:`MobileNetV2`.

    Args:
        image_shape: (C, H, W); decides ``stride`` if that is None (:func:`stride_for`).
    """
    stride = stride_for(image_shape) if stride is None else stride
    return MobileNetV2(num_classes, image_shape[0], width=width, stride=stride, dropout=dropout)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
