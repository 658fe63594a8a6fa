"""On a GPU every backend gives the values of the CPU: at odd sizes, at 64 M elements, and beyond 2^31."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from gpu_device import BACKENDS, DEVICE, REHEARSAL, law_of_dscale, needs_device, normal, running, same_bits
from torch import Tensor

import fastqat
from fastqat.ops import words

pytestmark = needs_device
QMIN, QMAX = -8, 7
SIDE = 64 if REHEARSAL else 8192
BEYOND = (2**14 if REHEARSAL else 2**31) + 4099  # elements
PIECE = 2**12 if REHEARSAL else 2**27

# shape, axis
ODD = (
    ((1,), None),
    ((17,), None),
    ((100_003,), None),
    ((3, 17), 0),
    ((33, 31), 1),
    ((5, 4097), 0),
    ((4097, 5), 1),
    ((2, 3, 5, 7), 1),
    ((0, 4), 1),
)
LARGE = (((SIDE * SIDE + 3,), None), ((SIDE, SIDE), 0), ((SIDE, SIDE), 1))
DTYPES = (torch.float32, torch.bfloat16)
on_backends = pytest.mark.parametrize("backend", BACKENDS)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Truth(NamedTuple):
    """A call on the CPU and its results."""

    g: Tensor
    x: Tensor
    scale: Tensor
    qrange: Tensor
    y: Tensor
    codes: Tensor
    dx: Tensor


def grid_of(scale: Tensor, qrange: Tensor, axis: int | None) -> tuple:
    """The arguments of the grid in the order of the schemas."""
    return scale, None, None, qrange, axis, 1e-8


@functools.lru_cache(maxsize=1)
def truth(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> Truth:
    """Values that reach beyond both ends of the grid, some NaN and infinite ones, and what the CPU makes of them."""
    x, g = normal(shape, 1, dtype), normal(shape, 2, dtype)
    if x.numel() > 100:
        x.view(-1)[50:53] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    scale = 0.1 + 0.3 * normal((1 if axis is None else shape[axis],), 3).abs()
    qrange = torch.tensor([QMIN, QMAX], dtype=torch.int32)
    grid = grid_of(scale, qrange, axis)
    ops = torch.ops.fastqat
    y, codes = ops.fake_quantize(x, *grid, None), ops.quantize(x, *grid, torch.int8)
    return Truth(g, x, scale, qrange, y, codes, ops.fake_quantize_backward_input(g, x, *grid, True))


@on_backends
@of_dtypes
@pytest.mark.parametrize("shape, axis", ODD + LARGE, ids=lambda v: str(v).replace(" ", ""))
def test_values_are_those_of_the_cpu(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, backend: str
) -> None:
    """Outputs, codes and dx bit for bit; dscale to 1e-6 of the sum of its absolute terms in float64."""
    want = truth(shape, axis, dtype)
    if REHEARSAL and backend == "triton" and want.x.numel() > 5000:
        pytest.skip("too large for an interpreter")
    g, x, scale, qrange = (t.to(DEVICE, copy=True) for t in want[:4])
    grid, ops = grid_of(scale, qrange, axis), torch.ops.fastqat
    with running(backend):
        y, codes = ops.fake_quantize(x, *grid, None), ops.quantize(x, *grid, torch.int8)
        dx, dscale, _ = ops.fake_quantize_backward(g, x, *grid, True, False, 0.0)
        again = ops.fake_quantize_backward(g, x, *grid, True, False, 0.0)[1]
    assert same_bits(y, want.y) and same_bits(codes, want.codes) and same_bits(dx, want.dx)
    x.nan_to_num_(0.0, 0.0, 0.0)  # their terms: none for NaN, g * qmax and g * qmin for the infinite ones
    total, bound = law_of_dscale(g, x, scale, axis, QMIN, QMAX)
    if want.x.numel() > 100:
        at = [50, 51, 52]
        flat, s = g.reshape(-1)[at].double(), grid[0]
        lane = torch.zeros(3, dtype=torch.long) if axis is None else channel_of(shape, axis, at)
        extra = torch.stack([flat[0] * 0, flat[1] * QMAX, flat[2] * QMIN])
        total.index_add_(0, lane.to(s.device), extra)
        bound.index_add_(0, lane.to(s.device), 1e-6 * extra.abs())
    assert bool(((dscale.double() - total).abs() <= bound).all())
    assert same_bits(again, dscale)


def channel_of(shape: tuple[int, ...], axis: int, at: list[int]) -> Tensor:
    """The channels of some elements, counted in row-major order."""
    inner = torch.Size(shape[axis + 1 :]).numel()
    return torch.tensor(at) // inner % shape[axis]


@contextlib.contextmanager
def memory(bytes_per_element: float) -> Iterator[None]:
    """Skip the test where the device has not the memory, or another process takes it."""
    if REHEARSAL:
        yield
        return
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0] / 2**30, bytes_per_element * BEYOND / 2**30 + 8
    if free < needed:
        pytest.skip(f"{free:.0f} GiB are free on the device; this takes {needed:.0f}")
    try:
        yield
    except torch.OutOfMemoryError as error:
        pytest.skip(str(error)[:200])


@pytest.mark.parametrize("axis", (None, 0), ids=("tensor", "channel"))
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_more_than_2_31_elements(backend: str, axis: int | None) -> None:
    """Every piece of a tensor that no 32-bit index reaches has the values that it has alone; the sum obeys the law."""
    if REHEARSAL and backend == "triton":
        pytest.skip("too large for an interpreter")
    with memory(8), running(backend):
        check_backend_beyond(axis)


def check_backend_beyond(axis: int | None) -> None:
    """Forward and backward pass against those of the pieces."""
    shape = (BEYOND,) if axis is None else (3, BEYOND // 3)
    x, g = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    scale = torch.tensor([0.31] if axis is None else [0.31, 0.2, 0.43], device=DEVICE)
    qrange = torch.tensor([QMIN, QMAX], dtype=torch.int32, device=DEVICE)
    grid, ops = grid_of(scale, qrange, axis), torch.ops.fastqat
    y = ops.fake_quantize(x, *grid, None)
    compare(y, lambda piece, one: ops.fake_quantize(x[piece], *one, None), grid)
    del y
    dx, dscale, _ = ops.fake_quantize_backward(g, x, *grid, True, False, 0.0)
    compare(dx, lambda piece, one: ops.fake_quantize_backward_input(g[piece], x[piece], *one, True), grid)
    del dx
    sums = [
        (piece, *law_of_dscale(g[piece], x[piece], one[0], None, QMIN, QMAX)) for piece, one in pieces(x.shape, grid)
    ]
    for channel in range(scale.numel()):
        mine = [(total, bound) for piece, total, bound in sums if axis is None or piece[0] == channel]
        total, bound = sum(t for t, _ in mine), sum(b for _, b in mine)
        assert bool((dscale[channel].double() - total).abs() <= bound), f"channel {channel}"


def pieces(shape: torch.Size, grid: tuple) -> list[tuple[tuple, tuple]]:
    """Indices of pieces within one row, and the grid of each, per tensor."""
    found = []
    for row in range(shape[0] if len(shape) == 2 else 1):
        one = (grid[0][row : row + 1], *grid[1:4], None, grid[5])
        for start in range(0, shape[-1], PIECE):
            part = slice(start, min(start + PIECE, shape[-1]))
            found.append(((row, part) if len(shape) == 2 else (part,), one))
    return found


def compare(whole: Tensor, of_piece, grid: tuple) -> None:
    """Each piece of the result is what of_piece makes of it; -0 is 0."""
    for piece, one in pieces(whole.shape, grid):
        assert bool((whole[piece] == of_piece(piece, one)).all()), f"{piece} differs"


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_tracking_of_more_than_2_31_weights(backend: str) -> None:
    """Codes at the far end, and the number of transitions of all."""
    if REHEARSAL and backend == "triton":
        pytest.skip("too large for an interpreter")
    with memory(17), running(backend), torch.no_grad():
        check_tracking_beyond()


def check_tracking_beyond() -> None:
    """Two steps between which many codes change."""
    oscillation, scale = fastqat.Oscillation(0.1), torch.tensor([0.5])
    q = fastqat.FakeQuant(3, range="fixed", scale=scale, oscillation=oscillation, device=DEVICE)
    x = torch.empty(BEYOND, dtype=torch.bfloat16, device=DEVICE).normal_()
    q(x)
    before = [codes_of(q, part) for part in x.split(PIECE)]
    x.add_(0.3)
    q.step += 1
    compare(q(x), lambda piece, _: torch.ops.fastqat.fake_quantize(x[piece], *plain(q), None), plain(q))
    after = [codes_of(q, part) for part in x.split(PIECE)]
    changes = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    assert q.tracker.counts.tolist()[0] == changes > 0
    end = slice(-1000, None)
    assert torch.equal(words.unpacked(q.tracker.words[end]).index.int() + q.codes[0], codes_of(q, x[end]).int())


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_dorefa_of_more_than_2_31_weights(backend: str) -> None:
    """Values and gradients of pieces, sums of codes of all; the largest weight, at the far end, has the sum of all."""
    if REHEARSAL and backend == "triton":
        pytest.skip("too large for an interpreter")
    with memory(8), running(backend):
        check_dorefa_beyond()


def check_dorefa_beyond() -> None:
    """Forward and backward pass against those of the pieces, which are given the extremes of the whole."""
    x, g = (torch.empty(BEYOND, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    x.mul_(0.1)[-5] = 2.0
    high, none, ops = torch.tensor([2.0], device=DEVICE), torch.empty(0, device=DEVICE), torch.ops.fastqat
    qmax = torch.tensor([7, 3], dtype=torch.int32, device=DEVICE)
    sums, y = torch.empty((2, 2), dtype=torch.int64, device=DEVICE), torch.empty_like(x)
    ops.dorefa_fake_quantize(x, -high, high, qmax, sums, y, none)
    total, share, bound = torch.zeros_like(sums), 0.0, 0.0
    for part, of_whole in zip(x.split(PIECE), y.split(PIECE), strict=True):
        alone = torch.empty_like(part)
        ops.dorefa_fake_quantize(part, -high, high, qmax, sums_of_part := torch.empty_like(sums), alone, none)
        total += sums_of_part
        assert torch.equal(of_whole, alone)
    assert torch.equal(sums[0], total[0])
    dx = y
    ops.dorefa_fake_quantize_backward(g, x, -high, high, none, dx)
    largest = math.tanh(2.0)
    for part, incoming, of_whole in zip(x.split(PIECE), g.split(PIECE), dx.split(PIECE), strict=True):
        alone = torch.empty_like(part)
        ops.dorefa_fake_quantize_backward(incoming, part, -high, high, none, alone)
        assert int((of_whole != alone).sum()) <= int((part == 2).sum())
        terms = incoming.double() * part.double().tanh() / largest
        share, bound = share + float(terms.sum()), bound + float(terms.abs().sum())
    slope = (1 - largest**2) / largest
    want, error = slope * (float(g[-5]) - share), slope * 1e-6 * bound
    assert abs(float(dx[-5]) - want) <= error + abs(want) * 2**-7


def plain(q: fastqat.FakeQuant) -> tuple:
    """The grid of a quantizer per tensor."""
    return grid_of(q.scale.detach(), q.qrange, None)


def codes_of(q: fastqat.FakeQuant, x: Tensor) -> Tensor:
    """Codes of some weights without tracking: int8."""
    return torch.ops.fastqat.quantize(x, *plain(q), torch.int8)
