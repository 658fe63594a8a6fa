"""What holds for every quantizer, on inputs that hypothesis chooses, on the backends fast enough to try many."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
on_backends = pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
ops = torch.ops.fastqat


class Grid(NamedTuple):
    """The arguments of a grid in the order of the schemas."""

    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    qrange: Tensor
    axis: int | None
    eps: float

    @property
    def low(self) -> int:
        return int(self.qrange[0])

    @property
    def high(self) -> int:
        return int(self.qrange[1])

    @property
    def codes(self) -> torch.dtype:
        """The 8-bit type that holds the codes."""
        return torch.int8 if self.low < 0 else torch.uint8


def float32(low: float, high: float) -> st.SearchStrategy[float]:
    """float32 numbers between two bounds."""
    return st.floats(np.float32(low).item(), np.float32(high).item(), width=32)


@st.composite
def grids(draw: st.DrawFn, offset: bool | None = False, channels: int = 1) -> Grid:
    """A grid of 1 to 8 bits; offset: True for the offset grid, None for either."""
    bits = draw(st.integers(1, 8))
    signed, restricted = draw(st.booleans()), bits > 1 and draw(st.booleans())
    low = -(2 ** (bits - 1)) + restricted if signed else 0
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    each = st.lists(float32(2.0**-30, 2.0**20), min_size=channels, max_size=channels)
    shifts = st.lists(float32(low - 2, high + 2), min_size=channels, max_size=channels)
    scale, shift = torch.tensor(draw(each)), torch.tensor(draw(shifts))
    qrange = torch.tensor([low, high], dtype=torch.int32)
    axis = None if channels == 1 else 0
    if offset if offset is not None else draw(st.booleans()):
        return Grid(scale, None, shift * scale, qrange, axis, 0.0)
    return Grid(scale, draw(st.sampled_from((None, shift))), None, qrange, axis, 0.0)


def values(draw: st.DrawFn, grid: Grid, count: int) -> Tensor:
    """Numbers around the grid in units of the scale: anywhere, on the lattice and on midpoints."""
    unit = st.one_of(float32(grid.low - 300, grid.high + 300), st.integers(-600, 600).map(lambda k: k / 2))
    r = torch.tensor(draw(st.lists(unit, min_size=count, max_size=count)))
    return r * grid.scale[0]


@st.composite
def quantizers(draw: st.DrawFn, offset: bool | None = False) -> tuple[Tensor, Grid]:
    """Input and per-tensor grid."""
    grid = draw(grids(offset))
    return values(draw, grid, draw(st.integers(0, 70))), grid


def zero_of(grid: Grid) -> float:
    """The integer zero point."""
    return 0.0 if grid.zero_point is None else min(max(round(grid.zero_point.item()), grid.low), grid.high)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal by value, shape and dtype."""
    return a.dtype == b.dtype and torch.equal(a, b)


@on_backends
@given(quantizers())
def test_idempotent(backend: str, quantizer: tuple[Tensor, Grid]) -> None:
    """Quantizing twice is quantizing once (on the zero-point grid; the offset grid rounds twice)."""
    x, grid = quantizer
    y = ops.fake_quantize(x, *grid, None)
    assert same(ops.fake_quantize(y, *grid, None), y)


@on_backends
@given(quantizers(offset=None))
def test_error_is_at_most_half_a_step_inside(backend: str, quantizer: tuple[Tensor, Grid]) -> None:
    """|y - x| <= s / 2 where the mask passes, up to the roundings of float32."""
    x, grid = quantizer
    y = ops.fake_quantize(x, *grid, None)
    inside = ops.fake_quantize_backward_input(torch.ones_like(x), x, *grid, True).bool()
    error, s = (y.double() - x.double()).abs(), grid.scale.double()
    slack = 2.0**-22 * (x.double().abs() + y.double().abs() + (0 if grid.offset is None else grid.offset.abs()))
    assert (error <= s / 2 + slack)[inside].all()
    ends = torch.tensor([float(grid.low), float(grid.high)], dtype=torch.float64)
    ends = (ends - zero_of(grid)) * s + (0 if grid.offset is None else grid.offset)
    far = ((y.double().view(-1, 1) - ends).abs() <= slack.view(-1, 1)).any(1)
    assert far[~inside].all()


@on_backends
@given(quantizers(offset=None))
def test_monotone(backend: str, quantizer: tuple[Tensor, Grid]) -> None:
    """A larger x has no smaller y and no smaller code."""
    x, grid = quantizer
    x = x.sort().values
    assert (ops.fake_quantize(x, *grid, None).diff() >= 0).all()
    assert (ops.quantize(x, *grid, torch.int32).diff() >= 0).all()


@on_backends
@given(grids())
def test_zero_is_represented(backend: str, grid: Grid) -> None:
    """0 -> 0 on the zero-point grid; its code is the zero point."""
    x = torch.tensor([0.0, -0.0])
    assert ops.fake_quantize(x, *grid, None).tolist() == [0.0, 0.0]
    assert ops.quantize(x, *grid, torch.int32).tolist() == [int(zero_of(grid))] * 2


