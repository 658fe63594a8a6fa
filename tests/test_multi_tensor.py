"""The forward op on many tensors: every backend against the definition, and the definition against Algorithm 1.

Codes, outputs and the state of tracking are equal bit for bit on every backend.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cases
import numpy as np
import pytest
import torch
from cases import GridCase, device_of
from many_tensors import (
    LEARNINGS,
    STATE,
    Weight,
    assert_same,
    differentiate,
    move,
    of_dtypes,
    of_granularities,
    on_backends,
    quantize,
    walking,
    with_random_state,
)
from torch import Tensor

from fastqat.ops import multi_tensor, words

pytestmark = pytest.mark.usefixtures("one_thread")


@on_backends
def test_walks(backend: str) -> None:
    """Many tensors in one call, for many steps, against the definition of each alone; time stands still or jumps."""
    steps = list(itertools.accumulate((0, 1, 1, 1, 3, 1, 1, 700, 1, 2, *[1] * (0 if backend == "triton" else 40))))
    op, define = torch.ops.fastqat.multi_tensor_fake_quantize, multi_tensor.multi_tensor_fake_quantize
    weights, limits = walking(device_of(backend))
    twins = [w.twin() for w in weights]
    for t, step in enumerate(steps):
        # a step, the same one again at other weights, and an evaluation at the next one
        for kind in (0, 1, 2) if t % 4 == 2 else (0,):
            thresholds = [limit(t) for limit in limits]
            for ours, theirs in zip(weights, twins, strict=True):
                move(theirs.case, t + 100 * kind)
                ours.case.x.copy_(theirs.case.x)
            before = [[s.clone() for s in w.state] for w in weights]
            ys = quantize(op, weights, step + (kind == 2), thresholds, kind < 2)
            for i, (ours, theirs) in enumerate(zip(weights, twins, strict=True)):
                label = f"step {step}, kind {kind}, {theirs.case.label}"
                want = quantize(define, [theirs], step + (kind == 2), thresholds[i : i + 1], kind < 2)
                assert_same(("y", *STATE), [ys[i], *ours.state], [want[0], *theirs.state], label)
                if kind:
                    assert_same(STATE, ours.state, before[i], f"{label}: moved")
                ours.check_fences()
    if len(steps) > 10:
        check_walks(twins)


def check_walks(twins: list[Weight]) -> None:
    """The walks met what they are there for: changes, oscillations, freezes, and a growth that began anew."""
    tracked = [w for w in twins if w.momentum and w.case.x.numel()]
    for w in tracked:
        transitions, oscillations, freezes, *_ = w.state[3].tolist()
        assert transitions > 50 and oscillations > 20 and (freezes > 4 or w.tensor_id == 3), w.case.label
    assert any(float(w.state[4][0]) < (1 - w.momentum) ** -float(w.state[4][1]) * 2.0**-60 for w in tracked)
    assert {w.state[0].dtype for w in tracked} == {torch.uint8, torch.int16}


@of_granularities
@of_dtypes
@on_backends
def test_one_step_from_any_state(backend: str, dtype: torch.dtype, granularity: str) -> None:
    """Lattice, midpoints, clip edges and odd scales, with weights that are free, just frozen, or long frozen."""
    op, define = torch.ops.fastqat.multi_tensor_fake_quantize, multi_tensor.multi_tensor_fake_quantize
    numbered = list(enumerate(cases.grid_cases(dtype, granularity, few=True)))
    turn = cases.GRANULARITIES.index(granularity) + cases.DTYPES.index(dtype)
    calls = ((41, False), (44, False), (44, True), (45, True))
    for number, case in numbered[turn % 3 :: 3] if backend == "triton" else numbered:
        ours = with_random_state(case, number).twin(device_of(backend))
        theirs = ours.twin()
        threshold = [(0.0, 0.3, 0.05, 0.3)[number % 4]]
        for step, advance in calls[number % 2 :: 2] if backend == "triton" else calls:
            label = f"{case.label}, step {step}"
            (y,) = quantize(op, [ours], step, threshold, advance)
            (want,) = quantize(define, [theirs], step, threshold, advance)
            assert_same(("y", *STATE), [y, *ours.state], [want, *theirs.state], label)
        ours.check_fences()


@dataclass
class Algorithm1:
    """Algorithm 1 for codes c, step by step in float64; a frozen code is set once, when its weight is frozen.

    Source: Nagel et al., ICML 2022.
    """

    momentum: float
    P: Tensor | None = None
    oscillations: int = 0
    transitions: int = 0
    threshold: float = 0.0

    def step(self, c: Tensor, threshold: float) -> Tensor:
        """The codes of this step. c: float64, codes of the weights themselves."""
        if self.P is None:
            self.P, self.R, self.f, self.e = c, torch.zeros_like(c), torch.zeros_like(c), c
            self.F, self.K = torch.zeros_like(c, dtype=torch.bool), torch.zeros_like(c)
        if threshold > 0 and self.threshold <= 0:
            self.e = torch.where(self.F, self.e, c)
        self.threshold = threshold
        c = torch.where(self.F, self.K, c)
        change = c - self.P
        oscillates = change.sign() * self.R == -1
        self.f = self.momentum * oscillates + (1 - self.momentum) * self.f
        self.R = torch.where(change != 0, change.sign(), self.R)
        self.P = c
        self.oscillations += int(oscillates.sum())
        self.transitions += int((change != 0).sum())
        if threshold > 0:
            new = (self.f > threshold) & ~self.F
            self.K = torch.where(new, self.e.round(), self.K)
            self.F = self.F | new
            self.e = self.momentum * c + (1 - self.momentum) * self.e
        return c


def tracked_codes(bits: int, size: int, momentum: float) -> Weight:
    """Weights on a grid of scale 1 and lowest code -2^(bits - 1), whose x are codes."""
    qrange = torch.tensor([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1], dtype=torch.int32)
    return Weight(GridCase("codes", torch.zeros(size), torch.ones(1), None, None, qrange, None, 0.0), momentum)


def state_of(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """f, frozen, and frozen code - qmin."""
    word = words.unpacked(weight.state[0])
    return weight.state[1].double() / weight.state[4][0], word.frozen, word.index


def test_agrees_with_algorithm_1() -> None:
    """4,000 weights x 6,000 steps between two codes each, while the threshold begins, falls slowly, and falls fast."""
    size, momentum = 4000, 0.01
    weight, eager = tracked_codes(3, size, momentum), Algorithm1(momentum)
    op, draw = torch.ops.fastqat.multi_tensor_fake_quantize, torch.Generator().manual_seed(3)
    lower = torch.randint(-4, 3, (size,), generator=draw).double()
    rate, up = torch.rand(size, generator=draw) ** 3 * 0.3, torch.rand(size, generator=draw) < 0.5
    falling = np.geomspace(0.12, 0.01, 3000)
    for t in range(6000):
        up = up ^ (torch.rand(size, generator=draw) < rate)
        threshold = 0.0 if t < 1500 else falling[t - 1500] if t < 4500 else 0.01 * 0.98 ** min(t - 4500, 100)
        threshold = float(np.float32(threshold))
        codes = lower + up
        weight.case.x.copy_(codes)
        (y,) = quantize(op, [weight], t, [threshold])
        assert torch.equal(y.double(), eager.step(codes, threshold)), f"codes of step {t}"
        if t % 200 == 199:
            f, frozen, kept = state_of(weight)
            assert (f - eager.f).abs().max() < 1e-6, t
            assert torch.equal(frozen, eager.F) and torch.equal(kept[frozen] - 4.0, eager.K[frozen].float()), t
            assert weight.state[3].tolist()[:3] == [eager.transitions, eager.oscillations, int(eager.F.sum())], t
    assert 500 < int(eager.F.sum()) < 3900 and eager.oscillations > 100_000


@pytest.mark.parametrize("backend", ("reference", "cpu", "cuda-on-host", "triton", "cuda"), indirect=True)
def test_trace(backend: str) -> None:
    """Two weights by hand: m = .1, threshold .25."""
    codes = ((0, 0), (1, 0), (0, 1), (1, 2), (0, 1), (1, 2), (1, 1), (1, 2))
    out = ((0, 0), (1, 0), (0, 1), (1, 2), (0, 1), (0, 2), (0, 1), (0, 1))
    f = ((0, 0), (0, 0), (0.1, 0), (0.19, 0), (0.271, 0.1), (0.2439, 0.19), (0.21951, 0.271), (0.197559, 0.2439))
    e = {3: (0.181, 0.29), 5: (None, 0.5249)}
    frozen = [()] * 4 + [(0,), (0,), (0, 1), (0, 1)]
    play(backend, codes, out, f, frozen, 0.25, averages=e)


@pytest.mark.parametrize("backend", ("reference", "cpu", "cuda-on-host", "triton", "cuda"), indirect=True)
def test_trace_with_a_jump(backend: str) -> None:
    """Frozen at 0 while at 1: the jump there in the next step is a change, and an oscillation (by hand)."""
    codes = ((0, 1), (1, 1), (0, 1), (1, 1), (1, 1), (1, 2))
    out = ((0, 1), (1, 1), (0, 1), (1, 1), (0, 1), (0, 2))
    f = ((0, 0), (0, 0), (0.1, 0), (0.19, 0), (0.271, 0), (0.2439, 0))
    counts = ((0, 0, 0, 0), (1, 0, 0, 1), (2, 1, 0, 1), (3, 2, 1, 1), (4, 3, 1, 1), (5, 3, 1, 1))
    play(backend, codes, out, f, [()] * 3 + [(0,)] * 3, 0.15, counts=counts)


def play(
    backend: str,
    codes: tuple,
    out: tuple,
    f: tuple,
    frozen: list[tuple],
    threshold: float,
    averages: dict[int, tuple] | None = None,
    counts: tuple | None = None,
) -> None:
    """Run codes through a tracked weight and compare what comes with what was written down."""
    weight = tracked_codes(3, 2, 0.1).twin(device_of(backend))
    for t, code in enumerate(codes):
        weight.case.x.copy_(torch.tensor(code))
        (y,) = quantize(torch.ops.fastqat.multi_tensor_fake_quantize, [weight], t, [threshold])
        frequency, held, kept = (v.cpu() for v in state_of(weight))
        assert y.tolist() == list(out[t]), t
        assert frequency.tolist() == pytest.approx(f[t], abs=1e-6), t
        assert held.nonzero().flatten().tolist() == list(frozen[t]), t
        average = weight.state[2].double().cpu() / weight.state[4][0].item() + y.cpu()
        for i, want in enumerate((averages or {}).get(t, ())):
            assert want is None or average[i].item() == pytest.approx(want, abs=1e-6), t
        if counts:
            assert weight.state[3].tolist()[:4] == list(counts[t]), t


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck() -> None:
    """torch.library.opcheck of both ops: they write what the schema says, and trace without being run."""
    weights = [with_random_state(w.case, i) if w.momentum else w for i, w in enumerate(walking()[0][:6:2])]
    calls: list[tuple] = []
    ops = torch.ops.fastqat
    quantize(lambda *arguments: calls.append(arguments), weights, 44, [0.1] * len(weights))
    torch.library.opcheck(ops.multi_tensor_fake_quantize.default, calls[0], test_utils=OPCHECKS)
    gs = [torch.ones_like(w.case.x) for w in weights]
    differentiate(lambda *arguments: calls.append(arguments), weights, gs, [LEARNINGS[0]] * len(weights), 44)
    torch.library.opcheck(ops.multi_tensor_fake_quantize_backward.default, calls[1], test_utils=OPCHECKS)
