"""Cases shared by tests and benchmarks: shapes, memory layouts, grids, scales, inputs, and the arguments of every op.

Everything is deterministic: a case is found again by its label.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LAYER = (512, 4608)  # a 3x3 convolution with 512 channels: the layer that design.md measures
LONG = (3_000_017,)  # per tensor, not a multiple of anything
STREAM = (64 * 2**20,)  # larger than every cache

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 255, 257, 511, 513, 1023, 1025, 4097, 20_011)
SHAPES = (
    *((n,) for n in SIZES),
    *((3, 1), (1, 3), (3, 17), (17, 3), (2, 1025), (1025, 2), (5, 4097), (33, 31)),
    *((2, 5, 33), (7, 3, 1), (2, 3, 5, 7), (8, 4, 3, 3), (1, 1, 1, 1), (3, 16, 9, 11)),
    *((0,), (0, 3), (3, 0), (2, 0, 5), (2, 3, 0, 1), ()),
)
FEW_SHAPES = ((1025,), (5, 257), (3, 0))  # for a slow backend with every dtype ...
TURN_SHAPES = ((1,), (17,), (4097,), (2, 5, 33), (8, 4, 3, 3), (0,), (0, 3), (), (3, 17))  # ... and with one of them
LAYOUTS = ("contiguous", "transposed", "step", "shifted", "channels_last", "expanded")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULARITIES = ("tensor", "channel_first", "channel_middle", "channel_last")


@dataclass(frozen=True)
class Grid:
    """Code range and kind of a grid; zeros: zero points handed out in turn; offset: an offset grid."""

    name: str
    qmin: int
    qmax: int
    zeros: tuple[float, ...] | None = None
    offset: bool = False


def grids_of(bits: int) -> list[Grid]:
    """All kinds of grid with a number of bits."""
    full, half = 2**bits, 2 ** (bits - 1)
    kinds = [
        Grid(f"signed{bits}", -half, half - 1),
        Grid(f"affine{bits}", 0, full - 1, (half, 0.0, full - 1.0, 1.0)),
        Grid(f"offset{bits}", 0, full - 1, offset=True),
        Grid(f"fractional{bits}", 0, full - 1, (half - 0.5, 0.5, 1.5, half + 0.3)),
        Grid(f"outside{bits}", -half, half - 1, (half + 7.0, -half - 3.2, 1e9, -0.5)),
        Grid(f"signed_offset{bits}", -half, half - 1, offset=True),
    ]
    return kinds if bits == 1 else [*kinds, Grid(f"restricted{bits}", 1 - half, half - 1)]


# every bit-width; all kinds where they differ most, two kinds (in turn) for the others
GRIDS = tuple(g for b in range(1, 9) for g in (grids_of(b) if b in (1, 2, 4, 8) else grids_of(b)[b % 3 :: 3]))
FEW_NAMES = ("signed1", "affine4", "offset4", "fractional8", "outside2", "restricted4")
FEW_GRIDS = tuple(g for g in GRIDS if g.name in FEW_NAMES)

# eps = 0: both ends of [2^-40, 2^40] and one ulp beyond, tiny, subnormal, huge, NaN, ordinary
ENDS = (2.0**-40, 2.0**-40 * (1 - 2.0**-24), 2.0**40, 2.0**40 * (1 + 2.0**-23))
FREE_SCALES = (0.0371, *ENDS, 0.25, 1.7, 1e-30, 1e-38, 1e30, float("nan"), 0.1, 3.3e-3)
# eps > 0: above, equal, below, zero, negative, subnormal, NaN
CLAMPED_SCALES = (0.05, 1e-3, 9.9e-4, 0.0, -0.5, 1e-39, float("nan"), 0.77)
# all ordinary, without special inputs: what a kernel may treat as its fast case
CALM_SCALES = (0.0371, 0.25, 1.7, 3.3e-3, 11.1)
SCALE_SETS = ((FREE_SCALES, 0.0), (CLAMPED_SCALES, 1e-3), (CALM_SCALES, 1e-6))
CALM = 2
CLIPS = (0.0, 0.0, float("inf"), 0.8)  # none, a ReLU, and one that cuts off what other grids hold


class GridCase(NamedTuple):
    """A tensor and the arguments of its grid, in the order of the schemas."""

    label: str
    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    qrange: Tensor
    axis: int | None
    eps: float

    @property
    def grid(self) -> tuple:
        """scale, zero_point, offset, qrange, axis, eps."""
        return self[2:]


def device_of(backend: str) -> str:
    """Where a backend runs here: Triton on the CPU too, where it interprets its kernels."""
    compiles = os.environ.get("TRITON_INTERPRET") == "0"
    return "cuda" if backend == "cuda" or (backend == "triton" and compiles) else "cpu"


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shift_ulps(x: Tensor, ulps: int) -> Tensor:
    """The floating-point neighbours `ulps` steps above (or below) the finite values of x."""
    integer = {4: torch.int32, 2: torch.int16}[x.element_size()]
    if x.numel() == 0:
        return x
    low = torch.iinfo(integer).min
    bits = x.clone().view(integer).long()
    order = torch.where(bits < 0, low - bits, bits) + ulps
    moved = torch.where(order < 0, low - order, order).to(integer).view(x.dtype)
    return torch.where(x.isfinite() & moved.isfinite(), moved, x)


def specials(dtype: torch.dtype) -> Tensor:
    """Values that every kernel meets sooner or later."""
    info, nan, inf = torch.finfo(dtype), float("nan"), float("inf")
    tiny = (info.smallest_normal, -info.smallest_normal, info.smallest_normal / 2, 6e-8, 1e-40, -1e-45)
    return torch.tensor((inf, -inf, nan, 0.0, -0.0, info.max, info.min, *tiny, 1.0, -1.0), dtype=dtype)


def critical(scale: Tensor, zero: Tensor, offset: Tensor, grid: Grid, dtype: torch.dtype, seed: int) -> Tensor:
    """Lattice points, midpoints and clip edges +-2 ulp, special and random values for each scale.

    scale, zero, offset: float32 [C], the scale after eps; result: [C, M], M even.
    """
    steps = (
        torch.arange(2 * (grid.qmin - 3), 2 * (grid.qmax + 3) + 1).float() / 2
    )  # lattice and midpoints, beyond both ends
    s, o = torch.nan_to_num(scale, nan=0.3).view(-1, 1), offset.view(-1, 1)
    exact = ((steps - zero.view(-1, 1)) * s + o).to(dtype)
    near = [shift_ulps(exact, k) for k in (-2, -1, 1, 2)]
    spread = random((len(scale), 200), seed) * s * ((grid.qmax - grid.qmin) / 3 + 0.5) + o
    constant = specials(dtype).expand(len(scale), -1)
    values = torch.cat([exact, *near, spread.to(dtype), constant], 1)
    values = values[:, torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed))]
    return torch.cat([values, values[:, : values.shape[1] % 2]], 1)


def grid_tensors(grid: Grid, scales: tuple[float, ...], eps: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """scale, zero_point and offset for a tuple of scales."""
    scale, n = torch.tensor(scales), len(scales)
    usable = torch.nan_to_num(scale.clamp(min=eps), nan=0.3)
    zero = (
        None
        if grid.zeros is None
        else torch.tensor([float(z) for z in itertools.islice(itertools.cycle(grid.zeros), n)])
    )
    offset = torch.tensor(list(itertools.islice(itertools.cycle((-0.2, 0.37, 3.0, 0.0, -17.1)), n))) * usable
    return scale, zero, offset if grid.offset else None


@functools.cache
def critical_block(grid: Grid, which: int, dtype: torch.dtype) -> tuple:
    """Critical inputs [C, M] for one set of scales, with scale, zero_point, offset and eps."""
    scales, eps = SCALE_SETS[which]
    scale, zero, offset = grid_tensors(grid, scales, eps)
    none = torch.zeros_like(scale)
    z = none if zero is None else zero.round().clamp(grid.qmin, grid.qmax)
    x = critical(scale.clamp(min=eps), z, none if offset is None else offset, grid, dtype, 7 + which)
    if which == CALM:
        x = torch.where(x.isfinite() & (x.abs() < 1e4) & ((x == 0) | (x.abs() > 1e-4)), x, 0)
    return x, scale, zero, offset, eps


def arrange(x: Tensor, granularity: str) -> tuple[Tensor, int]:
    """Give rows [C, M] the shape in which C is the first, middle (small inner) or last (inner == 1) axis."""
    if granularity == "channel_first":
        return x, 0
    if granularity == "channel_middle":
        return x.view(x.shape[0], 2, -1).permute(2, 0, 1).contiguous(), 1
    return x.t().contiguous(), 1


def grid_cases(dtype: torch.dtype, granularity: str, few: bool = False) -> Iterator[GridCase]:
    """Critical inputs on every grid and every scale; few: every second one of a short list, in turn."""
    turn = DTYPES.index(dtype) + GRANULARITIES.index(granularity)
    for index, grid in enumerate(FEW_GRIDS if few else GRIDS):
        qrange = torch.tensor([grid.qmin, grid.qmax], dtype=torch.int32)
        for which in [(index + turn) % 3] if few else range(3):
            x, scale, zero, offset, eps = critical_block(grid, which, dtype)
            label = f"{grid.name}, scale set {which}"
            if granularity != "tensor":
                arranged, axis = arrange(x, granularity)
                yield GridCase(label, arranged, scale, zero, offset, qrange, axis, eps)
                continue
            for c in {(2 * index + which) % len(scale), (5 * index + which + 3) % len(scale)}:
                one = [None if t is None else t[c : c + 1] for t in (scale, zero, offset)]
                yield GridCase(f"{label}, scale {c}", x[c], *one, qrange, None, eps)


def with_layout(x: Tensor, layout: str) -> Tensor | None:
    """x in another memory layout (equal values, but for "expanded"); None where x has no such layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order) if x.dim() > 1 else None
    if layout == "step":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 77) if x.dim() else None
        return None if wide is None else wide[..., 1::2].copy_(x)
    if layout == "shifted":  # starts one element behind an aligned address
        return x.new_full((x.numel() + 1,), 77)[1:].view(x.shape).copy_(x)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else None
    return x[..., :1].expand(x.shape) if x.dim() and x.shape[-1] > 1 else None


