"""Calls of the ops on one tensor with one scale, and an oracle of them in numpy that calls no code of fastqat."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import cases
import numpy as np
import oracle
import torch
from cases import GridCase
from oracle import F32, F64, Within
from torch import Tensor

RESULTS = ("low", "high", "beyond", "inside", "above", "codes", "y")
CLIPS = (0.0, torch.inf, 0.8, 0.0, 6.0)
# tensor id (-1: none), seed and step of stochastic rounding
NOISES = ((-1, 0, 0), (3, 0x0123456789ABCDEF, 7), (-1, 0, 0), (2**31 + 5, -1, 2**40 + 3), (0, 0, 0))
EXTREMES = ((torch.inf, -torch.inf), (-0.25, 0.75), (-1e30, 1e30))  # what low and high held before


@dataclass(frozen=True)
class Case:
    """One call of fake_quantize_tensor: x and its grid, and what is wanted of it (None, 0, False: not asked for)."""

    grid: GridCase
    clip: float = 0.0
    rounded: bool = True
    noise: tuple[int, int, int] = NOISES[0]
    limit: float | None = None
    extremes: tuple[float, float] | None = None
    inside: bool = False
    above: bool = False
    code_bits: int = 0
    y: torch.dtype | None = None

    @property
    def label(self) -> str:
        """Enough to find the case again."""
        wanted = "".join(name[0] for name in ("inside", "above") if getattr(self, name))
        return (
            f"{self.grid.label}, {self.grid.x.dtype} -> {self.y}, clip {self.clip}, rounded {self.rounded}, "
            f"noise {self.noise}, limit {self.limit}, extremes {self.extremes}, bits {wanted}, codes {self.code_bits}"
        )


def varied(grid: GridCase, number: int) -> Case:
    """A call that asks for more or less, by the number of the case."""
    width = int(grid.qrange[1] - grid.qrange[0]).bit_length()
    values = grid.x.float().abs().flatten()
    values = values[values.isfinite()]
    middle = values.median().item() if values.numel() else 1.0
    return Case(
        grid,
        clip=CLIPS[number % 5],
        rounded=number % 2 == 0,
        noise=NOISES[number % 7 % 5],
        limit=(None, middle, 0.0, None, torch.inf, torch.nan)[number % 6],
        extremes=(None, *EXTREMES)[number % 4],
        inside=number % 7 != 3,
        above=number % 3 == 1,
        code_bits=(0, width, width, 8)[number % 11 % 4],
        y=(grid.x.dtype, None, *cases.DTYPES)[number % 13 % 5],
    )


def plain(grid: GridCase, number: int) -> Case:
    """What training asks for most: a range that is gathered on the way, and a bit for the gradient."""
    return Case(grid, extremes=EXTREMES[number % 3], inside=number % 2 == 0, y=grid.x.dtype)


def in_memory(x: Tensor) -> Tensor:
    """The elements of a tensor in the order of its dense copy's memory: [n]."""
    dense = torch.empty_like(x).copy_(x)
    return dense.as_strided((x.numel(),), (1,))


def from_memory(values: Tensor, like: Tensor) -> Tensor:
    """The inverse: a tensor with the shape and strides of empty_like."""
    return values.as_strided(like.shape, torch.empty_like(like).stride())


@functools.cache
def uniforms(noise: tuple[int, int, int], count: int) -> np.ndarray:
    """The first numbers of Philox."""
    tensor_id, seed, step = noise
    return oracle.philox_uniform(step, seed, tensor_id, count)[0].numpy()


def stream(codes: np.ndarray, bits: int) -> Tensor:
    """The low bits of integers, first one first, in bytes that are filled from the lowest bit."""
    each = (codes.astype(np.int64)[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(each.astype(np.uint8).reshape(-1), bitorder="little"))


def read_stream(packed: Tensor, bits: int, count: int, signed: bool) -> np.ndarray:
    """Its inverse."""
    each = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits).astype(np.int64)
    weights = 1 << np.arange(bits)
    return each @ np.where((np.arange(bits) == bits - 1) & signed, -weights, weights)


