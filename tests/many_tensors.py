"""Tensors, states and calls of the ops on many tensors, as their tests use them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import cases
import oracle
import pytest
import torch
from cases import Grid, GridCase, random
from torch import Tensor

from fastqat.nn.tracking import SEAL
from fastqat.ops import estimators, words

on_backends = pytest.mark.parametrize("backend", ("cpu", "cuda-on-host", "triton", "cuda"), indirect=True)
of_dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
of_granularities = pytest.mark.parametrize("granularity", cases.GRANULARITIES)
GRIDS = {grid.name: grid for bits in range(1, 9) for grid in cases.grids_of(bits)}
STATE = ("words", "frequency", "average", "counts", "clock")
FENCE = 17  # elements before and behind every tensor of a state


def fenced(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape and strides of empty_like between fences of the value 77; zeros."""
    like = torch.empty_like(like)
    length = like.numel()
    buffer = torch.full((length + 2 * FENCE,), 77, dtype=dtype, device=like.device)
    return buffer.as_strided(like.shape, like.stride(), FENCE).zero_()


@dataclass
class Weight:
    """One tensor of a call with its constants and its state."""

    case: GridCase
    momentum: float = 0.0
    use_average: bool = True
    tensor_id: int = -1
    seed: int = 0x0123456789ABCDEF
    out_dtype: torch.dtype | None = None
    state: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        x, none = self.case.x, torch.empty(0, device=self.case.x.device)
        bits = int(self.case.qrange[1] - self.case.qrange[0]).bit_length()
        dtypes = (words.dtype_of(bits), torch.float32, torch.float32)
        if not self.momentum:
            self.state = [none] * 5
        elif not self.state:
            self.state = [fenced(x, dtype) for dtype in dtypes]
            self.state.append(fenced(none.new_empty(5), torch.int64))
            self.state[3][4] = SEAL
            self.state.append(fenced(none.new_empty(3), torch.float64))
            self.state[4].copy_(torch.tensor([1.0, -1.0, 0.0]))

    def twin(self, device: str = "cpu") -> Weight:
        """The same weight with a state of its own."""
        case = GridCase(*(t.to(device) if isinstance(t, Tensor) else t for t in self.case))
        twin = dataclasses.replace(self, case=case, state=[])
        for mine, its in zip(self.state, twin.state, strict=True):
            its.copy_(mine)
        return twin

    def check_fences(self) -> None:
        """Nothing was written outside of the state."""
        for name, t in zip(STATE, self.state, strict=True):
            if self.momentum:
                assert name != "counts" or t[4].item() == SEAL, f"{self.case.label}: the seal is broken"
                whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
                ends = torch.cat([whole[:FENCE], whole[t.numel() + FENCE :]])
                assert (ends == 77).all(), f"{self.case.label}: {name}: written outside"


def lists(weights: list[Weight], step: int) -> tuple:
    """xs, grids and noise of the schema."""
    none = weights[0].case.scale.new_empty(0)
    columns = list(zip(*(w.case[1:] for w in weights), strict=True))
    shifts = [[none if t is None else t for t in column] for column in columns[2:4]]
    axes = [-1 if axis is None else axis for axis in columns[5]]
    at = torch.tensor([step], device=none.device)
    noise = ([w.seed for w in weights], [w.tensor_id for w in weights], [at] * len(weights))
    return list(columns[0]), list(columns[1]), *shifts, list(columns[4]), axes, list(columns[6]), *noise


def quantize(run: Callable, weights: list[Weight], step: int, thresholds: list[float], advance: bool = True) -> list:
    """The outputs of one call of the forward op; moves the states on."""
    xs, *rest = lists(weights, step)
    ys = [torch.empty_like(w.case.x, dtype=w.out_dtype).fill_(77) for w in weights]
    limits = [torch.tensor([t], device=xs[0].device) for t in thresholds]
    state = [[w.state[k] for w in weights] for k in range(5)]
    run(xs, *rest, [w.momentum for w in weights], [int(w.use_average) for w in weights], limits, advance, *state, ys)
    return ys


