"""Oscillation tracking and freezing on the CPU: what they add to a pass over the weights, and what the peers take.

Weights move in each step: a pair of tensors takes turns, which differ in a given share of the codes. The contenders are
those of ``bench_fake_quantize.py`` and two that track as well: the definition in plain torch, with ``torch.where`` for
every weight, and ``torch.compile`` of it. 512 x 4608 and all 53 weights of a MobileNetV2, 3 bits, per channel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from all_weights import (
    BITS,
    MOMENTUM,
    OSCILLATION,
    QMAX,
    QMIN,
    THRESHOLD,
    AllWeights,
    QuantizeAll,
    all_tracked,
    pair,
)
from conftest import goal, take_turns
from peers import TrackingState, compiled_lsq, compiled_tracked_lsq, tracked_lsq
from torch import Tensor, nn

import fastqat
from fastqat import models
from fastqat.nn.together import BUCKETS

SHAPE = (512, 4608)
NUMEL = SHAPE[0] * SHAPE[1]
SHARES = {"0.05 %": 0.0005, "0.5 %": 0.005}  # of the codes that change in a step
PLACES = {"memory": 4, "cache": 1}  # pairs of tensors to go round

for place in PLACES:
    for share, bound in zip(SHARES, (1.25, 1.5), strict=True):
        label = f"tracked forward / copy_, {share} change, {place}"
        goal(label, f"tracked {share}[{place}]", f"copy of pairs[{place}]", "<=", bound)
    goal(f"tracked forward / forward, {place}", f"tracked 0.05 %[{place}]", f"untracked[{place}]", "<=", 1.15)
    goal(f"tracked, frozen, dampened / plain, fwd + bwd, {place}", f"all_three[{place}]", f"plain[{place}]", "<=", 1.15)
    for peer, bound in (("compiled", 12), ("eager", 30)):
        label = f"{peer} tracked / fastqat tracked, fwd + bwd, {place}"
        goal(label, f"{peer}_tracked[{place}]", f"fastqat_tracked[{place}]", ">=", bound)
for peer, bound in (("compiled", 10), ("eager", 25)):
    goal(f"53 weights: {peer} tracked / fastqat tracked", f"53_{peer}_tracked", "53_fastqat_tracked", ">=", bound)
goal("53 weights: compiled LSQ / fastqat", "53_compiled_lsq", "53_fastqat", ">=", 1.5)


def quantizer(scale: Tensor, **options) -> fastqat.FakeQuant:
    return fastqat.FakeQuant(BITS, axis=0, channels=scale.numel(), range="fixed", scale=scale, learn="scale", **options)


class Pairs:
    """Pairs of weights that take turns: each call gets the other one of its pair, pair by pair."""

    def __init__(self, sets: int, share: float) -> None:
        torch.manual_seed(0)
        weights = [torch.randn(SHAPE) * 0.1 for _ in range(sets)]
        self.scale = weights[0].abs().amax(1) / QMAX * 0.7
        self.pairs = [pair(w, self.scale, share) for w in weights]
        self.g = torch.randn(SHAPE)

    def rounds(self, make: Callable[[], Callable[[Tensor], object]]) -> Callable[[], object]:
        """A callable that runs what make() made for a pair on its next tensor: each pair has a state of its own."""
        turns: Iterator[tuple[Callable[[Tensor], object], Tensor]] = itertools.cycle(
            [(call, w) for which in (0, 1) for call, w in self._calls(make, which)]
        )

        def run() -> object:
            call, weight = next(turns)
            return call(weight)

        return run

    def _calls(self, make, which: int):
        if which == 0:
            self._made = [make() for _ in self.pairs]
        return [(call, p[which]) for call, p in zip(self._made, self.pairs, strict=True)]


def forward_of(pairs: Pairs, out: Tensor, **options) -> Callable[[], Callable[[Tensor], object]]:
    """A forward pass without gradients into a given tensor, at a step of its own."""

    def make() -> Callable[[Tensor], object]:
        q = quantizer(pairs.scale, **options)
        q(pairs.pairs[0][0])
        none = torch.empty(0)
        tracker = q.tracker
        state = [none] * 5 if tracker is None else [getattr(tracker, n) for n in fastqat.multi_tensor.STATE]
        lists = [[t] for t in state]
        momentum, threshold = (MOMENTUM, torch.tensor([THRESHOLD])) if tracker else (0.0, none)
        grid = ([q.scale.detach()], [none], [none], [q.qrange], [0], [1e-8])
        op = torch.ops.fastqat.multi_tensor_fake_quantize

        def run(weight: Tensor) -> None:
            q.step += 1
            op([weight], *grid, [0], [-1], [q.step], [momentum], [1], [threshold], True, *lists, [out])

        return run

    return make


def training(pairs: Pairs, **options) -> Callable[[], Callable[[Tensor], object]]:
    """Forward and backward pass through the module."""

    def make() -> Callable[[Tensor], object]:
        q = quantizer(pairs.scale, **options)

        def run(weight: Tensor) -> object:
            q.step += 1
            weight = weight.detach().requires_grad_()
            return torch.autograd.grad(q(weight), (weight, q.scale), pairs.g)

        return run

    return make


def peer_training(pairs: Pairs, function) -> Callable[[], Callable[[Tensor], object]]:
    """The same by a peer that tracks."""

    def make() -> Callable[[Tensor], object]:
        scale, state = (
            pairs.scale.clone().requires_grad_(),
            TrackingState.of(pairs.pairs[0][0], pairs.scale, QMIN, QMAX),
        )

        def run(weight: Tensor) -> object:
            weight = weight.detach().requires_grad_()
            y = function(weight, scale, QMIN, QMAX, state, MOMENTUM, THRESHOLD)
            return torch.autograd.grad(y, (weight, scale), pairs.g)

        return run

    return make


@pytest.mark.parametrize("place", PLACES)
def bench_tracked_forward(benchmark, place):
    out = torch.zeros(SHAPE)
    by_share = {share: Pairs(PLACES[place], value) for share, value in SHARES.items()}
    first = by_share["0.05 %"]
    contenders = {
        f"copy of pairs[{place}]": (first.rounds(lambda: out.copy_), 8 * NUMEL),
        f"untracked[{place}]": (first.rounds(forward_of(first, out)), 8 * NUMEL),
    }
    for share, pairs in by_share.items():
        tracked = forward_of(pairs, out, oscillation=OSCILLATION)
        contenders[f"tracked {share}[{place}]"] = (pairs.rounds(tracked), 9 * NUMEL)
    take_turns(benchmark, contenders, rounds=400)


@pytest.mark.parametrize("place", PLACES)
def bench_tracked_training(benchmark, place):
    pairs = Pairs(PLACES[place], SHARES["0.05 %"])
    dampening = fastqat.Dampening(0.1)
    contenders = {
        "plain": training(pairs),
        "fastqat_tracked": training(pairs, oscillation=OSCILLATION),
        "all_three": training(pairs, oscillation=OSCILLATION, dampening=dampening),
        "compiled_tracked": peer_training(pairs, compiled_tracked_lsq()),
        "eager_tracked": peer_training(pairs, tracked_lsq),
    }
    named = {f"{name}[{place}]": (pairs.rounds(make), 0) for name, make in contenders.items()}
    take_turns(benchmark, named, rounds=40)


class Whole(AllWeights):
    """All weights of a MobileNetV2, with tensors that take each other's place instead of moving."""

    def fastqat(self) -> object:
        for weight, version in zip(self.weights, next(self.versions), strict=True):
            weight.data = version
        return self.step()

    def peer(self, quantize_all: QuantizeAll) -> Callable[[], object]:
        scales = [s.detach().clone().requires_grad_() for s in self.scales]

        def run() -> object:
            weights = [w.detach().requires_grad_() for w in next(self.versions)]
            return torch.autograd.grad(quantize_all(weights, scales), weights + scales, self.g)

        return run


