"""Fake quantization on the CPU against a copy of the tensor and against the peers, 512 x 4608 float32 per channel.

Run with ``make bench``: ratios of medians within one run. Bytes are those that the op itself must move.
"""

from __future__ import annotations

import pytest
import torch
from conftest import goal
from peers import aten_fixed, aten_learnable, compiled_lsq, eager_lsq, eager_search

from fastqat import functional as F

SHAPE, QMIN, QMAX, CANDIDATES = (512, 4608), -8, 7, 100
NUMEL = SHAPE[0] * SHAPE[1]

goal("forward, out-variant / copy_", "forward_out", "copy", "<=", 1.15)
goal("forward, new tensor / copy_", "forward", "copy", "<=", 1.15)
goal("backward dx + ds, out-variant / copy_", "backward_out", "copy", "<=", 1.7)
goal("backward dx + ds, new tensor / copy_", "backward", "copy", "<=", 1.7)
goal("torch.compile of plain LSQ / fastqat, forward + backward", "train[compiled]", "train[fastqat]", ">=", 1.5)
goal("ATen learnable / fastqat, forward + backward", "train[aten_learnable]", "train[fastqat]", ">=", 10)
goal("ATen fixed / fastqat, forward + backward", "train[aten_fixed]", "train[fastqat]", ">=", 7)
goal("eager LSQ / fastqat, forward + backward", "train[eager]", "train[fastqat]", ">=", 10)
goal("100 eager evaluations / range search of 100 candidates", "search[eager]", "search[fastqat]", ">=", 15)
goal("100 own forwards / range search of 100 candidates", "search[own_forwards]", "search[fastqat]", ">=", 4)
goal("fp32 / bf16 forward, 64 M elements", "large_forward[float32]", "large_forward[bfloat16]", ">=", 1.5)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    return {
        "x": x,
        "g": torch.randn(SHAPE),
        "y": torch.empty_like(x),
        "scale": x.abs().amax(1) / QMAX * 0.7,
        "qrange": torch.tensor([QMIN, QMAX], dtype=torch.int32),
    }


def measure(benchmark, function, rounds: int, moved: int = 0, iterations: int = 1) -> None:
    """Median over rounds; moved: bytes that the op must read and write."""
    benchmark.extra_info["bytes"] = moved
    benchmark.pedantic(function, rounds=rounds, iterations=iterations, warmup_rounds=max(3, rounds // 10))


def bench_copy(benchmark, tensors):
    measure(benchmark, lambda: tensors["y"].copy_(tensors["x"]), 400, 8 * NUMEL)


def bench_forward_out(benchmark, tensors):
    x, scale, y = tensors["x"], tensors["scale"], tensors["y"]
    run = lambda: F.fake_quantize(x, scale, qmin=QMIN, qmax=QMAX, axis=0, eps=1e-8, out=y)  # noqa: E731
    measure(benchmark, run, 400, 8 * NUMEL)


def bench_forward(benchmark, tensors):
    x, scale = tensors["x"], tensors["scale"]
    run = lambda: F.fake_quantize(x, scale, qmin=QMIN, qmax=QMAX, axis=0, eps=1e-8)  # noqa: E731
    measure(benchmark, run, 400, 8 * NUMEL)


def bench_backward_out(benchmark, tensors):
    g, x, scale, qrange, dx = (tensors[k] for k in ("g", "x", "scale", "qrange", "y"))
    results = (dx, torch.empty_like(scale), torch.empty(0))
    op = torch.ops.fastqat.fake_quantize_backward_out
    measure(benchmark, lambda: op(g, x, scale, None, None, qrange, 0, 1e-8, True, False, *results), 400, 12 * NUMEL)


def bench_backward(benchmark, tensors):
    x, g = tensors["x"].clone().requires_grad_(), tensors["g"]
    scale = tensors["scale"].clone().requires_grad_()
    y = F.fake_quantize(x, scale, qmin=QMIN, qmax=QMAX, axis=0, eps=1e-8)
    measure(benchmark, lambda: torch.autograd.grad(y, (x, scale), g, retain_graph=True), 400, 12 * NUMEL)


def fastqat_lsq(x: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    return F.fake_quantize(x, scale, qmin=qmin, qmax=qmax, axis=0, eps=1e-8)


CONTENDERS = {
    "fastqat": (lambda: fastqat_lsq, 300),
    "compiled": (compiled_lsq, 150),
    "eager": (lambda: eager_lsq, 20),
    "aten_learnable": (lambda: aten_learnable, 20),
    "aten_fixed": (lambda: aten_fixed, 20),
}


@pytest.mark.parametrize("name", CONTENDERS)
def bench_train(benchmark, tensors, name):
    make, rounds = CONTENDERS[name]
    quantize, g = make(), tensors["g"]
    x, scale = tensors["x"].clone().requires_grad_(), tensors["scale"].clone().requires_grad_()
    inputs = (x,) if name == "aten_fixed" else (x, scale)
    measure(benchmark, lambda: torch.autograd.grad(quantize(x, scale, QMIN, QMAX), inputs, g), rounds, 20 * NUMEL)


@pytest.mark.parametrize("name", ["fastqat", "own_forwards", "eager"])
def bench_search(benchmark, tensors, name):
    x = tensors["x"]
    scales = tensors["scale"] * torch.arange(1, CANDIDATES + 1).view(-1, 1) / CANDIDATES / 0.7

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
