"""Kernels at 64 M elements against a copy of the device: what share of its bandwidth they reach.

8192 x 8192, one scale per row. The bytes are those that an ideal pass must move. Each kernel goes round sets of tensors
that together are larger than the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from gpu_timing import DEVICE, SHRINK, Call, Record, attempts, not_measured, rounds_of, sets_past_cache, take_turns
from torch import Tensor

import fastqat

ROWS, COLUMNS = 8192, 8192 // SHRINK + 8 * (SHRINK > 1)
QMIN, QMAX, SHARE = -4, 3, 0.005
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# bytes per element of float32 and bfloat16, and the goal
KERNELS = {
    "forward": ((8, 4), 0.92),
    "forward per tensor": ((8, 4), 0.92),
    "backward dx + ds": ((12, 6), 0.90),
    "backward dx + ds per tensor": ((12, 6), 0.90),
    "forward, tracking and freezing, 0.5 % change": ((9, 5), 0.88),
    "backward, tracking and freezing": ((13, 7), 0.88),
}


class Tensors:
    """Sets of (x, g, y) of one dtype, and what the ops ask for."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        shape = (ROWS, COLUMNS)
        size = 2 * ROWS * COLUMNS * torch.empty(0, dtype=dtype).element_size()
        self.sets = [
            (
                *(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)),
                torch.zeros(shape, dtype=dtype).to(DEVICE),
            )
            for _ in range(max(2, sets_past_cache(size)))
        ]
        self.scale = torch.full((ROWS,), 0.8, device=DEVICE)
        self.qrange = torch.tensor([QMIN, QMAX], dtype=torch.int32, device=DEVICE)
        self.none = torch.empty(0, device=DEVICE)

    def copy(self) -> Call:
        """y.copy_(x)."""
        return rounds_of(lambda x, g, y: y.copy_(x), self.sets)

    def forward(self, per_tensor: bool = False) -> Call:
        """fake_quantize into a given tensor."""
        grid, op = self._grid(per_tensor), torch.ops.fastqat.fake_quantize_out
        return rounds_of(lambda x, g, y: op(x, *grid, None, y), self.sets)

    def backward(self, per_tensor: bool = False) -> Call:
        """Gradients of x and of the scale."""
        grid, op = self._grid(per_tensor), torch.ops.fastqat.fake_quantize_backward_out
        sums = torch.empty_like(grid[0]), self.none
        return rounds_of(lambda x, g, y: op(g, x, *grid, True, False, 0.0, y, *sums), self.sets)

    def _grid(self, per_tensor: bool) -> tuple:
        scale = self.scale[:1].clone() if per_tensor else self.scale
        return scale, None, None, self.qrange, None if per_tensor else 0, 1e-8

    def _lists(self, step: Tensor) -> tuple:
        """The grid and the noise of one tensor for the ops on many."""
        none = [self.none]
        return [self.scale], none, none, [self.qrange], [0], [1e-8], [0], [-1], [step]

    def tracked(self) -> tuple[Call, Call]:
        """A forward pass at a step of its own, over weights of which a share has changed; and a backward pass.

        A pair of tensors takes turns under one state: each call finds the other one's codes. Enough pairs go round that
        no tensor and no state is in the cache when its turn comes.
        """
        like = self.sets[0][0]
        pairs = [(x, moved(x, self.scale), self._state(like), y) for x, _, y in self.sets]
        threshold = torch.full((1,), 0.9, device=DEVICE)
        steps = iter(torch.arange(10_000, device=DEVICE).split(1))
        turns = itertools.cycle([(pair[which], *pair[2:]) for which in (0, 1) for pair in pairs])

        def forward() -> None:
            x, state, y = next(turns)
            self.last_state = state
            options = (*self._lists(next(steps)), [0.01], [1], [threshold], True)
            torch.ops.fastqat.multi_tensor_fake_quantize([x], *options, *([s] for s in state), [y])

        sums, none, lists = torch.empty_like(self.scale), [self.none], self._lists(next(steps))

        def backward(x: Tensor, g: Tensor, y: Tensor, words: Tensor) -> None:
            options = (*lists, [1], [0], [0], none, none, [words])
            torch.ops.fastqat.multi_tensor_fake_quantize_backward([g], [x], *options, [y], [sums], none)

        with_words = [(*s, pair[2][0]) for s, pair in zip(self.sets, pairs, strict=True)]
        return forward, rounds_of(backward, with_words)

    def _state(self, like: Tensor) -> tuple[Tensor, ...]:
        """words, frequencies, averages, counts and clock before the first step."""
        tracker = fastqat.nn.tracking.Tracker(fastqat.Oscillation(0.01), 3, like.device)
        tracker.prepare(like, QMIN)
        return tuple(getattr(tracker, name) for name in fastqat.multi_tensor.STATE)


def moved(x: Tensor, scale: Tensor) -> Tensor:
    """x with a share of its elements moved by a step of the grid, towards 0."""
    chosen = torch.rand(x.shape, device=x.device) < SHARE
    step = scale.view(-1, 1).to(x.dtype)
    return torch.where(chosen, x - step * x.sign(), x)


def measure(record: Record, rounds: int) -> None:
    """All kernels of both dtypes, and each as a share of the best copy."""
    bandwidths = []
    for column, (name, dtype) in enumerate(DTYPES.items()):
        tensors = Tensors(dtype)
        makers: dict[str, Callable[[], Call]] = {
            "copy": tensors.copy,
            "forward": tensors.forward,
            "forward per tensor": lambda t=tensors: t.forward(True),
            "backward dx + ds": tensors.backward,
            "backward dx + ds per tensor": lambda t=tensors: t.backward(True),
        }
        calls = attempts(makers)
        sizes = {"copy": (8, 4), **{kernel: size for kernel, (size, _) in KERNELS.items()}}
        found = take_turns(calls, rounds)
        del calls
        try:
            forward, backward = tensors.tracked()
            kinds = [kernel for kernel in KERNELS if "tracking" in kernel]
            found |= take_turns(dict(zip(kinds, (forward, backward), strict=True)), rounds)
            changes = int(tensors.last_state[3][3]) / (ROWS * COLUMNS)
            print(f"changes in the last tracked step: {changes:.2%} of the codes", flush=True)
            del forward, backward
        except torch.OutOfMemoryError as error:
            not_measured(f"tracking, {name}", error)
        moved_bytes = {f"{kernel}, {name}": sizes[kernel][column] * ROWS * COLUMNS for kernel in found}
        record.add({f"{kernel}, {name}": seconds for kernel, seconds in found.items()}, moved_bytes)
        bandwidths.append(moved_bytes[f"copy, {name}"] / found["copy"])
    for kernel, (_, bound) in KERNELS.items():
        for name in DTYPES:
            key = f"{kernel}, {name}"
            if key in record.seconds:
                share = record.moved[key] / record.seconds[key] / max(bandwidths)
                record.goal(f"64 M, {key} / copy bandwidth", share, ">=", bound, key)
