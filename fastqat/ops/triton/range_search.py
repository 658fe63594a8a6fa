"""range_search: squared errors of K candidate grids from one read of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastqat.ops.triton import layout, math, reduce
from fastqat.ops.triton.launch import launch

WIDTH = 4096  # elements that a program keeps in registers: enough to hide the K reductions across its threads
COLUMNS = 16  # of a tile by columns: tall tiles, since each of its columns stores K partial results


@triton.jit
def squared_error(x, ch):
    """(fake_quantize(x) - x)^2 for finite x, up to rounding.

    A reciprocal is enough: it errs at midpoints alone, where both neighbours are equally far. A scale so small that
    its reciprocal is Inf makes 0 * Inf = NaN, which becomes the lowest level here: an error of about scale^2.
    """
    lev = math.round_even(tl.minimum(tl.maximum(x * ch.reciprocal, ch.low), ch.high))
    residual = math.value(lev, ch, False) - x
    return residual * residual


@triton.jit
def range_search_kernel(x_ptr, partial_ptr, grid, shape, partials, candidates, TILE: tl.constexpr):
    """x: [shape.rows, shape.length] in memory order; partial: float32 [candidates, *partials].

    grid.scale, grid.zero_point: [candidates, channels].
    """
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    mask = layout.tile_mask(rows, cols, shape, TILE)
    x = layout.load_float(x_ptr + rows * shape.length + cols, mask)
    counts = mask & (tl.abs(x) < float("inf"))
    x = tl.where(counts, x, 0.0)
    index, exists = layout.channel_index(rows, cols, shape, TILE)
    plane = tl.cast(partials.outer * partials.channels, tl.int64) * partials.inner
    for k in range(candidates):
        ch = layout.load_channel(grid, index + k * shape.channels, exists)
        errors = tl.where(counts, squared_error(x, ch), 0.0)
        reduce.store_partial(partial_ptr + k * plane, tl.sum(errors, 1 if TILE.by_rows else 0), row, col, shape, TILE)


@triton.jit
def errors_kernel(partial_ptr, errors_ptr, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Second stage for candidate program_id(1). partial: float32 [K, *partials]; errors: [K, channels]."""
    index = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(1).to(tl.int64)
    plane = partials.outer * partials.channels * partials.inner
    errors = reduce.total(partial_ptr + k * plane, partials, CHANNELS, DEPTH)
    tl.store(errors_ptr + k * partials.channels + index, errors.to(tl.float32), mask=index < partials.channels)


def range_search(x, scales, zero_points, qrange, axis, errors):
    """errors[k] = sum of (fake_quantize(x; k) - x)^2. x: any shape and strides; scales, zero_points: [K, channels]."""
    if x.numel() == 0:
        errors.zero_()
        return
    if errors.numel() == 0:
        return
    x = layout.dense(x)
    shape, tile, programs = layout.matrix_of(x, axis, WIDTH, widest=COLUMNS)
    partials = reduce.partials_of(shape, tile)
    candidates = scales.shape[0]
    partial = x.new_empty((candidates, *partials), dtype=torch.float32)
    grid = layout.grid_of(scales, zero_points, None, qrange, 0.0)
    launch(range_search_kernel, programs, x, partial, grid, shape, partials, candidates, TILE=tile)
    programs, channels, depth = reduce.second_stage(partials)
    with layout.writing(errors, grid.scale) as errors:
        launch(errors_kernel, programs, partial, errors, partials, planes=candidates, CHANNELS=channels, DEPTH=depth)