SHAPED_GRIDS = tuple(g for g in GRIDS if g.name in ("signed4", "affine4", "offset8", "fractional2"))


def shaped_cases(dtype: torch.dtype, granularity: str, few: bool = False) -> Iterator[GridCase]:
    """Every shape in every layout, per tensor ("tensor") or on every axis ("channel"); grids in turn."""
    grids, shapes = itertools.cycle(SHAPED_GRIDS), SHAPES
    if few:
        shapes = FEW_SHAPES + TURN_SHAPES[DTYPES.index(dtype) :: 3]
    for number, shape in enumerate(shapes):
        for axis in [None] if granularity == "tensor" else range(len(shape)):
            grid = next(grids)
            channels = 1 if axis is None else shape[axis]
            scale = random((channels,), number).abs() * 0.2 + 0.02
            _, zero, offset = grid_tensors(grid, tuple(scale.tolist()), 0.0)
            values = (random(shape, number + 100) * 0.2 * (grid.qmax - grid.qmin)).to(dtype)
            qrange = torch.tensor([grid.qmin, grid.qmax], dtype=torch.int32)
            for layout in LAYOUTS[:: 2 if few and number % 2 else 1]:
                if (x := with_layout(values, layout)) is not None:
                    label = f"shape {shape} axis {axis} {layout} {grid.name}"
                    yield GridCase(label, x, scale, zero, offset, qrange, axis, 1e-6)


