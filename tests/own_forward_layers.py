"""Layers with a forward of their own, as other packages have them, and what each computes in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SamePadding(nn.Conv2d):
    """Pads the input by itself, and hands its weight to the function."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 1, 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Causal(nn.Conv1d):
    """Pads the input, and leaves the rest to torch's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Inner(nn.Conv2d):
    """Another convolution than torch's, by the method that torch's forward calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight, bias, (2, 2))


class Standardized(nn.Conv2d):
    """Standardizes its weight with learned gains."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = 0.3

    def computed(self) -> Tensor:
        """The weight that the convolution gets."""
        rows, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByHand(nn.Conv2d):
    """Standardizes its weight step by step, in place where it can, with a constant made on the way."""

    def computed(self) -> Tensor:
        """The weight that the convolution gets."""
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = self.weight - mean
        weight *= torch.rsqrt(torch.maximum(var, torch.tensor(1e-4)))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias)


class Multiplied(nn.Linear):
    """Writes its product as an operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class FromTheLeft(nn.Linear):
    """Has its weight on the left of the product."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(self.weight, x.t()).t() + self.bias


class Cast(nn.Linear):
    """Casts weight and bias to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), bias=self.bias.to(dtype=x.dtype))


class Normalized(nn.Linear):
    """The cosine between input and weight."""

    def computed(self) -> Tensor:
        """The weight that the product gets."""
        return F.normalize(self.weight, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.computed())


class Routed(nn.Linear):
    """Returns more than one tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, y.argmax(-1)


class Pointwise(nn.Conv1d):
    """A convolution of kernel 1 that is computed as a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.transpose(1, 2), self.weight.squeeze(-1), self.bias).transpose(1, 2)


class Columns(nn.Linear):
    """Maps from the rows of its weight to the columns, as a decoder that shares it does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


class Up(nn.ConvTranspose2d):
    """A transposed convolution that crops what it computes."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = F.conv_transpose2d(x, self.weight, self.bias, self.stride, groups=self.groups)
        return y[..., 1:, 1:]


class Scaled(nn.Embedding):
    """Scales what torch's forward looks up."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 5.0


class Positions(nn.Embedding):
    """Counts its indices by itself, from a mask."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((torch.cumsum(x, dim=1) * x).long() + 1)


class Counted(nn.Embedding):
    """Makes its indices from a shape alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(torch.arange(x.shape[1]).expand(x.shape[0], -1), self.weight)


class Sliced(nn.Embedding):
    """Takes its rows by a slice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[: x.shape[1]] + torch.zeros(x.shape[0], 1, 1)


@dataclass(frozen=True)
class Pattern:
    """A way in which layers use their weight.

    Args:
        build: the layer.
        inputs: makes what its forward takes.
        plain: what the layer computes of the input with the weight that its product gets, [output channels, ...].
        reaches: the weight that its product gets, as its quantizer sees it; None: the weight as it is.
    """

    build: Callable[[], Any]
    inputs: Callable[[], Tensor]
    plain: Callable[[Any, Tensor, Tensor], Tensor]
    reaches: Callable[[Any], Tensor] | None = None

    def __repr__(self) -> str:
        return type(self.build()).__name__

    def weight(self, layer: Any) -> Tensor:
        """The weight that reaches the product."""
        return layer.weight if self.reaches is None else self.reaches(layer)


def _grouped(weight: Tensor) -> Tensor:
    """[in, out/2, *kernel] <-> [out, in/2, *kernel], of two groups."""
    return torch.cat([half.transpose(0, 1) for half in weight.chunk(2)])


def _image() -> Tensor:
    return torch.randn(2, 4, 6, 6)


def _rows() -> Tensor:
    return torch.randn(3, 6)


def _indices() -> Tensor:
    return torch.randint(0, 7, (2, 5))


PATTERNS = (
    Pattern(
        lambda: SamePadding(4, 6, 3, stride=2, groups=2),
        _image,
        lambda m, x, w: F.conv2d(F.pad(x, (0, 1, 1, 2)), w, m.bias, 2, groups=2),
    ),
    Pattern(
        lambda: Causal(4, 6, 3),
        lambda: torch.randn(2, 4, 6),
        lambda m, x, w: F.conv1d(F.pad(x, (2, 0)), w, m.bias),
    ),
    Pattern(lambda: Inner(4, 6, 3), _image, lambda m, x, w: F.conv2d(x, w, m.bias, 2)),
    Pattern(
        lambda: Standardized(4, 6, 3),
        _image,
        lambda m, x, w: F.conv2d(x, w, m.bias),
        lambda m: Standardized.computed(m),
    ),
    Pattern(lambda: ByHand(4, 6, 3), _image, lambda m, x, w: F.conv2d(x, w, m.bias), lambda m: ByHand.computed(m)),
    Pattern(lambda: Multiplied(6, 5), _rows, lambda m, x, w: x @ w.t() + m.bias),
    Pattern(lambda: FromTheLeft(6, 5), _rows, lambda m, x, w: torch.mm(w, x.t()).t() + m.bias),
    Pattern(lambda: Cast(6, 5), _rows, lambda m, x, w: F.linear(x, w, m.bias)),
    Pattern(
        lambda: Normalized(6, 5, bias=False), _rows, lambda m, x, w: F.linear(x, w), lambda m: Normalized.computed(m)
    ),
    Pattern(
        lambda: Pointwise(4, 6, 1),
        lambda: torch.randn(2, 4, 6),
        lambda m, x, w: F.linear(x.transpose(1, 2), w.flatten(1), m.bias).transpose(1, 2),
    ),
    Pattern(lambda: Columns(5, 6, bias=False), _rows, lambda m, x, w: torch.matmul(x, w.t()), lambda m: m.weight.t()),
    Pattern(
        lambda: Up(4, 6, 3, groups=2),
        _image,
        lambda m, x, w: F.conv_transpose2d(x, _grouped(w), m.bias, groups=2)[..., 1:, 1:],
        lambda m: _grouped(m.weight),
    ),
    Pattern(lambda: Scaled(7, 4), _indices, lambda m, x, w: F.embedding(x, w) * 5.0),
    Pattern(
        lambda: Positions(7, 4),
        lambda: torch.tensor([[1, 1, 1], [1, 1, 0]]),
        lambda m, x, w: F.embedding(torch.tensor([[2, 3, 4], [2, 3, 1]]), w),
    ),
    Pattern(lambda: Counted(7, 4), _indices, lambda m, x, w: F.embedding(torch.arange(5).expand(2, -1), w)),
    Pattern(lambda: Sliced(7, 4), _indices, lambda m, x, w: w[:5] + torch.zeros(2, 1, 1)),
)
COMPUTED = (Standardized, ByHand, Normalized)
