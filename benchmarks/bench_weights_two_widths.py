"""A weight at two bit-widths on the CPU against a copy and against one bit-width at a time, 512 x 4608 float32.

Run with ``make bench``. Contenders take turns, round by round; ratios are of medians within one run. ``eager`` is
DoReFa in plain torch: the least that ``tanh``, a maximum and a few element-wise ops take, and their autograd.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import goal, take_turns
from torch import Tensor

SHAPE, SETS = (512, 4608), 8
NUMEL = SHAPE[0] * SHAPE[1]
ops = torch.ops.fastqat

goal("two bit-widths at once / one and a write", "pair", "one_and_write", "<=", 1.15)
goal("two bit-widths one by one / at once", "one_by_one", "pair", ">=", 1.1)
goal("DoReFa, one bit-width / copy_", "dorefa", "copy", "<=", 3)
goal("DoReFa, backward / a + b", "dorefa_backward", "add", "<=", 3)
goal("DoReFa, one by one / two bit-widths at once", "dorefa_one_by_one", "dorefa_pair", ">=", 1.3)
goal("eager / fastqat, DoReFa forward + backward", "dorefa_eager", "dorefa_train", ">=", 5)


class Weights:
    """Sets of x, g and two results, and the grids of them all."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sets = [[torch.randn(SHAPE) * 0.3, torch.randn(SHAPE), *torch.zeros(2, *SHAPE)] for _ in range(SETS)]
        self.sets = itertools.cycle(sets)
        self.scales = torch.stack([torch.full((SHAPE[0],), 0.1), torch.full((SHAPE[0],), 0.2)])
        self.qranges = torch.tensor([[-8, 7], [-4, 3]], dtype=torch.int32)
        self.qmax, self.sums = torch.tensor([15, 7], dtype=torch.int32), torch.zeros((2, 2), dtype=torch.int64)
        self.none, self.no_sums = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def one(self, x: Tensor, y: Tensor, k: int) -> None:
        ops.fake_quantize_out(x, self.scales[k], None, None, self.qranges[k], 0, 1e-8, None, y)

    def pair(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        ops.fake_quantize_two_widths(x, self.scales, None, None, self.qranges, 0, 1e-8, y, z)

    def dorefa(self, x: Tensor, y: Tensor, z: Tensor | None = None, sums: Tensor | None = None) -> None:
        low, high = ops.minmax(x, None)
        wanted = self.no_sums if sums is None else sums
        ops.dorefa_fake_quantize(x, low, high, self.qmax, wanted, y, self.none if z is None else z)

    def dorefa_backward(self, g: Tensor, x: Tensor, dx: Tensor) -> None:
        low, high = ops.minmax(x, None)
        ops.dorefa_fake_quantize_backward(g, x, low, high, self.none, dx)

    def dorefa_train(self, g: Tensor, x: Tensor, y: Tensor, dx: Tensor) -> None:
        low, high = ops.minmax(x, None)
        ops.dorefa_fake_quantize(x, low, high, self.qmax, self.no_sums, y, self.none)
        ops.dorefa_fake_quantize_backward(g, x, low, high, self.none, dx)

    def dorefa_eager(self, g: Tensor, x: Tensor) -> Tensor:
        w = x.detach().requires_grad_()
        t = w.tanh()
        u = t / t.abs().amax() * 7.5 + 7.5
        y = (2 * (u + (u.round() - u).detach()) - 15) / 15
        return torch.autograd.grad(y, w, g)[0]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights()


def bench_two_widths(benchmark, weights):
    w = weights
    contenders = {
        "copy": (lambda x, g, y, z: y.copy_(x), 8),
        "add": (lambda x, g, y, z: torch.add(x, g, out=y), 12),
        "one_by_one": (lambda x, g, y, z: (w.one(x, y, 0), w.one(x, z, 1)), 16),
        "one_and_write": (lambda x, g, y, z: (w.one(x, y, 0), z.fill_(1.0)), 12),
        "pair": (lambda x, g, y, z: w.pair(x, y, z), 12),
        "dorefa": (lambda x, g, y, z: w.dorefa(x, y), 12),
        "dorefa_sums": (lambda x, g, y, z: w.dorefa(x, y, sums=w.sums), 12),
        "dorefa_pair": (lambda x, g, y, z: w.dorefa(x, y, z, w.sums), 16),
        "dorefa_one_by_one": (lambda x, g, y, z: (w.dorefa(x, y, sums=w.sums), w.dorefa(x, z, sums=w.sums)), 24),
        "dorefa_backward": (lambda x, g, y, z: w.dorefa_backward(g, x, y), 16),
        "dorefa_train": (lambda x, g, y, z: w.dorefa_train(g, x, y, z), 24),
        "dorefa_eager": (lambda x, g, y, z: w.dorefa_eager(g, x), 0),
    }
    named = {name: (lambda f=f: f(*next(w.sets)), moved * NUMEL) for name, (f, moved) in contenders.items()}
    take_turns(benchmark, named, rounds=100)
