"""Networks for the tests of AdaQAT: small ones, and one whose loss is a table of bit-widths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastqat
from fastqat import quantizers


def bits_on(quantizer: fastqat.FakeQuant) -> int:
    """The bit-width that a quantizer computes with, whatever it says of itself."""
    low, high = quantizer.qrange.tolist()
    return (high - low).bit_length()


class Small(nn.Module):
    """Three convolutions, of which AdaQAT learns the one in the middle and "more" ones, and a classifier."""

    def __init__(self, dropout: float = 0.0, more: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.middle = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(1 + more)))
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.dropout = dropout
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 2, H, W] -> [N, 3]."""
        x = F.relu(self.first(x))
        for layer in self.middle:
            x = F.relu(self.norm(layer(x)))
        x = F.dropout(self.drop(x).mean((2, 3)), self.dropout, self.training)
        return self.last(x)


def prepared(
    weight: fastqat.QSpec | None = None,
    activation: fastqat.QSpec | None = None,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    more: int = 0,
) -> nn.Module:
    """A Small in training, quantized by LSQ at 4 bits where nothing else is said."""
    torch.manual_seed(seed)
    config = fastqat.QConfig(weight or quantizers.lsq(4, axis=0), activation or quantizers.lsq(4))
    return fastqat.prepare(Small(dropout, more), config, first_last_bits=8).train()


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Images and labels."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 2, 5, 5, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(count)]


def train(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    widths: fastqat.AdaQAT | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Steps of SGD, with or without AdaQAT."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in data:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if widths is not None:
            widths.step(loss, lambda images=images, labels=labels: F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()


class Table(nn.Module):
    """Layers that compute nothing of interest: the loss is what a table says of the bits that they have.

    Args:
        loss: of the bits of the weight and of the activation of each layer in between.
        layers: so many.
    """

    def __init__(self, loss: Callable[[list[tuple[int, int]]], float], layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(layers + 2)))
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 2] -> [N, 2]."""
        return self.layers(x)

    def closure(self) -> Tensor:
        """The loss at the bits that the quantizers have now."""
        middle = list(self.layers)[1:-1]
        bits = [(bits_on(layer.weight_fake_quant), bits_on(layer.activation_fake_quant)) for layer in middle]
        return torch.tensor(self.loss(bits), dtype=torch.float64)


def table(loss: Callable[[list[tuple[int, int]]], float], layers: int = 1, bits: int = 4) -> Table:
    """A prepared Table with ranges."""
    torch.manual_seed(0)
    model = fastqat.prepare(
        Table(loss, layers),
        fastqat.QConfig(quantizers.lsq(bits), quantizers.lsq(bits)),
        first_last_bits=8,
    )
    with torch.no_grad():
        model(torch.randn(4, 2))
    return model
