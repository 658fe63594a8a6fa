"""Reductions per channel in two stages whose order depends on the size of the tensor alone.

Stage 1: each program reduces its tiles to one partial result per row (by rows) or per column (by columns), stored as
``[outer, channels, inner]``. Stage 2 reduces over outer and inner. No atomics: the same bits on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastqat.ops.triton.launch import cdiv, power_of_two
from fastqat.ops.triton.layout import Shape, Tile

ELEMENTS = 2048  # partial results that a program of stage 2 handles at a time


class Partials(NamedTuple):
    """Shape of one quantity's partial results."""

    outer: int
    channels: int
    inner: int


def partials_of(shape: Shape, tile: Tile) -> Partials:
    """Shape of the partial results of stage 1."""
    if tile.by_rows:
        return Partials(shape.rows // shape.channels, shape.channels, cdiv(shape.length, tile.cols * shape.count))
    return Partials(cdiv(shape.rows, tile.rows * shape.count), shape.channels, shape.inner)


def second_stage(partials: Partials) -> tuple[int, int, int]:
    """Programs of stage 2, and its block: channels per program, partial results of a channel at a time."""
    depth = min(power_of_two(partials.outer * partials.inner), ELEMENTS if partials.channels == 1 else ELEMENTS // 8)
    channels = min(power_of_two(partials.channels), ELEMENTS // depth)
    return cdiv(partials.channels, channels), channels, depth


@triton.jit
def steps(row, col, shape, TILE: tl.constexpr):
    """Tiles of this program that exist; the first one begins at (row, col)."""
    rest = tl.cdiv(shape.length - col, TILE.cols) if TILE.by_rows else tl.cdiv(shape.rows - row, TILE.rows)
    return tl.minimum(rest, shape.count)


@triton.jit
def fold(terms, TILE: tl.constexpr):
    """Terms as float64; by rows four of them added in float32 first, which a thread does in its own registers.

    terms: float32 [rows, cols]; result: float64 [rows, cols / 4] by rows, [rows, cols] by columns.
    """
    if TILE.by_rows:
        return tl.sum(tl.reshape(terms, (TILE.rows, TILE.cols // 4, 4)), 2).to(tl.float64)
    else:
        return terms.to(tl.float64)


@triton.jit
def no_sums(TILE: tl.constexpr):
    """Zeros of the shape of fold()."""
    if TILE.by_rows:
        return tl.zeros((TILE.rows, TILE.cols // 4), tl.float64)
    else:
        return tl.zeros((TILE.rows, TILE.cols), tl.float64)


@triton.jit
def store_partial(pointer, result, row, col, shape, TILE: tl.constexpr):
    """Store a program's result of one quantity. result: [rows] or (by columns) [cols]; (row, col): where it begins."""
    if TILE.by_rows:
        span = TILE.cols * shape.count
        r = row + tl.arange(0, TILE.rows)
        tl.store(pointer + r * tl.cdiv(shape.length, span) + col // span, result, mask=r < shape.rows)
    else:
        c = col + tl.arange(0, TILE.cols)
        tl.store(pointer + row // (TILE.rows * shape.count) * shape.length + c, result, mask=c < shape.length)


@triton.jit
def partial_pointers(pointer, start, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Pointers to partial results start, start + 1, .. of a program's channels, and which exist: [DEPTH, CHANNELS]."""
    i = start + tl.arange(0, DEPTH).to(tl.int64)[:, None]
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    at = (i // partials.inner * partials.channels + c) * partials.inner + i % partials.inner
    return pointer + at, (i < partials.outer * partials.inner) & (c < partials.channels)


@triton.jit
def total(pointer, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Sums over the partial results of this program's channels: float64 [CHANNELS]."""
    sums = tl.zeros((DEPTH, CHANNELS), tl.float64)
    for start in range(0, partials.outer * partials.inner, DEPTH):
        pointers, exists = partial_pointers(pointer, start, partials, CHANNELS, DEPTH)
        sums += tl.load(pointers, mask=exists, other=0.0).to(tl.float64)
    return tl.sum(sums, 0)
