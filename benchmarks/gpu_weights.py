"""All 53 weights of a MobileNetV2, forward and backward, 3 bits per channel, 0.5 % of the codes changing in each step.

GPU time: one CUDA graph of the whole, replayed with an empty cache; so the peers are spared their launches, too. A peer
whose kernels a graph cannot hold is timed as it is called. ``reduce-overhead`` is torch.compile's own use of graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from all_weights import OSCILLATION, QMAX, QMIN, AllWeights, QuantizeAll, all_tracked
from gpu_peers import MAKERS, check
from gpu_timing import (
    DEVICE,
    REHEARSAL,
    Call,
    ColdCache,
    Record,
    as_called,
    attempt,
    captured,
    not_measured,
    take_turns,
)
from peers import TrackingState, eager_lsq
from torch import Tensor

OURS, PLAIN = "53 weights, tracked: fastqat", "53 weights, plain: fastqat"
WHERE, EAGER = "53 weights, tracked: where-form, reduce-overhead", "53 weights, tracked: where-form, eager"
LSQ, NNCF, AIMET = (f"53 weights, plain: {name}" for name in ("compiled LSQ", "NNCF CUDA", "AIMET Triton"))
# contender: the one of fastqat that it is compared with, and how many times longer it should take
GOALS = {WHERE: (OURS, 5), EAGER: (OURS, 30), NNCF: (OURS, 3), AIMET: (OURS, 3), LSQ: (PLAIN, 1)}
COUNT = 3 if REHEARSAL else 53  # of the weights that a peer takes


def lsq_of_all(weights: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """Plain LSQ of every weight."""
    rows = zip(weights, scales, strict=True)
    return [eager_lsq(w.flatten(1), s, QMIN, QMAX).view_as(w) for w, s in rows]


def training(all_weights: AllWeights, quantize_all: QuantizeAll, states: list[TrackingState]) -> Call:
    """Forward and backward pass of a peer over the weights, which move in place.

    Their addresses are told to torch.compile, which then has its graphs read them where they are.
    """
    weights, gs = all_weights.weights[:COUNT], all_weights.g[:COUNT]
    scales = [s.detach().clone().requires_grad_() for s in all_weights.scales[:COUNT]]
    kept = [t for state in states for t in vars(state).values()]
    for tensor in [*weights, *scales, *kept]:
        torch._dynamo.mark_static_address(tensor)

    def run() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(quantize_all(weights, scales), weights + scales, gs)

    return run


def by_package(all_weights: AllWeights, name: str) -> Call:
    """Forward and backward pass of another package, weight by weight."""
    peer = MAKERS[name]()
    check(peer, DEVICE)
    weights, gs = all_weights.weights[:COUNT], all_weights.g[:COUNT]
    parameters = [peer.parameter(s.detach(), QMAX).requires_grad_() for s in all_weights.scales[:COUNT]]

    def run() -> object:
        pairs = zip(weights, parameters, strict=True)
        ys = [peer.quantize(w.flatten(1), p, QMIN, QMAX).view_as(w) for w, p in pairs]
        return torch.autograd.grad(ys, weights + parameters, gs)

    return run


def contenders(tracked: AllWeights, plain: AllWeights) -> dict[str, Callable[[], Call]]:
    """Everyone: how a call of it is made. What takes long to compile comes last."""

    def where(**options: object) -> Call:
        states = tracked.states()[:COUNT]
        function = all_tracked(states)
        return training(tracked, torch.compile(function, **options) if options else function, states)

    return {
        OURS: lambda: tracked.step,
        PLAIN: lambda: plain.step,
        EAGER: where,
        NNCF: lambda: by_package(plain, "NNCF CUDA"),
        AIMET: lambda: by_package(plain, "AIMET Triton"),
        LSQ: lambda: training(plain, torch.compile(lsq_of_all, fullgraph=True), []),
        WHERE: lambda: where(fullgraph=True, mode="reduce-overhead"),
    }


def measure(record: Record, rounds: int) -> None:
    """GPU time of everyone with an empty and with a full cache, and the time of a call."""
    width = 0.1 if REHEARSAL else 1.0
    tracked, plain = (AllWeights(o, DEVICE, share=0.005, width=width) for o in (OSCILLATION, None))
    cold = ColdCache()

    def move() -> None:
        tracked.move()
        plain.move()

    def move_and_empty() -> None:
        move()
        cold()

    numel = sum(w.numel() for w in tracked.weights)
    for name, make in contenders(tracked, plain).items():
        call = attempt(name, make)
        if call is None:
            continue
        in_graph = call if name == WHERE else graph_of(name, call)
        moved = {name: 22 * numel} if name == OURS else {name: 20 * numel} if name == PLAIN else {}
        record.add(take_turns({name: in_graph}, rounds, move_and_empty), moved)
        record.add({f"{name}, in the cache": take_turns({name: in_graph}, rounds, move)[name]})

        def both(call: Call = call) -> None:
            move()
            call()

        record.add({f"{name}, as called": as_called({name: both}, max(rounds // 6, 2))[name]})
        hold(record, name)


def graph_of(name: str, call: Call) -> Call:
    """The call in a graph; the call itself, with a line that says why, where a graph cannot hold it."""
    try:
        replay = captured(call)
        replay()
        return replay
    except Exception as error:
        not_measured(f"{name}, in a graph; it is timed as it is called", error)
        return call


def hold(record: Record, name: str) -> None:
    """Hold what was measured against its goal."""
    if name == OURS:
        label = "53 weights, tracked forward + backward, us of GPU time"
        record.goal(label, record.seconds[OURS] * 1e6, "<=", 40, OURS)
    elif name in GOALS:
        ours, bound = GOALS[name]
        for kind in ("", ", as called"):
            ratio = record.ratio(f"{name}{kind}", f"{ours}{kind}")
            record.goal(f"{name} / {ours.rpartition(', ')[2]}{kind}", ratio, ">=", bound, ours)
