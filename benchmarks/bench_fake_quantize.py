"""Fake quantization on the CPU against a copy of the tensor and against the peers, 512 x 4608 float32 per channel.

Run with ``make bench``: ratios of medians within one run. Bytes are those that the op must move. Each op runs twice:
``memory`` goes round tensors that together are larger than any cache, as the weights of a model do; ``cache`` takes the
same tensors every time. ``add`` is torch's ``a + b``: the least that any op with two inputs and an output takes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import goal
from peers import aten_fixed, aten_learnable, compiled_lsq, eager_lsq, eager_search

from fastqat import functional as F

SHAPE, QMIN, QMAX, CANDIDATES = (512, 4608), -8, 7, 100
NUMEL = SHAPE[0] * SHAPE[1]
PLACES = {"memory": 16, "cache": 1}  # sets of tensors to go round; 16 are 450 MB

for place in PLACES:
    goal(f"forward, out-variant / copy_, {place}", f"forward_out[{place}]", f"copy[{place}]", "<=", 1.15)
    goal(f"forward, new tensor / copy_, {place}", f"forward[{place}]", f"copy[{place}]", "<=", 1.15)
    goal(f"backward dx + ds, out-variant / copy_, {place}", f"backward_out[{place}]", f"copy[{place}]", "<=", 1.7)
    goal(f"backward dx + ds, out-variant / a + b, {place}", f"backward_out[{place}]", f"add[{place}]", "<=", 1.15)
    for peer, factor in (("compiled", 1.5), ("aten_learnable", 10), ("aten_fixed", 7), ("eager", 10)):
        names = f"train[{peer}-{place}]", f"train[fastqat-{place}]"
        goal(f"{peer} / fastqat, forward + backward through the API, {place}", *names, ">=", factor)
goal("100 eager evaluations / range search of 100 candidates", "search[eager]", "search[fastqat]", ">=", 15)
goal("100 own forwards / range search of 100 candidates", "search[own_forwards]", "search[fastqat]", ">=", 4)
goal("fp32 / bf16 forward, 64 M elements", "large_forward[float32]", "large_forward[bfloat16]", ">=", 1.5)


class Tensors:
    """Sets of (x, g, y) with one scale and code range."""

    def __init__(self, sets: int) -> None:
        torch.manual_seed(0)
        self.x = [torch.randn(SHAPE) for _ in range(sets)]
        self.g = [torch.randn(SHAPE) for _ in range(sets)]
        self.y = [torch.zeros(SHAPE) for _ in range(sets)]
        self.scale = self.x[0].abs().amax(1) / QMAX * 0.7
        self.qrange = torch.tensor([QMIN, QMAX], dtype=torch.int32)

    def rounds(self, function):
        """A callable that runs function(x, g, y) on the next set each time."""
        sets = itertools.cycle(list(zip(self.x, self.g, self.y, strict=True)))
        return lambda: function(*next(sets))


@pytest.fixture(scope="module")
def places() -> dict[str, Tensors]:
    return {place: Tensors(sets) for place, sets in PLACES.items()}


def measure(benchmark, function, rounds: int, moved: int = 0) -> None:
    """Median over rounds; moved: bytes that the op must read and write."""
    benchmark.extra_info["bytes"] = moved
    benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=max(3, rounds // 10))


@pytest.mark.parametrize("place", PLACES)
def bench_copy(benchmark, places, place):
    measure(benchmark, places[place].rounds(lambda x, g, y: y.copy_(x)), 400, 8 * NUMEL)


@pytest.mark.parametrize("place", PLACES)
def bench_add(benchmark, places, place):
    measure(benchmark, places[place].rounds(lambda x, g, y: torch.add(g, x, out=y)), 400, 12 * NUMEL)


@pytest.mark.parametrize("place", PLACES)
def bench_forward_out(benchmark, places, place):
    tensors = places[place]
    run = lambda x, g, y: F.fake_quantize(x, tensors.scale, qmin=QMIN, qmax=QMAX, axis=0, eps=1e-8, out=y)  # noqa: E731
    measure(benchmark, tensors.rounds(run), 400, 8 * NUMEL)


@pytest.mark.parametrize("place", PLACES)
def bench_forward(benchmark, places, place):
    tensors = places[place]
    run = lambda x, g, y: F.fake_quantize(x, tensors.scale, qmin=QMIN, qmax=QMAX, axis=0, eps=1e-8)  # noqa: E731
    measure(benchmark, tensors.rounds(run), 400, 8 * NUMEL)


@pytest.mark.parametrize("place", PLACES)
def bench_backward_out(benchmark, places, place):
    tensors = places[place]
    grid = (tensors.scale, None, None, tensors.qrange, 0, 1e-8)
    sums = (torch.empty_like(tensors.scale), torch.empty(0))
    op = torch.ops.fastqat.fake_quantize_backward_out
    measure(benchmark, tensors.rounds(lambda x, g, y: op(g, x, *grid, True, False, y, *sums)), 400, 12 * NUMEL)


def fastqat_lsq(x: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    return F.fake_quantize(x, scale, qmin=qmin, qmax=qmax, axis=0, eps=1e-8)


CONTENDERS = {
    "fastqat": (lambda: fastqat_lsq, 300),
    "compiled": (compiled_lsq, 150),
    "eager": (lambda: eager_lsq, 32),
    "aten_learnable": (lambda: aten_learnable, 32),
    "aten_fixed": (lambda: aten_fixed, 32),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CONTENDERS)
def bench_train(benchmark, places, name, place):
    make, rounds = CONTENDERS[name]
    quantize, tensors = make(), places[place]
    scale = tensors.scale.clone().requires_grad_()
    weights = [x.detach().requires_grad_() for x in tensors.x]
    sets = itertools.cycle(list(zip(weights, tensors.g, strict=True)))

    def run() -> None:
        x, g = next(sets)
        torch.autograd.grad(quantize(x, scale, QMIN, QMAX), (x,) if name == "aten_fixed" else (x, scale), g)

    measure(benchmark, run, rounds, 20 * NUMEL)


@pytest.mark.parametrize("name", ["fastqat", "own_forwards", "eager"])
def bench_search(benchmark, places, name):
    tensors = places["cache"]
    x = tensors.x[0]
    scales = tensors.scale * torch.arange(1, CANDIDATES + 1).view(-1, 1) / CANDIDATES / 0.7

    def own_forwards() -> None:
        for scale in scales:
            F.fake_quantize(x, scale, qmin=QMIN, qmax=QMAX, axis=0, eps=1e-8)

    run = {
        "fastqat": lambda: F.range_search(x, scales, qmin=QMIN, qmax=QMAX, axis=0),
        "own_forwards": own_forwards,
        "eager": lambda: eager_search(x, scales, QMIN, QMAX),
    }[name]
    measure(benchmark, run, {"fastqat": 30, "own_forwards": 10, "eager": 3}[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_large_forward(benchmark, dtype):
    x = torch.randn(8192, 8192).to(getattr(torch, dtype))
    scale = torch.full((8192,), 0.3)
    run = lambda: F.fake_quantize(x, scale, qmin=QMIN, qmax=QMAX, axis=0, eps=1e-8)  # noqa: E731
    measure(benchmark, run, 12, 2 * x.numel() * x.element_size())