def assert_same(names: tuple[str, ...], got: list[Tensor], want: list[Tensor], label: str) -> None:
    """Equal bit for bit, but for the sign of 0."""
    for name, a, b in zip(names, got, want, strict=True):
        bad = oracle.wrong(a.cpu(), b.cpu())
        assert a.dtype == b.dtype and a.shape == b.shape, f"{label}: {name}"
        if bad.any():
            where = bad.nonzero()[:5].tolist()
            pairs = [(a[tuple(i)].item(), b[tuple(i)].item()) for i in where]
            raise AssertionError(f"{label}: {name}: {int(bad.sum())} differ, at {where}: got and want {pairs}")


def case_of(shape: tuple[int, ...], axis: int | None, grid: Grid, dtype: torch.dtype, layout: str) -> GridCase:
    """A case with ordinary scales, whose x is still to be filled."""
    n = 1 if axis is None else shape[axis]
    scale, zero, offset = cases.grid_tensors(grid, tuple((0.05 + 0.1 * random((n,), 3).abs()).tolist()), 0.0)
    x = cases.with_layout(torch.zeros(shape, dtype=dtype), layout)
    assert x is not None, (shape, layout)
    qrange = torch.tensor([grid.qmin, grid.qmax], dtype=torch.int32)
    return GridCase(f"{shape} axis {axis} {layout} {grid.name} {dtype}", x, scale, zero, offset, qrange, axis, 1e-6)


def move(case: GridCase, t: int) -> None:
    """Fill x for step t: each weight around a centre of its own, some about a threshold, a few NaN or infinite."""
    shape = [1] * case.x.dim()
    if case.axis is not None:
        shape[case.axis] = -1
    scale = case.scale.view(shape)
    low, high = (float(v) - (0.0 if case.zero_point is None else 1.0) for v in case.qrange)
    size = tuple(case.x.shape)
    centre = low - 0.6 + (high - low + 1.2) * torch.sigmoid(2 * random(size, 1))
    centre = torch.where(random(size, 2) > 0, centre, centre.floor() + 0.5)  # half of them at a threshold
    spread = 0.6 * random(size, 4).abs().clamp(0.01)
    x = scale * (centre + spread * random(size, 1000 + t))
    x = x if case.offset is None else x + case.offset.view(shape)
    odd = random(size, 2000 + t)
    x = torch.where(odd > 2.2, torch.nan, torch.where(odd < -2.4, torch.inf * random(size, 5).sign(), x))
    case.x.copy_(x)


THRESHOLDS: dict[str, Callable[[int], float]] = {
    "constant": lambda t: 0.25,
    "switched on": lambda t: 0.2 if t >= 6 else 0.0,
    "falling": lambda t: 0.95 * 0.8**t,
    "off and on": lambda t: 0.0 if t % 7 in (4, 5) else 0.3,
    "none": lambda t: 0.0,
}
# shape, axis, layout, grid, dtype, momentum, thresholds, use_average, tensor id
WALKS = (
    ((257,), None, "contiguous", "signed3", torch.float32, 0.1, "constant", True, -1),
    ((6, 5, 3, 3), 0, "channels_last", "restricted4", torch.float32, 0.9, "falling", True, -1),
    ((7, 40), 1, "transposed", "affine2", torch.bfloat16, 0.1, "switched on", True, -1),
    ((33, 9), 0, "contiguous", "offset4", torch.float16, 0.1, "off and on", True, -1),
    ((5, 33), 1, "contiguous", "fractional8", torch.float32, 0.99, "constant", True, -1),
    ((300,), None, "shifted", "signed1", torch.float32, 0.3, "constant", False, -1),
    ((4, 3, 3, 5), 1, "contiguous", "signed6", torch.float16, 0.1, "falling", True, -1),
    ((0, 3), 0, "contiguous", "signed4", torch.float32, 0.1, "constant", True, -1),
    ((12, 10), 1, "transposed", "signed4", torch.bfloat16, 0.1, "none", True, 3),
    ((5, 41), 0, "contiguous", "offset7", torch.float32, 0.2, "off and on", False, 9),
    ((9, 31), 0, "step", "affine5", torch.float32, 0.5, "constant", False, -1),
    ((100,), None, "contiguous", "outside4", torch.float32, 0.0, "none", True, -1),
    ((6, 5, 3, 3), 0, "channels_last", "signed4", torch.float32, 0.0, "none", True, 7),
)