def fake_quantize_tensor(case: Case) -> tuple[Tensor, ...]:
    """RESULTS: the whole of each that is asked for, an empty tensor for the others."""
    _, x, scale, zero_point, offset, qrange, _, eps = case.grid
    with np.errstate(all="ignore"):
        wide = oracle.as_float32(in_memory(x))
        passes = (wide > 0) & (wide < F32(case.clip)) if case.clip else np.ones(wide.shape, bool)
        wide = np.clip(wide, F32(0), F32(case.clip)) if case.clip else wide
        law = oracle.Grid(torch.from_numpy(wide), scale, zero_point, offset, qrange, None, eps)
        r = law.ratio(torch.from_numpy(wide))
        drawn = np.floor(r + uniforms(case.noise, max(r.size, 8192))[: r.size]) if case.noise[0] >= 0 else np.rint(r)
        tested = (drawn if case.rounded else r).astype(F64)
        low, high = law.low - law.z, law.high - law.z
        code = np.clip(drawn.astype(F64), low, high) + law.z
        known = np.where(np.isnan(code), np.clip(law.z, law.low, law.high), code)
        finite = wide[np.isfinite(wide)]
        none, bits = torch.empty(0), torch.empty(0, dtype=torch.uint8)
        bounds = case.extremes or (0.0, 0.0)
        wants = (
            torch.tensor([min([bounds[0], *finite[finite < bounds[0]]])]) if case.extremes else none,
            torch.tensor([max([bounds[1], *finite[finite > bounds[1]]])]) if case.extremes else none,
            torch.empty(0, dtype=torch.int64) if case.limit is None else beyond_after(wide, case.limit),
            stream(passes & (tested >= low) & (tested <= high), 1) if case.inside else bits,
            stream(tested > high, 1) if case.above else bits,
            stream(known, case.code_bits) if case.code_bits else bits,
            torch.empty(0) if case.y is None else from_memory(oracle.rounded_to(law.value(code), case.y), x),
        )
    return tuple(w.float() if name in ("low", "high") else w for name, w in zip(RESULTS, wants, strict=True))


BEYOND_BEFORE = 2**40  # what the counter held


def beyond_after(wide: np.ndarray, limit: float) -> Tensor:
    """The counter, grown by the elements of a magnitude above the limit."""
    return torch.tensor([BEYOND_BEFORE + int((np.abs(wide) > F32(limit)).sum())])


def dequantize_tensor(packed: Tensor, grid: GridCase, code_bits: int, y: torch.dtype) -> Tensor:
    """Values of packed codes, with the shape and strides of empty_like(x)."""
    _, x, scale, zero_point, offset, qrange, _, eps = grid
    codes = read_stream(packed, code_bits, x.numel(), int(qrange[0]) < 0)
    law = oracle.Grid(torch.from_numpy(codes), scale, zero_point, offset, qrange, None, eps)
    with np.errstate(all="ignore"):
        return from_memory(oracle.rounded_to(law.value(codes.astype(F64)), y), x)


def fake_quantize_tensor_backward(
    g: Tensor, inside: Tensor, above: Tensor, qmax: int, dx: Tensor, learned: bool
) -> tuple[Tensor, Tensor | Within]:
    """dx like the given one; the gradient of the scale, or an empty tensor."""
    laid_out = torch.empty_like(dx, dtype=g.dtype).copy_(g)
    wide = oracle.as_float32(in_memory(laid_out))
    passed = np.where(read_stream(inside, 1, wide.size, False) != 0, wide, F32(0))
    values = from_memory(oracle.rounded_to(passed, dx.dtype), dx)
    if not learned:
        return values, torch.empty(0)
    terms = np.where(read_stream(above, 1, wide.size, False) != 0, wide.astype(F64), 0.0) * qmax
    with np.errstate(all="ignore"):
        return values, oracle.total(terms, None)


def all_cases(dtype: torch.dtype, few: bool) -> Iterator[Case]:
    """Critical inputs on every grid and every scale, then every shape in every layout; plain calls and varied ones."""
    grids = [*cases.grid_cases(dtype, "tensor", few), *cases.shaped_cases(dtype, "tensor", few)]
    for number, grid in enumerate(grids):
        small = replace_large(grid)
        yield varied(small, number)
        if number % 3 == 0 and not few:
            yield plain(small, number)
    if few:
        yield plain(grids[0], 0)


def replace_large(grid: GridCase) -> GridCase:
    """The case itself; of a long vector, its first elements: Philox in Python integers is slow."""
    long = grid.x.numel() > 8192
    return grid._replace(x=grid.x.flatten()[:8191]) if long else grid
