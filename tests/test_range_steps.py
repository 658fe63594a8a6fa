"""advance_range and advance_interval: the ranges of the next step, on every backend, against literal numbers and numpy.

Sources: In-Hindsight Quantization Range Estimation (Fournarakis and Nagel, 2021); Toward INT4 Fixed-Point Training
(Kim et al., ECCV 2024), section 4.3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import device_of
from test_conformance import on_backends
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.fastqat
F32 = np.float32
INF, NAN = torch.inf, torch.nan


@dataclass
class Range:
    """The state of one range on a device, and its grid."""

    device: str
    qrange: tuple[int, int] = (0, 255)
    symmetric: bool = False
    momentum: float = 0.9

    def __post_init__(self) -> None:
        with torch.device(self.device):
            self.low, self.high, self.new_low, self.new_high = (torch.tensor([v]) for v in (INF, -INF, INF, -INF))
            self.observed = torch.tensor([-1])
            self.scale, self.zero_point = torch.full((1,), NAN), torch.full((0 if self.symmetric else 1,), NAN)

    def see(self, low: float, high: float) -> None:
        """What a tensor adds to the new extremes."""
        self.new_low.clamp_(max=low)
        self.new_high.clamp_(min=high)

    def advance(self, step: int, always: bool = False) -> tuple[float, float]:
        """The range that is used in a step."""
        qrange = torch.tensor(self.qrange, dtype=torch.int32, device=self.device)
        at = torch.tensor([step], device=self.device)
        state = (self.low, self.high, self.new_low, self.new_high, self.observed, self.scale, self.zero_point)
        ops.advance_range(qrange, at, always, self.momentum, *state)
        return self.low.item(), self.high.item()


@on_backends
def test_trace_of_a_range(backend: str) -> None:
    """eta = .9: the first step uses what it sees itself, every other one what the steps before it have seen."""
    seen = ((-1, 2), (-2, 1), (-0.5, 3), (-4, 0.5))
    used = ((-1, 2), (-1, 2), (-1.1, 1.9), (-1.04, 2.01), (-1.336, 1.859))
    state = Range(device_of(backend))
    state.see(*seen[0])  # dynamic once
    for step, want in enumerate(used):
        assert state.advance(step) == pytest.approx(want, abs=1e-6), step
        assert state.observed.item() == step
        assert (state.new_low.item(), state.new_high.item()) == (INF, -INF)
        assert state.scale.item() == pytest.approx((want[1] - want[0]) / 255, rel=1e-6)
        assert state.zero_point.item() == pytest.approx(-want[0] / (want[1] - want[0]) * 255, rel=1e-6)
        if step < 4:
            state.see(*seen[step])


@on_backends
def test_a_range_moves_once_a_step(backend: str) -> None:
    """A second forward in a step, and what it sees, wait for the next one; `always` does not."""
    state = Range(device_of(backend))
    state.see(-1, 2)
    state.advance(0)
    state.see(-2, 3)
    for _ in range(3):
        assert state.advance(0) == (-1, 2)
    assert (state.new_low.item(), state.new_high.item()) == (-2, 3)
    state.see(-5, 0)
    assert state.advance(0, always=True) == pytest.approx((-1.4, 2.1), abs=1e-6)
    state.see(-5, 0)
    assert state.advance(7) == pytest.approx((-1.76, 1.89), abs=1e-6)
    assert state.advance(8) == pytest.approx((-1.76, 1.89), abs=1e-6), "nothing was seen in between"
    state.see(-1, 1)
    assert state.advance(3) == pytest.approx((-1.684, 1.801), abs=1e-6), "a step back is another step"


@on_backends
def test_momentum_zero_is_the_step_before(backend: str) -> None:
    """eta = 0: the extremes of the step before, as they were."""
    state, seen = Range(device_of(backend), momentum=0.0), ((-0.1, 0.7), (-3.3, 0.2), (-0.3, 1e9))
    state.see(*seen[0])
    for step, want in enumerate((seen[0], *seen)):
        assert state.advance(step) == tuple(float(F32(v)) for v in want)
        state.see(*seen[min(step, 2)])


@on_backends
def test_a_range_without_data(backend: str) -> None:
    """NaN and Inf alone widen nothing; nor do they, or zeros, make a scale that is none."""
    state = Range(device_of(backend))
    assert state.advance(0) == (INF, -INF)
    assert (state.scale.item(), state.zero_point.item()) == (1.0, 0.0)
    state.see(0.0, 0.0)
    assert state.advance(1) == (0.0, 0.0)
    assert (state.scale.item(), state.zero_point.item()) == (1.0, 0.0)
    state.see(-3.0, 1.0)
    want = state.advance(2)
    assert want == pytest.approx((-0.3, 0.1))
    for step, bound in enumerate((INF, NAN), 3):
        state.new_low.fill_(bound)
        state.new_high.fill_(-bound)
        assert state.advance(step) == want


@on_backends
@pytest.mark.parametrize(
    ("qrange", "symmetric", "low", "high", "scale", "zero_point"),
    (
        ((-8, 7), True, -1.5, 1.75, 0.25, None),
        ((-8, 7), True, -3.5, 1.0, 0.5, None),
        ((-8, 7), True, -INF, 1.75, 0.25, None),
        ((0, 15), True, -9.0, 3.75, 0.25, None),
        ((-1, 0), True, -2.0, 0.5, 2.0, None),
        ((0, 15), True, -9.0, -1.0, 1.0, None),
        ((0, 15), False, 2.0, 3.75, 0.25, 0.0),
        ((0, 15), False, -3.75, -2.0, 0.25, 15.0),
        ((-8, 7), False, -1.0, 2.75, 0.25, -4.0),
        ((-8, 7), False, -0.9375, 2.8125, 0.25, -4.25),
    ),
)
def test_the_grid_of_a_range(backend, qrange, symmetric, low, high, scale, zero_point) -> None:
    """It holds 0; signed codes reach the larger side, unsigned ones the upper side; the zero point is not rounded."""
    state = Range(device_of(backend), qrange, symmetric)
    state.low.fill_(low)
    state.high.fill_(high)
    state.advance(-1)
    assert state.scale.item() == scale
    assert state.zero_point.tolist() == ([] if symmetric else [zero_point])


@on_backends
def test_ranges_are_rounded_alike(backend: str) -> None:
    """momentum * old + (1 - momentum) * new in float32, products rounded; so is the grid. Equal on every backend."""
    numbers = np.random.default_rng(1).normal(size=(20, 4)).astype(F32) * F32(37.1)
    for row, (momentum, symmetric) in zip(numbers, itertools.cycle(((0.9, False), (0.99, True), (0.123, False)))):
        low, high, new_low, new_high = F32(np.sort(row)[[1, 2, 0, 3]])
        state = Range(device_of(backend), (-128, 127), symmetric, momentum)
        for t, v in zip(
            (state.low, state.high, state.new_low, state.new_high), (low, high, new_low, new_high), strict=True
        ):
            t.fill_(float(v))
        old, rest = F32(momentum), F32(1 - momentum)
        low, high = old * low + rest * new_low, old * high + rest * new_high
        assert state.advance(5) == (low, high)
        least, most = min(low, F32(0)), max(high, F32(0))
        scale = max(-least, most) / F32(127) if symmetric else (most - least) / F32(255)
        assert state.scale.item() == scale
        assert symmetric or state.zero_point.item() == F32(-128) - least / scale


@dataclass
class Interval:
    """The state of one gradient interval on a device."""

    device: str
    gamma: float = 1.0
    qmax: int = 7
    alpha: float = 1e-3
    stride: float = 1e-3
    smallest: float = 1e-3

    def __post_init__(self) -> None:
        with torch.device(self.device):
            self.qrange = torch.tensor([-self.qmax, self.qmax], dtype=torch.int32)
            self.now = torch.tensor([self.gamma])
            self.beyond, self.seen, self.observed = torch.tensor([0]), torch.tensor([0]), torch.tensor([-1])
            self.limit, self.scale = torch.full((1,), NAN), torch.full((1,), NAN)

    def advance(self, step: int, low: float, high: float, numel: int = 1000, always: bool = False) -> float:
        """gamma of a step whose gradient has these extremes."""
        low_, high_, at = (torch.tensor([v], device=self.device) for v in (float(low), float(high), step))
        state = (self.now, self.beyond, self.seen, self.observed, self.limit, self.scale)
        constants = (self.alpha, self.stride, self.smallest)
        ops.advance_interval(low_, high_, self.qrange, at, always, numel, *constants, *state)
        return self.now.item()


@on_backends
@pytest.mark.parametrize("gamma", (0.5, 0.731))
def test_gamma_moves_by_one_stride(backend: str, gamma: float) -> None:
    """Up, down or not at all, by exactly a stride: more, fewer or just alpha / (2 qmax + 1) lay beyond."""
    for beyond, way in ((5, 1), (4, 0), (3, -1), (0, -1), (64, 1)):
        state = Interval(device_of(backend), gamma, alpha=15 / 16)
        state.advance(0, -2.0, 1.0, numel=64)
        assert (state.now.item(), state.seen.item(), state.beyond.item()) == (F32(gamma), 64, 0)
        state.beyond.fill_(beyond)
        moved = state.advance(1, -2.0, 3.0, numel=32)
        assert moved == F32(F32(gamma) + F32(way) * F32(1e-3)), f"{beyond} of 64 beyond"
        assert (state.seen.item(), state.beyond.item(), state.observed.item()) == (32, 0, 1)
        assert state.limit.item() == F32(moved) * F32(3.0)
        assert state.scale.item() == F32(F32(moved) * F32(3.0)) / F32(7)


@on_backends
def test_gamma_stays_in_its_bounds(backend: str) -> None:
    """Neither above 1 nor below the smallest."""
    for gamma, beyond, want in ((1.0, 64, 1.0), (0.9995, 64, 1.0), (0.0015, 0, 1e-3), (1e-3, 0, 1e-3)):
        state = Interval(device_of(backend), gamma)
        state.advance(0, -2.0, 1.0, numel=64)
        state.beyond.fill_(beyond)
        assert state.advance(1, -2.0, 1.0) == F32(want)


@on_backends
def test_gamma_moves_once_a_step(backend: str) -> None:
    """Gradients of one step are counted together; those without a finite value, or of zeros alone, not at all."""
    state = Interval(device_of(backend), 0.5)
    state.advance(3, -2.0, 1.0, numel=100)
    state.beyond.fill_(7)
    assert state.advance(3, -1.0, 4.0, numel=50) == 0.5
    assert (state.seen.item(), state.beyond.item(), state.limit.item()) == (150, 7, 2.0)
    for low, high in ((0.0, 0.0), (INF, -INF), (NAN, NAN)):
        assert state.advance(3, low, high, numel=50) == 0.5
        assert (state.seen.item(), state.limit.item(), state.scale.item()) == (150, 0.0, 0.0)
    assert state.advance(4, 0.0, 0.0) == F32(F32(0.5) + F32(1e-3))
    assert state.seen.item() == 0
    state.beyond.fill_(9)  # of nothing
    assert state.advance(5, -2.0, 1.0) == F32(F32(0.5) + F32(1e-3))
    assert state.advance(5, -2.0, 1.0, always=True) == F32(0.5)


@pytest.mark.parametrize("kind", ("laplace", "gauss"))
@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
def test_gamma_settles_at_its_quantile(backend: str, kind: str) -> None:
    """On one tensor it comes to rest between the strides on both sides of the fraction alpha / (2^b - 1) beyond."""
    generator = torch.Generator().manual_seed(4)
    g = torch.randn(50_000, generator=generator)
    if kind == "laplace":
        g = g.sign() * torch.empty(50_000).exponential_(generator=generator)
    state, largest, none = Interval("cpu"), g.abs().max(), torch.empty(0)
    for step in range(700):
        state.advance(step, -float(largest), float(largest), g.numel())
        grid = (state.scale, None, None, state.qrange, 0.0, 0.0, True, 0, -1, none.long(), state.limit, 0)
        ops.fake_quantize_tensor(g, *grid, none, none, state.beyond, *[none.byte()] * 3, none)
    target = 1e-3 / 15 * g.numel()

    def beyond(gamma: Tensor) -> float:
        return (g.abs() > gamma * largest).sum().item()

    assert beyond(state.now - 2e-3) > target >= beyond(state.now + 2e-3)
    assert state.now.item() < 0.97


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck() -> None:
    """The ops write what their schemas say, and trace without being run."""
    state, gradient = Range("cpu"), Interval("cpu")
    state.see(-1.0, 2.0)
    arguments = (torch.tensor([0, 255]).int(), torch.tensor([3]), False, 0.9, state.low, state.high, state.new_low)
    arguments += (state.new_high, state.observed, state.scale, state.zero_point)
    torch.library.opcheck(ops.advance_range.default, arguments, test_utils=OPCHECKS)
    gradient.advance(0, -1.0, 2.0)
    arguments = (torch.tensor([-1.0]), torch.tensor([2.0]), gradient.qrange, torch.tensor([1]), False, 10, 1e-3, 1e-3)
    arguments += (1e-3, gradient.now, gradient.beyond, gradient.seen, gradient.observed, gradient.limit, gradient.scale)
    torch.library.opcheck(ops.advance_interval.default, arguments, test_utils=OPCHECKS)