class Call(NamedTuple):
    """One call of an op."""

    label: str
    arguments: tuple


G_LAYOUTS = ("contiguous", "transposed", "shifted", "channels_last", "step")


def incoming(case: GridCase, number: int) -> Tensor:
    """A gradient for x in a dtype and a layout of its own; every sixth is one value expanded to all elements."""
    shape, dtype = case.x.shape, (case.x.dtype, torch.bfloat16, torch.float32)[number % 3]
    if number % 6 == 4:
        return torch.tensor(0.625, dtype=dtype).expand(shape)
    g = random(shape, number + 31).to(dtype)
    laid_out = with_layout(g, G_LAYOUTS[number % 5])
    return g if laid_out is None else laid_out


def code_dtype(case: GridCase, number: int) -> torch.dtype:
    """int32, or the 8-bit type that holds the code range."""
    return torch.int32 if number % 3 == 2 else torch.int8 if case.qrange[0] < 0 else torch.uint8


def codes_for(case: GridCase, number: int) -> Tensor:
    """Codes all over their 8-bit type, also outside the range of the grid, shaped and laid out like x."""
    dtype = code_dtype(case, number)
    low = -128 if dtype != torch.uint8 else 0
    generator = torch.Generator().manual_seed(number)
    values = torch.randint(low, low + 256, case.x.shape, generator=generator).to(dtype)
    return torch.empty_like(case.x, dtype=dtype).copy_(values)


