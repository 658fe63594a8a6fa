"""How a GPU is timed: CUDA events, contenders that take turns, graphs, and a record of what was measured.

With FASTQAT_GPU_REHEARSAL=1 the same code runs on CPU tensors of tiny sizes with a CPU timer.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

REHEARSAL = bool(os.environ.get("FASTQAT_GPU_REHEARSAL"))
DEVICE = "cpu" if REHEARSAL else "cuda"
SHRINK = 2**12 if REHEARSAL else 1  # sizes are divided by this
CYCLES_PER_SECOND = 2e9  # no less than any GPU's clock: a wait in cycles is then never shorter than was asked for
Call = Callable[[], object]


def synchronize() -> None:
    """Wait for the device."""
    if not REHEARSAL:
        torch.cuda.synchronize()


def warm_up(seconds: float = 1.0) -> None:
    """Copy for a while, until the clocks are those of work."""
    if REHEARSAL:
        return
    x, y = (torch.ones(2**28, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            y.copy_(x)
        synchronize()


def cache_bytes() -> int:
    """Size of the cache that all multiprocessors share."""
    return 0 if REHEARSAL else getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 2**27


def sets_past_cache(bytes_per_set: int) -> int:
    """How many sets of tensors to go round, so that none is in the cache when its turn comes again."""
    return 1 + 3 * cache_bytes() // max(bytes_per_set, 1)


def rounds_of(function: Callable[..., object], sets: list[tuple]) -> Call:
    """A callable that runs the function on the next set each time."""
    turns = itertools.cycle(sets)
    return lambda: function(*next(turns))


class ColdCache:
    """Empties the cache by reading: nothing is left in it that would have to be written back."""

    def __init__(self) -> None:
        self.other = torch.zeros(4 * cache_bytes() // 4 + 1, device=DEVICE)

    def __call__(self) -> None:
        self.other.max()


def captured(call: Call) -> Call:
    """A CUDA graph of a call, to be replayed: without what the host adds. A rehearsal makes the call itself."""
    if REHEARSAL:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()  # in the memory of the graph
    tensors = [t for t in results or () if isinstance(t, torch.Tensor)]
    for t in tensors:
        t.fill_(torch.nan)
    graph.replay()
    if any(bool(t.isnan().any()) for t in tensors):
        raise RuntimeError("a replay of the graph does not compute the results of the call")

    def replay(kept: list[torch.Tensor] = tensors) -> None:
        graph.replay()

    return replay


def take_turns(calls: dict[str, Call], rounds: int, before: Call | None = None) -> dict[str, float]:
    """Median seconds of GPU time of each call; they take turns, so that a change of mood meets all of them.

    Each timed call follows an untimed one of its own, or `before`. The stream waits until the host has put both into
    its queue: what is timed is the GPU's work, unless the call itself waits for the device.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    lead = {name: _host_seconds(call) + _host_seconds(before or call) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_time_once(call, before or call, lead[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _host_seconds(call: Call) -> float:
    """How long the host takes for a warm call."""
    for _ in range(2):
        call()
    synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    synchronize()
    return seconds


def _time_once(call: Call, before: Call, lead: float) -> float:
    if REHEARSAL:
        before()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES_PER_SECOND * min(2 * lead + 1e-4, 0.05)))
    before()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def as_called(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call as Python makes it, one after the other, host and device together."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _host_seconds(call)
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            synchronize()
            start = time.perf_counter()
            for _ in range(4):
                call()
            synchronize()
            times[name].append((time.perf_counter() - start) / 4)
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass
class Record:
    """Medians, the bytes that each had to move, and the goals; written to a file after every entry.

    A name that was not measured leaves out the goals that need it.
    """

    path: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, seconds: dict[str, float], moved: dict[str, int] | None = None) -> None:
        """Enter medians and print them."""
        self.seconds.update(seconds)
        self.moved.update(moved or {})
        for name, value in seconds.items():
            print(f"{name:<60}{value * 1e6:>12.2f} us  {self.speed(name) or '':>8}", flush=True)
        self.write()

    def speed(self, name: str) -> float | None:
        """GB/s, where the bytes are known."""
        moved = self.moved.get(name)
        return round(moved / self.seconds[name] / 1e9, 1) if moved else None

    def goal(self, label: str, value: float | None, relation: str, bound: float, name: str = "") -> None:
        """Hold a value against its goal; name: what its GB/s are of."""
        if value is None:
            return
        met = value <= bound if relation == "<=" else value >= bound
        row = {"ratio": label, "value": float(f"{value:.4g}"), "goal": f"{relation} {bound:g}", "met": met}
        self.rows.append({**row, "GB/s": self.speed(name) if name else None})
        print(f"{label:<76}{value:>9.4g}  {relation} {bound:g}{'' if met else '  MISSED'}", flush=True)
        self.write()

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """A quotient of two medians."""
        above, below = self.seconds.get(numerator), self.seconds.get(denominator)
        return above / below if above and below else None

    def write(self) -> None:
        """Write the file anew."""
        if self.path is None:
            return
        milliseconds = {name: float(f"{value * 1e3:.5g}") for name, value in self.seconds.items()}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"milliseconds": milliseconds, "ratios": self.rows}, indent=1) + "\n")
        new.replace(self.path)


def not_measured(what: str, why: object) -> None:
    """Say that something could not be measured."""
    text = str(why).strip().splitlines()
    print(f"not measured: {what} ({text[0][:160] if text else type(why).__name__})", flush=True)


def attempt(name: str, make: Callable[[], Call]) -> Call | None:
    """What make() makes, once it has run; None, with a line that says why, where it or the call fails."""
    try:
        call = make()
        call()
        synchronize()
    except Exception as error:  # whatever it is, the others go on
        not_measured(name, error)
        return None
    return call


def attempts(makers: dict[str, Callable[[], Call]]) -> dict[str, Call]:
    """The contenders that run here."""
    made = {name: attempt(name, make) for name, make in makers.items()}
    return {name: call for name, call in made.items() if call is not None}