@on_backends
@given(quantizers(offset=None))
def test_codes_are_in_range_and_give_the_values(backend: str, quantizer: tuple[Tensor, Grid]) -> None:
    """quantize, then dequantize is fake_quantize; the codes lie in [qmin, qmax]; codes of the values are the codes."""
    x, grid = quantizer
    codes, y = ops.quantize(x, *grid, grid.codes), ops.fake_quantize(x, *grid, None)
    assert ((codes >= grid.low) & (codes <= grid.high)).all()
    assert same(ops.dequantize(codes, *grid, torch.float32), y)
    if grid.offset is None:
        assert same(ops.quantize(y, *grid, grid.codes), codes)


@on_backends
@given(st.integers(1, 8), st.booleans(), st.data())
def test_pack_and_unpack_are_inverse(backend: str, bits: int, signed: bool, data: st.DataObject) -> None:
    """Every width and length; the unused bits of the last byte are 0."""
    low = -(2 ** (bits - 1)) if signed else 0
    dtype = torch.int8 if signed else torch.uint8
    codes = torch.tensor(data.draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=60)), dtype=dtype)
    packed = ops.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(codes.numel() * bits / 8)
    assert same(ops.unpack(packed, bits, codes.numel(), signed), codes)
    used = codes.numel() * bits % 8
    assert not used or int(packed[-1]) < 2**used


@on_backends
@given(st.data())
def test_a_channel_is_a_tensor_of_its_own(backend: str, data: st.DataObject) -> None:
    """Per channel = per tensor on each slice: values, codes, dx and the extremes exactly, the sums to rounding."""
    channels, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    grid = data.draw(grids(offset=None, channels=channels))._replace(axis=0)
    x = torch.stack([values(data.draw, grid, width) for _ in range(channels)])
    axis = data.draw(st.integers(0, 1))
    wide = grid._replace(axis=axis)
    turned = x if axis == 0 else x.t().contiguous()
    g = torch.linspace(-1, 1, channels * width).view(channels, width)
    g_turned = g if axis == 0 else g.t().contiguous()
    y, codes = ops.fake_quantize(turned, *wide, None), ops.quantize(turned, *wide, torch.int32)
    dx, ds, dshift = ops.fake_quantize_backward(g_turned, turned, *wide, True, True, 0.0)
    low, high = ops.minmax(turned, axis)
    for c in range(channels):
        one = Grid(*(t[c : c + 1] if isinstance(t, Tensor) else t for t in grid[:3]), grid.qrange, None, 0.0)
        assert same(y.select(axis, c), ops.fake_quantize(x[c], *one, None))
        assert same(codes.select(axis, c), ops.quantize(x[c], *one, torch.int32))
        want = ops.fake_quantize_backward(g[c], x[c], *one, True, True, 0.0)
        assert same(dx.select(axis, c), want[0])
        for got, alone in zip((ds, dshift), want[1:], strict=True):
            bound = 4e-6 * g[c].abs().sum() * 300 * max(1.0, one.scale.item())
            assert not alone.numel() or (got[c] - alone[0]).abs() <= bound
        assert [low[c], high[c]] == list(torch.cat(ops.minmax(x[c], None)))


@on_backends
@given(quantizers(offset=None), st.booleans())
def test_dx_is_linear_in_g(backend: str, quantizer: tuple[Tensor, Grid], rounded: bool) -> None:
    """dx(a g + b h) = a dx(g) + b dx(h) exactly for numbers without rounding; both ops give one dx."""
    x, grid = quantizer
    g, h = (torch.arange(x.numel()).float() % 17 - 8, torch.arange(x.numel()).float() % 5)

    def dx(v: Tensor) -> Tensor:
        return ops.fake_quantize_backward_input(v, x, *grid, rounded)

    assert same(dx(2 * g - 3 * h), 2 * dx(g) - 3 * dx(h))
    assert same(ops.fake_quantize_backward(g, x, *grid, rounded, False, 0.0)[0], dx(g))


@on_backends
@settings(max_examples=30)
@given(st.data(), st.permutations(range(4)))
def test_outer_dimensions_commute(backend: str, data: st.DataObject, order: list[int]) -> None:
    """Permuting dimensions, and the axis with them, permutes the result."""
    sizes = [data.draw(st.integers(1, 5)) for _ in range(4)]
    axis = data.draw(st.integers(0, 3))
    grid = data.draw(grids(offset=None, channels=sizes[axis]))._replace(axis=axis)
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(1)) * grid.scale.max() * (grid.high - grid.low)
    moved = grid._replace(axis=order.index(axis))
    for contiguous in (False, True):
        turned = x.permute(order).contiguous() if contiguous else x.permute(order)
        assert same(ops.fake_quantize(turned, *moved, None), ops.fake_quantize(x, *grid, None).permute(order))
        assert same(ops.quantize(turned, *moved, torch.int32), ops.quantize(x, *grid, torch.int32).permute(order))
        pair = zip(ops.minmax(turned, moved.axis), ops.minmax(x, axis), strict=True)
        assert all(same(a, b) for a, b in pair)


@on_backends
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**31), st.integers(0, 300))
def test_uniform_numbers_depend_on_their_position_alone(
    backend: str, seed: int, step: int, tensor_id: int, numel: int
) -> None:
    """In [0, 1), multiples of 2^-24; a longer tensor begins with the shorter one."""
    u = ops.philox_uniform(torch.tensor([step]), seed, tensor_id, numel)
    assert ((u >= 0) & (u < 1)).all() and torch.equal(u * 2**24, (u * 2**24).round())
    assert torch.equal(ops.philox_uniform(torch.tensor([step]), seed, tensor_id, numel + 5)[:numel], u)
