"""Activations and gradients with one scale on the CPU against a copy, plain torch and torch.compile.

Run with ``make bench``. Contenders take turns, round by round; ratios are of medians within one run. ``stream`` is
larger than every cache: 64 M elements of float32. ``layer`` is the output of a layer with 16 channels at 32 x 32, batch
256; four sets of tensors take turns, as the layers of a network do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import goal, take_turns
from torch import Tensor

from fastqat import functional as F
from fastqat.one_tensor import Grid, Observed, Options, fake_quantize_tensor, quantized

STREAM, LAYER, SETS = (64 * 2**20,), (256, 16, 32, 32), 4
QMAX, ALPHA = 7, 1e-3
ops = torch.ops.fastqat

goal("in-hindsight into a given tensor / copy_, 64 M", "in_hindsight_out[stream]", "copy[stream]", "<=", 1.15)
goal("in-hindsight into a new tensor / clone, 64 M", "in_hindsight[stream]", "clone[stream]", "<=", 1.15)
goal("gradient quantizer into a given tensor / copy_, 64 M", "gradient_out[stream]", "copy[stream]", "<=", 2.2)
goal("eager / fastqat, gradient quantizer", "gradient_eager[layer]", "gradient[layer]", ">=", 10)
goal("compiled / fastqat, PACT forward + backward", "pact_compiled[layer]", "pact[layer]", ">=", 1.3)
goal("compiled / fastqat, LSQ forward + backward", "lsq_compiled[layer]", "lsq[layer]", ">=", 1.3)


class Statistics:
    """What one activation and one gradient keep from step to step."""

    def __init__(self) -> None:
        self.low, self.high, self.limit = torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([1.0])
        self.new_low, self.new_high = torch.tensor([torch.inf]), torch.tensor([-torch.inf])
        self.gamma, self.scale, self.zero_point = torch.tensor([0.8]), torch.tensor([0.3]), torch.tensor([0.0])
        self.beyond, self.seen, self.observed, self.step = (torch.tensor([v]) for v in (0, 0, -1, 0))
        self.codes, self.gradient_codes = torch.tensor([0, 15]).int(), torch.tensor([-QMAX, QMAX]).int()
        self.none, self.no_bits = torch.empty(0), torch.empty(0, dtype=torch.uint8)

    def hindsight(self) -> tuple[Grid, Observed]:
        """The range of the step before, and where that of the next one is gathered."""
        self.step += 1
        state = (self.low, self.high, self.new_low, self.new_high, self.observed, self.scale, self.zero_point)
        ops.advance_range(self.codes, self.step, False, 0.9, *state)
        return Grid(self.scale, self.zero_point, None, self.codes), Observed(self.new_low, self.new_high)

    def in_hindsight_out(self, x: Tensor, y: Tensor) -> None:
        """Quantize with the range of the step before, into y."""
        grid, (low, high, *_) = self.hindsight()
        call = (*grid, 0.0, 0.0, True, 0, -1, self.none, self.none, 0, low, high, self.none)
        ops.fake_quantize_tensor(x, *call, *[self.no_bits] * 3, y)

    def gradient_out(self, g: Tensor, y: Tensor) -> None:
        """Extremes, the interval, stochastic rounding and the count, into y."""
        self.step += 1
        ops.minmax_out(g, None, self.low, self.high)
        state = (self.gamma, self.beyond, self.seen, self.observed, self.limit, self.scale)
        constants = (ALPHA, 1e-3, 1e-3)
        ops.advance_interval(self.low, self.high, self.gradient_codes, self.step, False, g.numel(), *constants, *state)
        grid = (self.scale, None, None, self.gradient_codes, 1e-8)
        rest = (0.0, True, 0, 1, self.step, self.limit, 0, self.none, self.none, self.beyond)
        ops.fake_quantize_tensor(g, *grid, *rest, *[self.no_bits] * 3, y)


def eager_gradient(g: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """LBT's gradient quantizer in plain torch, as its authors wrote it: noise, clip, round; and the fraction beyond."""
    limit = gamma * g.abs().max()
    scale = 2 * limit / (2 * QMAX)
    u = (g + limit) / scale
    u = torch.clamp(u + (torch.rand_like(u) - 0.5), 0, 2 * QMAX).round()
    return u * scale - limit, (g.abs() > limit).float().mean()


