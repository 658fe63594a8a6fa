"""Networks, trainings, and what autograd saves of them, for the tests of saved activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastqat

RANGES: dict[str, dict[str, Any]] = {
    "lsq": {"learn": "scale", "grad_scale": "lsq"},
    "lsq+": {"learn": "scale+offset"},
    "fixed": {},
    "pact": {"learn": "scale", "estimator": "pact", "signed": False},
    "running_minmax": {"range": "running_minmax", "symmetric": False},
    "in_hindsight": {"range": "in_hindsight"},
}


class Block(nn.Module):
    """A residual block, whose shortcut is added in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.BatchNorm2d(6)
        self.relu1, self.relu2 = nn.ReLU6(inplace), nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.inplace:
            y += x
            return self.relu2(y)
        return self.relu2(y + x)


def network(inplace: bool = False, count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace)
    blocks = [Block(inplace) for _ in range(count)]
    tail = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*stem, *blocks, *tail)


def prepared(model: nn.Module, batch: Tensor, **options: Any) -> nn.Module:
    """The model at W4A4, with ranges that are set."""
    weight, activation = fastqat.QSpec(bits=4, axis=0, learn="scale"), fastqat.QSpec(**{"bits": 4, **options})
    fastqat.prepare(model, fastqat.QConfig(weight, activation))
    model.train()(batch)
    return model


def trained(
    model: nn.Module, batches: list[Tensor], run: Callable[[Tensor], Tensor] | None = None, dtype: Any = None
) -> dict[str, Tensor]:
    """State after one step of SGD per batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in batches:
        context = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
        with context:
            y = (run or model)(batch)
        optimizer.zero_grad()
        F.cross_entropy(y.float(), torch.arange(len(batch))).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal values, key by key."""
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, 9, 9, generator=generator) for _ in range(count)]


@contextlib.contextmanager
def saved() -> Iterator[list[Tensor]]:
    """What autograd saves meanwhile, each storage once."""
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.detach()
        return t

    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield tensors
    tensors += found.values()


def size(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def large_floats(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the floating tensors of four dimensions that a forward saves, but for weights."""
    with saved() as kept:
        model(x)
    return sorted(tuple(t.shape) for t in kept if t.is_floating_point() and t.dim() == 4 and t.shape[0] == len(x))