def candidates(case: GridCase, number: int) -> tuple[Tensor, Tensor | None]:
    """scales, zero_points [K, C] around the scale of a case; K varies, not always a multiple of anything."""
    factors = torch.tensor((1.0, 0.5, 0.31, 1.7, 2.0, 0.05, 4.1, 0.999, 1.001)[: (1, 4, 9, 6)[number % 4]]).view(-1, 1)
    zeros = None if case.zero_point is None else case.zero_point + torch.arange(len(factors)).view(-1, 1)
    return case.scale.clamp(min=case.eps) * factors, zeros


def grid_call(op: str, case: GridCase, number: int) -> Call:
    """The call of an op that takes a grid; its remaining arguments vary with the number of the case."""
    x, flag, lsq = case.x, number % 2 == 0, number % 4 > 1
    if op == "fake_quantize":
        return Call(case.label, (x, *case.grid, (None, *DTYPES)[number % 4]))
    if op == "fake_quantize_backward":
        return Call(case.label, (incoming(case, number), x, *case.grid, flag, lsq, CLIPS[number // 2 % 4]))
    if op == "fake_quantize_backward_input":
        return Call(case.label, (incoming(case, number), x, *case.grid, flag))
    if op == "quantize":
        return Call(case.label, (x, *case.grid, code_dtype(case, number)))
    if op == "dequantize":
        return Call(case.label, (codes_for(case, number), *case.grid, x.dtype))
    if op == "minmax":
        return Call(case.label, (x, case.axis))
    assert op == "range_search", f"no cases for op {op}"
    return Call(case.label, (x, *candidates(case, number), case.qrange, case.axis))


def plain_calls(op: str, few: bool = False) -> Iterator[Call]:
    """Calls of the ops without a grid: pack, unpack, philox_uniform."""
    lengths = [n for n in (0, *SIZES) if not few or n < 1000]
    for number, n in enumerate(lengths):
        generator = torch.Generator().manual_seed(n)
        if op == "philox_uniform":
            seed, step, tensor_id = ((0, 0, 0), (-1, 2**40 + 3, 2**31 + 5), (0x0123456789ABCDEF, 7, 1))[number % 3]
            yield Call(f"seed {seed} n {n}", (torch.tensor([step]), seed, tensor_id, n))
            continue
        for bits in range(1, 9):
            for signed in (False, True):
                label = f"{bits} bits {'signed' if signed else 'unsigned'} n {n}"
                if op == "unpack":
                    size = (n * bits + 7) // 8
                    packed = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
                    yield Call(label, (packed, bits, n, signed))
                else:
                    assert op == "pack", f"no cases for op {op}"
                    dtype = torch.int32 if bits % 3 == 0 else torch.int8 if signed else torch.uint8
                    codes = torch.randint(-128 if signed else 0, 128 if signed else 256, (n,), generator=generator)
                    yield Call(label, (codes.to(dtype), bits))


PLAIN_OPS = ("pack", "unpack", "philox_uniform")
