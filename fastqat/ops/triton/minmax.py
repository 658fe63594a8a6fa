"""minmax: smallest and largest finite value per channel, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastqat.ops.triton import layout, reduce
from fastqat.ops.triton.launch import launch


@triton.jit
def minmax_kernel(x_ptr, partial_ptr, shape, partials, TILE: tl.constexpr):
    """x: [shape.rows, shape.length] in memory order; partial: float32 [2, *partials], minima of x and of -x."""
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    low = tl.full((TILE.rows, TILE.cols), float("inf"), tl.float32)
    negated_high = tl.full((TILE.rows, TILE.cols), float("inf"), tl.float32)
    for _ in range(reduce.steps(row, col, shape, TILE)):
        mask = layout.tile_mask(rows, cols, shape, TILE)
        x = layout.load_float(x_ptr + rows * shape.length + cols, mask)
        finite = mask & (tl.abs(x) < float("inf"))  # false for NaN
        low = tl.minimum(low, tl.where(finite, x, float("inf")))
        negated_high = tl.minimum(negated_high, tl.where(finite, -x, float("inf")))
        if TILE.by_rows:
            cols += TILE.cols
        else:
            rows += TILE.rows
    AXIS: tl.constexpr = 1 if TILE.by_rows else 0
    plane = partials.outer * partials.channels * partials.inner
    reduce.store_partial(partial_ptr, tl.min(low, AXIS), row, col, shape, TILE)
    reduce.store_partial(partial_ptr + plane, tl.min(negated_high, AXIS), row, col, shape, TILE)


@triton.jit
def smallest(pointer, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Minimum of the partial results of this program's channels: float32 [CHANNELS]."""
    least = tl.full((DEPTH, CHANNELS), float("inf"), tl.float32)
    for start in range(0, partials.outer * partials.inner, DEPTH):
        pointers, exists = reduce.partial_pointers(pointer, start, partials, CHANNELS, DEPTH)
        least = tl.minimum(least, tl.load(pointers, mask=exists, other=float("inf")))
    return tl.min(least, 0)


@triton.jit
def extremes_kernel(partial_ptr, low_ptr, high_ptr, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Second stage. partial: float32 [2, *partials]; low, high: [channels]."""
    index = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = index < partials.channels
    plane = partials.outer * partials.channels * partials.inner
    tl.store(low_ptr + index, smallest(partial_ptr, partials, CHANNELS, DEPTH), mask=exists)
    tl.store(high_ptr + index, -smallest(partial_ptr + plane, partials, CHANNELS, DEPTH), mask=exists)


def minmax(x, axis, low, high):
    """Extremes over the finite values. x: any shape and strides; low, high: float32 [channels]."""
    if x.numel() == 0:
        low.fill_(torch.inf)
        high.fill_(-torch.inf)
        return
    x = layout.dense(x)
    shape, tile, programs = layout.matrix_of(x, axis, layout.WIDTH, reduces=True)
    partials = reduce.partials_of(shape, tile)
    partial = x.new_empty((2, *partials), dtype=torch.float32)
    launch(minmax_kernel, programs, x, partial, shape, partials, TILE=tile)
    programs, channels, depth = reduce.second_stage(partials)
    flat = partial.new_empty(partials.channels)
    with layout.writing(low, flat) as low, layout.writing(high, flat) as high:
        launch(extremes_kernel, programs, partial, low, high, partials, CHANNELS=channels, DEPTH=depth)