def bench_53_weights(benchmark):
    tracked, plain = Whole(OSCILLATION), Whole(None)
    assert hasattr(tracked.model, BUCKETS)
    lsq = compiled_lsq()
    compiled_all = torch.compile(all_tracked(tracked.states()), fullgraph=True)

    @torch.compile(fullgraph=True)
    def compiled_lsq_all(weights: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        return [lsq(w.flatten(1), s, QMIN, QMAX).view_as(w) for w, s in zip(weights, scales, strict=True)]

    contenders = {
        "53_fastqat_tracked": tracked.fastqat,
        "53_compiled_tracked": tracked.peer(compiled_all),
        "53_eager_tracked": tracked.peer(all_tracked(tracked.states())),
        "53_fastqat": plain.fastqat,
        "53_compiled_lsq": plain.peer(compiled_lsq_all),
    }
    take_turns(benchmark, {name: (call, 0) for name, call in contenders.items()}, rounds=30)


FROZEN = fastqat.Oscillation(0.01, 0.02)
METHODS: dict[str, dict[str, object]] = {
    "LSQ": {},
    "tracking": {"oscillation": fastqat.Oscillation(0.01)},
    "freezing": {"oscillation": FROZEN},
    "dampening": {"dampening": fastqat.Dampening(0.1)},
    "freezing and dampening": {"oscillation": FROZEN, "dampening": fastqat.Dampening(0.1)},
    "EWGS": {"estimator": "ewgs"},
    "DSQ": {"estimator": "dsq"},
    "PSG": {"estimator": "psg"},
    "stochastic rounding": {"estimator": "stochastic"},
    "bin regularization": {},
}
for name in list(METHODS)[1:]:
    goal(f"MobileNetV2 step, W3: {name} / LSQ", f"step_{name}", "step_LSQ", "<=", 1.05)


def bench_steps(benchmark):
    """A whole step of training by each method: a half-wide MobileNetV2, batch 128 of 32 x 32 images."""
    torch.manual_seed(0)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))
    contenders = {}
    for name, options in METHODS.items():
        model = models.build("mobilenetv2", 10, (3, 32, 32), width=0.5, stride=16, dropout=0)
        model = model.to(memory_format=torch.channels_last)
        spec = fastqat.QSpec(BITS, learn="scale", **options)
        fastqat.prepare(model, fastqat.QConfig(spec, None), first_last_bits=8)
        fastqat.quantize_weights_together(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def step(model=model, optimizer=optimizer, regularized=name == "bin regularization") -> None:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            (loss + fastqat.bin_regularization(model) if regularized else loss).backward()
            optimizer.step()

        contenders[f"step_{name}"] = (step, 0)
    take_turns(benchmark, contenders, rounds=8)
