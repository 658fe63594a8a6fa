"""Tensors of any strides as tiles of a matrix in memory order, each element with its channel.

A dense tensor is ``[outer, channels, inner]`` around its channel dimension in memory, whatever the order of its
dimensions. A kernel sees it as a matrix and works on tiles of it:

    by rows      [outer * channels, inner]: channel = row % channels; per tensor: one row
    by columns   [outer, channels * inner]: channel = column // inner; for a short inner dimension
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqat.ops.triton import math
from fastqat.ops.triton.launch import INTERPRETED, cdiv, power_of_two

SHORTEST_ROW = 8  # an inner dimension shorter than this is handled by columns
WIDTH = 2048  # elements of a tile: 16 for each of 128 threads, 4 x 16 bytes of float32 and 2 x 16 of bfloat16


class Shape(NamedTuple):
    """A matrix over memory, as kernels get it."""

    rows: int
    length: int  # of a row
    channels: int
    inner: int
    count: int  # tiles of one program, along the row or (by columns) down the rows


class Tile(NamedTuple):
    """How kernels cut the matrix; a compile-time constant."""

    by_rows: bool
    rows: int
    cols: int


class Grid(NamedTuple):
    """A quantization grid as kernels get it."""

    scale: Tensor  # float32 [channels]
    zero_point: Tensor | None  # float32 [channels]
    offset: Tensor | None  # float32 [channels]
    qrange: Tensor  # int32 [2]
    eps: float


def grid_of(scale: Tensor, zero_point: Tensor | None, offset: Tensor | None, qrange: Tensor, eps: float) -> Grid:
    """Grid of contiguous tensors. scale, zero_point, offset: float32 [channels]; qrange: int32 [2]."""
    return Grid(*(None if t is None else t.contiguous() for t in (scale, zero_point, offset, qrange)), eps)


def memory_order(t: Tensor) -> list[int]:
    """Dimensions of size > 1, outermost in memory first."""
    return sorted((d for d in range(t.dim()) if t.shape[d] != 1), key=lambda d: -t.stride(d))


def is_dense(t: Tensor) -> bool:
    """True if the elements of t (any shape) fill memory without gaps and overlap, in any order of dimensions."""
    expected = 1
    for d in reversed(memory_order(t)):
        if t.stride(d) != expected:
            return False
        expected *= t.shape[d]
    return True


def dense(t: Tensor) -> Tensor:
    """t, or a dense copy of it where it has gaps or overlaps."""
    return t if t.is_contiguous() or is_dense(t) else torch.empty_like(t).copy_(t)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """True if equal indices are equal memory offsets in a and b, of one shape."""
    return all(n == 1 or p == q for n, p, q in zip(a.shape, a.stride(), b.stride(), strict=True))


def arranged_like(t: Tensor, x: Tensor) -> Tensor:
    """t, or a copy of it with the strides of the dense tensor x of the same shape."""
    return t if same_strides(t, x) else torch.empty_like(x, dtype=t.dtype).copy_(t)


@contextlib.contextmanager
def writing(result: Tensor, x: Tensor) -> Iterator[Tensor]:
    """A tensor with the strides of the dense tensor x that ends up in result (same shape): result itself if it fits."""
    if same_strides(result, x):
        yield result
    else:
        buffer = torch.empty_like(x, dtype=result.dtype)
        yield buffer
        result.copy_(buffer)


@contextlib.contextmanager
def updating(state: Tensor, x: Tensor) -> Iterator[Tensor]:
    """As :func:`writing`, for a tensor that is read first."""
    with writing(state, x) as own:
        if own is not state:
            own.copy_(state)
        yield own


def matrix_of(
    x: Tensor, axis: int | None, width: int, reduces: bool = False, widest: int = 256
) -> tuple[Shape, Tile, int]:
    """Shape, tile and number of programs for a dense tensor x.

    Args:
        x: any shape, dense.
        axis: its channel dimension, or None.
        width: elements that one program handles at a time, a power of two.
        reduces: whether programs reduce several tiles each. How many depends on the size of x alone.
        widest: columns of a tile by columns, at most; the others are rows, to add up.
    """
    outer, channels, inner = 1, 1, x.numel()
    if axis is not None:
        order = memory_order(x)
        channels, inner = x.shape[axis], 1
        for d in order[order.index(axis) + 1 :] if axis in order else order:
            inner *= x.shape[d]
        outer = x.numel() // (channels * inner)
    count = min(max(power_of_two(x.numel() // (width * 8192)), 4), 32) if reduces else 1
    if inner >= SHORTEST_ROW or outer == 1:
        rows, length = outer * channels, inner
        cols = width if rows == 1 else min(width, power_of_two(max(length, 4)))
        tile = Tile(True, width // cols, cols)
        programs = cdiv(rows, tile.rows) * cdiv(length, tile.cols * count)
    else:
        rows, length = outer, channels * inner
        cols = min(power_of_two(max(length, 4)), widest)
        tile = Tile(False, width // cols, cols)
        programs = cdiv(rows, tile.rows * count) * cdiv(length, tile.cols)
    return Shape(rows, length, channels, inner, count), tile, programs


@triton.jit
def first_element(shape, TILE: tl.constexpr):
    """Row and column, int64, where the tiles of this program begin."""
    if TILE.by_rows:
        span = TILE.cols * shape.count
        across = tl.cdiv(shape.length, span)
        row = (tl.program_id(0) // across).to(tl.int64) * TILE.rows
        col = (tl.program_id(0) % across).to(tl.int64) * span
    else:
        across = tl.cdiv(shape.length, TILE.cols)
        row = (tl.program_id(0) // across).to(tl.int64) * TILE.rows * shape.count
        col = (tl.program_id(0) % across).to(tl.int64) * TILE.cols
    return row, col


@triton.jit
def tile_rows(row, TILE: tl.constexpr):
    """Rows of the tile that begins at row: int64 [rows, 1]; the scalar itself where a tile is one row."""
    return row if TILE.rows == 1 else row + tl.arange(0, TILE.rows)[:, None]


@triton.jit
def tile_cols(col, TILE: tl.constexpr):
    """Columns of the tile that begins at col: int64 [1, cols]."""
    return col + tl.arange(0, TILE.cols)[None, :]


@triton.jit
def tile_mask(rows, cols, shape, TILE: tl.constexpr):
    """Elements of a tile that exist: [rows, cols]."""
    return cols < shape.length if TILE.rows == 1 else (rows < shape.rows) & (cols < shape.length)


@triton.jit
def channel_index(rows, cols, shape, TILE: tl.constexpr):
    """Channel of each row or column of a tile, and whether it exists: [rows, 1], [1, cols], or scalars."""
    if TILE.by_rows:
        return rows % shape.channels, rows < shape.rows
    else:
        return cols // shape.inner, cols < shape.length


@triton.jit
def load_channel(grid, index, mask):
    """Channels at index. index, mask: broadcast against the tile."""
    scale = tl.load(grid.scale + index, mask=mask, other=1.0)
    qmin = tl.load(grid.qrange).to(tl.float32)
    qmax = tl.load(grid.qrange + 1).to(tl.float32)
    zero_point = 0.0
    offset = 0.0
    if grid.zero_point is not None:
        zero_point = tl.load(grid.zero_point + index, mask=mask, other=0.0)
    if grid.offset is not None:
        offset = tl.load(grid.offset + index, mask=mask, other=0.0)
    # Without a zero point z is 0 even where qmin > 0 or qmax < 0, as on the offset grid.
    return math.make_channel(scale, grid.eps, zero_point, offset, grid.zero_point is None, qmin, qmax)


@triton.jit
def all_fast(ch, TILE: tl.constexpr):
    """True if every scale of a tile is a fast one: one branch for the tile, none for its elements."""
    fast = math.is_fast_scale(ch.scale)
    return fast if TILE.by_rows and TILE.rows == 1 else tl.min(fast.to(tl.int32)) == 1


@triton.jit
def load_float(pointers, mask):
    """Elements of any dtype as float32; 0 outside the mask."""
    v = tl.load(pointers, mask=mask, other=0)
    if INTERPRETED and v.dtype == tl.bfloat16:  # the interpreter's own conversion is wrong for subnormals
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return v.to(tl.float32)


@triton.jit
def store_float(pointers, v, mask):
    """Store float32 elements in the dtype of the pointers, rounded once, ties to even; integers as they are."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion truncates
        bits = v.to(tl.uint32, bitcast=True)
        rounded = tl.where(v == v, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    elif dtype.is_int():
        tl.store(pointers, v.to(tl.int32).to(dtype), mask=mask)
    else:
        tl.store(pointers, v.to(dtype), mask=mask)
