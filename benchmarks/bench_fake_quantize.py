"""Fake quantization on the CPU against a copy of the tensor and against the peers, 512 x 4608 float32 per channel.

Run with ``make bench``. Contenders take turns, round by round, so that a change of the machine's mood meets all of
them; ratios are of medians within one run. Each group runs in two places: ``memory`` goes round tensors that together
are larger than any cache, as the weights of a model do; ``cache`` takes the same tensors every time. ``add`` is torch's
``a + b``: the least that any op with two inputs and an output takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import goal, take_turns
from peers import aten_fixed, aten_learnable, compiled_lsq, eager_lsq, eager_search

from fastqat import functional as F

SHAPE, QMIN, QMAX, CANDIDATES = (512, 4608), -8, 7, 100
NUMEL = SHAPE[0] * SHAPE[1]
PLACES = {"memory": 16, "cache": 1}  # sets of tensors to go round; 16 are 450 MB

for place in PLACES:
    goal(f"forward into a given tensor / copy_, {place}", f"forward_out[{place}]", f"copy[{place}]", "<=", 1.15)
    goal(f"forward into a new tensor / copy_, {place}", f"forward[{place}]", f"copy[{place}]", "<=", 1.15)
    goal(f"backward dx + ds / copy_, {place}", f"backward[{place}]", f"copy[{place}]", "<=", 1.7)
    goal(f"backward dx + ds / a + b, {place}", f"backward[{place}]", f"add[{place}]", "<=", 1.15)
for place in PLACES:
    for peer, factor in (("compiled", 1.5), ("aten_learnable", 10), ("aten_fixed", 7), ("eager", 10)):
        names = f"train_{peer}[{place}]", f"train_fastqat[{place}]"
        goal(f"{peer} / fastqat, forward + backward, {place}", *names, ">=", factor)
goal("100 eager evaluations / search of 100 candidates", "search_eager", "search_fastqat", ">=", 15)
goal("100 own forwards / search of 100 candidates", "search_own_forwards", "search_fastqat", ">=", 4)
goal("float32 / bfloat16 forward, 64 M elements", "large_float32", "large_bfloat16", ">=", 1.5)


class Tensors:
    """Sets of (x, g, y) with one scale and code range."""

    def __init__(self, sets: int) -> None:
        torch.manual_seed(0)
        self.x = [torch.randn(SHAPE) for _ in range(sets)]
        self.g = [torch.randn(SHAPE) for _ in range(sets)]
        self.y = [torch.zeros(SHAPE) for _ in range(sets)]
        self.scale = self.x[0].abs().amax(1) / QMAX * 0.7
        self.qrange = torch.tensor([QMIN, QMAX], dtype=torch.int32)

    def rounds(self, function: Callable[..., object]) -> Callable[[], object]:
        """A callable that runs function(x, g, y) on the next set each time."""
        sets = itertools.cycle(list(zip(self.x, self.g, self.y, strict=True)))
        return lambda: function(*next(sets))


@pytest.fixture(scope="module")
def places() -> dict[str, Tensors]:
    return {place: Tensors(sets) for place, sets in PLACES.items()}


def quantize(x: torch.Tensor, scale: torch.Tensor, qmin: int = QMIN, qmax: int = QMAX, **options) -> torch.Tensor:
    return F.fake_quantize(x, scale, qmin=qmin, qmax=qmax, axis=0, eps=1e-8, **options)


@pytest.mark.parametrize("place", PLACES)
def bench_kernels(benchmark, places, place):
    tensors = places[place]
    scale, grid = tensors.scale, (tensors.scale, None, None, tensors.qrange, 0, 1e-8)
    sums = (torch.empty_like(scale), torch.empty(0))
    backward = torch.ops.fastqat.fake_quantize_backward_out
    contenders = {
        "copy": (lambda x, g, y: y.copy_(x), 8),
        "add": (lambda x, g, y: torch.add(g, x, out=y), 12),
        "forward_out": (lambda x, g, y: quantize(x, scale, out=y), 8),
        "forward": (lambda x, g, y: quantize(x, scale), 8),
        "backward": (lambda x, g, y: backward(g, x, *grid, True, False, 0.0, y, *sums), 12),
    }
    named = {f"{name}[{place}]": (tensors.rounds(f), moved * NUMEL) for name, (f, moved) in contenders.items()}
    take_turns(benchmark, named, rounds=1000)


@pytest.mark.parametrize("place", PLACES)
def bench_train(benchmark, places, place):
    tensors = places[place]
    scale = tensors.scale.clone().requires_grad_()
    for x in tensors.x:
        x.requires_grad_()
    peers = {
        "fastqat": quantize,
        "compiled": compiled_lsq(),
        "eager": eager_lsq,
        "aten_learnable": aten_learnable,
        "aten_fixed": aten_fixed,
    }

    def step(peer: str, function: Callable[..., torch.Tensor]) -> Callable[..., object]:
        fixed = peer == "aten_fixed"
        return lambda x, g, y: torch.autograd.grad(function(x, scale, QMIN, QMAX), (x,) if fixed else (x, scale), g)

    named = {f"train_{p}[{place}]": (tensors.rounds(step(p, f)), 20 * NUMEL) for p, f in peers.items()}
    take_turns(benchmark, named, rounds=120)
    for x in tensors.x:
        x.requires_grad_(False)


def bench_search(benchmark, places):
    x, scale = places["cache"].x[0], places["cache"].scale
    scales = scale * torch.arange(1, CANDIDATES + 1).view(-1, 1) / CANDIDATES / 0.7
    contenders = {
        "search_fastqat": lambda: F.range_search(x, scales, qmin=QMIN, qmax=QMAX, axis=0),
        "search_own_forwards": lambda: [quantize(x, s).numel() for s in scales],
        "search_eager": lambda: eager_search(x, scales, QMIN, QMAX),
    }
    take_turns(benchmark, {name: (f, 0) for name, f in contenders.items()}, rounds=12)


def bench_large(benchmark):
    """Into given tensors: the C library maps new pages for results of this size each time, whatever is set."""
    scale = torch.full((8192,), 0.3)
    named = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8192, 8192).to(dtype)
        y, name = torch.zeros_like(x), str(dtype).removeprefix("torch.")
        named[f"large_{name}"] = (lambda x=x, y=y: quantize(x, scale, out=y), 2 * x.numel() * x.element_size())
    take_turns(benchmark, named, rounds=25)
