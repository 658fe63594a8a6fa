"""Small prepared networks whose state shows how often their time has moved, and the plain way to train them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, GradientQSpec, Oscillation, QConfig, QSpec
from fastqat.nn import GradientFakeQuant

STEPS = 6
LR = 0.5  # weights cross their borders, and some freeze
X = torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(0))
CONFIG = QConfig(
    QSpec(3, axis=0, oscillation=Oscillation(0.4, 0.9), learn="scale"),
    QSpec(4, range="in_hindsight"),
    gradient=GradientQSpec(6, method="in_hindsight"),
)
NOISY = QConfig(QSpec(3, axis=0, estimator="stochastic"), None)
Iterate = Callable[[Tensor], None]  # one iteration with a batch


def network(config: QConfig = CONFIG) -> nn.Sequential:
    torch.manual_seed(1)
    return fastqat.prepare(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), config)  # type: ignore[return-value]


def times(net: nn.Module) -> set[int]:
    """Step counts of all quantizers."""
    return {int(q.step) for q in quantizers(net)}


def quantizers(net: nn.Module) -> Iterator[Any]:
    return (m for m in net.modules() if isinstance(m, (FakeQuant, GradientFakeQuant)))


def backward(net: nn.Module, x: Tensor) -> Tensor:
    net.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    return loss


def train(net: nn.Module, iterate: Iterate, steps: int = STEPS) -> nn.Module:
    """Train for a number of steps; a clock that stands still would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*time stands still", UserWarning)
        for step in range(steps):
            iterate(X[step % STEPS])
    return net


def plain(net: nn.Module) -> Iterate:
    """The way that all others must equal, where they compute the same."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)

    def iterate(x: Tensor) -> None:
        backward(net, x)
        optimizer.step()

    return iterate


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    mine, others = one.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    different = [name for name in mine if not torch.equal(mine[name], others[name])]
    assert not different


class LoRA(nn.Module):
    """A layer whose weights are frozen, with an update of rank 2 beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def lora(net: Any) -> Any:
    net[0], net[2] = LoRA(net[0]), LoRA(net[2])
    return [p for p in net.parameters() if p.requires_grad]
