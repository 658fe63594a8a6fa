"""Gradients of fake_quantize: dx, and the sums for scale and zero point or offset, from one pass over (g, x)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastqat.ops.triton import layout, math, reduce
from fastqat.ops.triton.launch import launch

WIDTH = 1024  # elements of a tile: more take the registers that other programs need to hide the memory's latency


@triton.jit
def gradient(g, x, ch, fast, OFFSET: tl.constexpr, ROUNDED: tl.constexpr):
    """Gradient of a tile. g, x: float32 [rows, cols]; fast: scalar."""
    if fast:
        d = math.fake_quantize_backward(g, x, ch, True, OFFSET, ROUNDED)
    else:
        d = math.fake_quantize_backward(g, x, ch, False, OFFSET, ROUNDED)
    return d


@triton.jit
def fake_quantize_backward_kernel(
    g_ptr,  # [shape.rows, shape.length] in memory order, like x and dx
    x_ptr,
    dx_ptr,
    partial_ptr,  # float64 [1 + SHIFT, *partials], or None: dx alone
    grid,
    shape,
    partials,
    TILE: tl.constexpr,
    ROUNDED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """dx, and the first stage of the sums."""
    OFFSET: tl.constexpr = grid.offset is not None
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    index, exists = layout.channel_index(rows, cols, shape, TILE)
    ch = layout.load_channel(grid, index, exists)
    fast = layout.all_fast(ch, TILE)
    scale_sums = reduce.no_sums(TILE)
    outside_sums = reduce.no_sums(TILE)
    for _ in range(reduce.steps(row, col, shape, TILE)):
        mask = layout.tile_mask(rows, cols, shape, TILE)
        at = rows * shape.length + cols
        g, x = layout.load_float(g_ptr + at, mask), layout.load_float(x_ptr + at, mask)
        d = gradient(g, x, ch, fast, OFFSET, ROUNDED)
        layout.store_float(dx_ptr + at, d.dx, mask)
        if partial_ptr is not None:
            scale_sums += reduce.fold(d.scale, TILE)
        if SHIFT:
            outside_sums += reduce.fold(d.outside, TILE)
        if TILE.by_rows:
            cols += TILE.cols
        else:
            rows += TILE.rows
    AXIS: tl.constexpr = 1 if TILE.by_rows else 0
    if partial_ptr is not None:
        reduce.store_partial(partial_ptr, tl.sum(scale_sums, AXIS), row, col, shape, TILE)
    if SHIFT:
        plane = partials.outer * partials.channels * partials.inner
        reduce.store_partial(partial_ptr + plane, tl.sum(outside_sums, AXIS), row, col, shape, TILE)


@triton.jit
def learned_gradients_kernel(
    partial_ptr,  # float64 [1 + SHIFT, *partials]
    dscale_ptr,  # [channels]
    dshift_ptr,  # [channels]
    grid,
    partials,
    count,  # elements that share a scale
    LSQ_GRAD_SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Second stage of the sums: dscale and dshift."""
    index = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = index < partials.channels
    ch = layout.load_channel(grid, index, exists)
    factor = 1.0
    if LSQ_GRAD_SCALE:
        qmax = tl.maximum(tl.load(grid.qrange + 1), 1).to(tl.float64)
        factor = 1.0 / tl.sqrt(qmax * count)
    dscale = reduce.total(partial_ptr, partials, CHANNELS, DEPTH) / math.grad_scale_divisor(ch) * factor
    tl.store(dscale_ptr + index, dscale.to(tl.float32), mask=exists)
    if SHIFT:
        plane = partials.outer * partials.channels * partials.inner
        outside = reduce.total(partial_ptr + plane, partials, CHANNELS, DEPTH)
        if grid.offset is None:
            outside *= -ch.scale.to(tl.float64)
        tl.store(dshift_ptr + index, (outside * factor).to(tl.float32), mask=exists)


def fake_quantize_backward_input(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, dx):
    """dx alone. g, x, dx: one shape, any strides; the others: see fastqat.ops.schema."""
    if x.numel() == 0:
        return
    x = layout.dense(x)
    g = layout.arranged_like(g, x)
    grid = layout.grid_of(scale, zero_point, offset, qrange, eps)
    shape, tile, programs = layout.matrix_of(x, axis, WIDTH)
    flags = {"ROUNDED": rounded_mask, "SHIFT": False}
    with layout.writing(dx, x) as dx:
        launch(fake_quantize_backward_kernel, programs, g, x, dx, None, grid, shape, None, TILE=tile, **flags)


def fake_quantize_backward(
    g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, lsq_grad_scale, dx, dscale, dshift
):
    """dx, dscale, dshift. g, x, dx: one shape, any strides; the others: see fastqat.ops.schema."""
    if x.numel() == 0:
        dscale.zero_()
        dshift.zero_()
        return
    shift = dshift.numel() > 0
    x = layout.dense(x)
    g = layout.arranged_like(g, x)
    grid = layout.grid_of(scale, zero_point, offset, qrange, eps)
    shape, tile, programs = layout.matrix_of(x, axis, WIDTH, reduces=True)
    partials = reduce.partials_of(shape, tile)
    partial = x.new_empty((1 + shift, *partials), dtype=torch.float64)
    flags = {"ROUNDED": rounded_mask, "SHIFT": shift}
    with layout.writing(dx, x) as dx:
        launch(fake_quantize_backward_kernel, programs, g, x, dx, partial, grid, shape, partials, TILE=tile, **flags)

    programs, channels, depth = reduce.second_stage(partials)
    flags = {"LSQ_GRAD_SCALE": lsq_grad_scale, "SHIFT": shift, "CHANNELS": channels, "DEPTH": depth}
    count = x.numel() // scale.numel()
    one = grid.scale if shift else dshift
    with layout.writing(dscale, grid.scale) as dscale, layout.writing(dshift, one) as dshift:
        launch(learned_gradients_kernel, programs, partial, dscale, dshift, grid, partials, count, **flags)