def walking(device: str = "cpu") -> tuple[list[Weight], list[Callable[[int], float]]]:
    """The weights of WALKS and their thresholds."""
    made, limits = [], []
    for shape, axis, layout, grid, dtype, momentum, limit, use_average, tensor_id in WALKS:
        case = case_of(shape, axis, GRIDS[grid], dtype, layout)
        made.append(Weight(case, momentum, use_average, tensor_id).twin(device))
        limits.append(THRESHOLDS[limit])
    return made, limits


def with_random_state(case: GridCase, number: int) -> Weight:
    """A weight in the middle of its training: all kinds of words, frequencies and averages; one in six is to begin."""
    weight = Weight(case, (0.1, 0.01, 0.9)[number % 3], number % 2 == 0, 5 if number % 5 == 4 else -1)
    weight.out_dtype = (None, *cases.DTYPES)[number % 4]
    size, generator = case.x.shape, torch.Generator().manual_seed(number)
    top = int(case.qrange[1] - case.qrange[0])
    index, other = (torch.randint(0, top + 1, size, generator=generator, dtype=torch.int32) for _ in range(2))
    direction = torch.randint(0, 3, size, generator=generator, dtype=torch.int32)
    frozen = torch.rand(size, generator=generator) < 0.3
    growth = (1.5, 7e8, 2.0**59.99)[number % 3]
    if begins := number % 6 == 5:
        index, direction, frozen = torch.zeros_like(index), torch.zeros_like(direction), torch.zeros_like(frozen)
    weight.state[0].copy_(words.packed(index, direction, frozen, weight.state[0].dtype))
    weight.state[1].copy_(torch.rand(size, generator=generator) * growth)
    weight.state[2].copy_(torch.where(frozen, other, torch.rand(size, generator=generator) * growth - growth / 2))
    weight.state[3].copy_(torch.tensor([2**40, 5, 3, 2, SEAL]))
    weight.state[4].copy_(torch.tensor([growth, -1.0 if begins else 41.0, (0.0, 0.5, 0.2)[number % 3]]))
    return weight


class Learning(NamedTuple):
    """What the backward op is told besides the forward one."""

    estimator: int = estimators.STE
    strength: float = 0.0
    dampening: float | None = None
    rounded_mask: bool = True
    lsq: bool = False
    learned: bool = True  # the grid is


def differentiate(
    run: Callable, weights: list[Weight], gs: list[Tensor], learning: list[Learning], step: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """dx, dscale and dshift of each weight from one call of the backward op."""
    xs, *rest = lists(weights, step)
    none = rest[0][0].new_empty(0)
    scalars = [
        [none if v is None else none.new_tensor([v]) for v in (rule.strength, rule.dampening)] for rule in learning
    ]
    learned = [rule.learned for rule in learning]
    dscales = [
        torch.full_like(w.case.scale, 77) if wanted else none for w, wanted in zip(weights, learned, strict=True)
    ]
    shifts = [w.case.zero_point if w.case.offset is None else w.case.offset for w in weights]
    dshifts = [
        torch.full_like(shift, 77) if wanted and shift is not None else none
        for shift, wanted in zip(shifts, learned, strict=True)
    ]
    dxs = [torch.full_like(x, 77) for x in xs]
    flags = ([int(getattr(rule, name)) for rule in learning] for name in ("rounded_mask", "lsq", "estimator"))
    state = [w.state[0] for w in weights]
    run(gs, xs, *rest, *flags, [s for s, _ in scalars], [d for _, d in scalars], state, dxs, dscales, dshifts)
    return list(zip(dxs, dscales, dshifts, strict=True))


LEARNINGS = tuple(
    Learning(estimator, strength, dampening, rounded_mask, lsq, learned)
    for (estimator, strength), dampening, rounded_mask, lsq, learned in zip(
        ((0, 0.0), (1, 0.2), (2, 0.5), (3, 1.0), (4, 0.0), (5, 0.0), (2, 2.9), (1, 0.7), (0, 0.0), (2, 0.01), (3, 7.0)),
        (None, 0.3, None, 0.01, 0.0, 0.2, 0.7, None, 0.1, 0.2, None),
        itertools.cycle((True, True, False)),
        itertools.cycle((False, True)),
        itertools.chain([True] * 8, (False, False, True)),
        strict=False,
    )
)