def eager_pact(x: Tensor, alpha: Tensor) -> Tensor:
    """PACT with 4 bits in plain torch, by autograd."""
    clipped = torch.minimum(torch.relu(x), alpha)
    scale = alpha / 15
    return clipped + ((clipped / scale).round() * scale - clipped).detach()


def eager_lsq(x: Tensor, scale: Tensor) -> Tensor:
    """LSQ with 4 bits per tensor in plain torch, by autograd."""
    r = (x / scale).clamp(0, 15)
    return (r + (r.round() - r).detach()) * scale


def bench_stream(benchmark):
    torch.manual_seed(0)
    x, y, state = torch.randn(STREAM), torch.zeros(STREAM), Statistics()

    def in_hindsight() -> Tensor:
        grid, observed = state.hindsight()
        return quantized(x, grid, None, Options(0.0), observed).y

    moved = 8 * x.numel()
    contenders = {
        "copy": (lambda: y.copy_(x), moved),
        "in_hindsight_out": (lambda: state.in_hindsight_out(x, y), moved),
        "gradient_out": (lambda: state.gradient_out(x, y), moved + moved // 2),
        "clone": (lambda: x.clone(), moved),
        "in_hindsight": (in_hindsight, moved),
    }
    take_turns(benchmark, {f"{name}[stream]": value for name, value in contenders.items()}, rounds=11)


@pytest.fixture(scope="module")
def tensors() -> list[tuple[Tensor, Tensor]]:
    """Sets of x, which takes gradients, and of g."""
    torch.manual_seed(0)
    return [(torch.randn(LAYER).requires_grad_(), torch.randn(LAYER)) for _ in range(SETS)]


def rounds(tensors: list[tuple[Tensor, Tensor]], function: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
    """A callable that runs function(x, g) on the next set each time."""
    sets = itertools.cycle(tensors)
    return lambda: function(*next(sets))


def bench_gradient(benchmark, tensors):
    state, gamma = Statistics(), torch.tensor(0.8)

    def own(x: Tensor, g: Tensor) -> Tensor:
        y = torch.empty_like(g)
        state.gradient_out(g, y)
        return y

    contenders = {"gradient": own, "gradient_eager": lambda x, g: eager_gradient(g, gamma)}
    named = {f"{name}[layer]": (rounds(tensors, f), 0) for name, f in contenders.items()}
    take_turns(benchmark, named, rounds=30)


def bench_train(benchmark, tensors):
    scale = torch.tensor([0.2], requires_grad=True)
    alpha = torch.tensor([3.0], requires_grad=True)
    qrange, options = torch.tensor([0, 15]).int(), Options(1e-8, rounded=False, pact=True)

    def own_pact(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize_tensor(x, Grid(scale, None, None, qrange), None, options)[0]

    def own_lsq(x: Tensor, scale: Tensor) -> Tensor:
        return F.fake_quantize(x, scale, qmin=0, qmax=15, eps=1e-8)

    def step(function: Callable[[Tensor, Tensor], Tensor], parameter: Tensor) -> Callable[[Tensor, Tensor], object]:
        return lambda x, g: torch.autograd.grad(function(x, parameter), (x, parameter), g)

    contenders = {
        "pact": step(own_pact, scale),
        "pact_compiled": step(torch.compile(eager_pact, fullgraph=True), alpha),
        "lsq": step(own_lsq, scale),
        "lsq_compiled": step(torch.compile(eager_lsq, fullgraph=True), scale),
    }
    named = {f"{name}[layer]": (rounds(tensors, f), 0) for name, f in contenders.items()}
    take_turns(benchmark, named, rounds=60)
