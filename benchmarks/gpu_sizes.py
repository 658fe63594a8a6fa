"""Forward and backward pass (dx, gradient of the range) at four sizes against the peers; float32, per channel."""

from __future__ import annotations

import functools

import torch
from gpu_peers import MAKERS, OURS, Peer, check
from gpu_timing import (
    DEVICE,
    SHRINK,
    Call,
    Record,
    as_called,
    attempts,
    not_measured,
    rounds_of,
    sets_past_cache,
    synchronize,
    take_turns,
)
from torch import Tensor

QMIN, QMAX, CHANNELS = -8, 7, 1024
SIZES = {"1 M": 2**20, "16 M": 2**24, "64 M": 2**26, "256 M": 2**28}


def installed() -> list[Peer]:
    """The peers that run here; a line for each other one."""
    found = []
    for name, make in MAKERS.items():
        try:
            peer = make()
            check(peer, DEVICE)
            synchronize()
            found.append(peer)
        except Exception as error:  # not installed, not compiled, other values: the reason is in the message
            not_measured(name, error)
    return found


def training(peer: Peer, sets: list[tuple[Tensor, Tensor]], scale: Tensor) -> Call:
    """Forward and backward pass through the Python API of a peer."""
    parameter = peer.parameter(scale, QMAX).requires_grad_()

    def run(x: Tensor, g: Tensor) -> object:
        return torch.autograd.grad(peer.quantize(x, parameter, QMIN, QMAX), (x, parameter), g)

    return rounds_of(run, sets)


def measure_size(record: Record, size: str, peers: list[Peer], rounds: int) -> None:
    """GPU time and the time of a call, of everyone at one size."""
    shape = (CHANNELS, SIZES[size] // SHRINK // CHANNELS + (SHRINK > 1))
    numel = shape[0] * shape[1]
    torch.manual_seed(0)
    sets = []
    for _ in range(sets_past_cache(16 * numel)):
        x, g = (torch.randn(shape, device=DEVICE) for _ in range(2))
        sets.append((x.requires_grad_(), g))
    scale = torch.full((CHANNELS,), 0.3, device=DEVICE)
    calls = attempts({peer.name: functools.partial(training, peer, sets, scale) for peer in peers})
    gpu = take_turns(calls, rounds)
    record.add({f"{size}: {name}": s for name, s in gpu.items()}, {f"{size}: {name}": 20 * numel for name in gpu})
    record.add({f"{size}: {name}, as called": s for name, s in as_called(calls, max(rounds // 3, 2)).items()})
    ours = f"{size}: {OURS.name}"
    for name in calls:
        for kind in ("", ", as called") if name not in (OURS.name, "eager LSQ") else ():
            value = record.ratio(f"{size}: {name}{kind}", f"{ours}{kind}")
            record.goal(f"{size}, forward + backward: {name} / fastqat{kind}", value, ">=", 1.0, ours)


def measure(record: Record, rounds: int) -> None:
    """All sizes, the small ones first."""
    peers = [OURS, *installed()]
    for size in SIZES:
        measure_size(record, size, peers, rounds)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
