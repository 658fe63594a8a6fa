"""Gradients of fake_quantize: dx, and the sums for scale and zero point or offset, from one pass over (g, x)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqat.ops.estimators import STE
from fastqat.ops.triton import estimators, layout, math, oscillation, philox, reduce
from fastqat.ops.triton.launch import launch

WIDTH = 1024  # elements of a tile: more take the registers that other programs need to hide the memory's latency


class Modes(NamedTuple):
    """What else the gradient of a tensor depends on, as kernels get it; None: nothing."""

    words: Tensor | None = None  # like x: of tracking
    strength: Tensor | None = None  # float32 [1]: of the estimator
    dampening: Tensor | None = None  # float32 [1]
    step: Tensor | None = None  # int64 [1]: rounds stochastically
    clip: float | None = None  # x is clamped to [0, clip] first


@triton.jit
def extras_of(
    g, x, at, mask, ch, modes, seed, tensor_id, FAST: tl.constexpr, OFFSET: tl.constexpr, ESTIMATOR: tl.constexpr
):
    """math.Extras of a tile. g, x: float32 [rows, cols], at: where they lie in memory."""
    t = math.shifted(x, ch, OFFSET)
    held, factor, dampening, drawn = None, None, None, None
    if modes.words is not None:
        word = tl.load(modes.words + at, mask=mask, other=0)
        last = ch.low + oscillation.index_of(word).to(tl.float32)
        held = tl.where(oscillation.flags_of(word) == oscillation.kSettled, last, float("nan"))
    if modes.strength is not None:
        # The three-step quotient is exact but for what is far below the scale, where E = lambda * |x - y| shows it.
        EXACT: tl.constexpr = ESTIMATOR == estimators.kPsg
        r = tl.div_rn(t, ch.scale) if EXACT else math.ratio(t, ch, FAST)
        factor = estimators.estimator_factor(g, r, ch.scale, tl.load(modes.strength), ESTIMATOR)
    if modes.dampening is not None:
        dampening = tl.load(modes.dampening)
    if modes.step is not None:
        drawn = philox.drawn(tl.div_rn(t, ch.scale), philox.uniform_at(at, seed, modes.step, tensor_id))
    return math.Extras(held, factor, dampening, drawn)


@triton.jit
def gradient(
    g,
    x,
    at,
    mask,
    ch,
    fast,
    modes,
    seed,
    tensor_id,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    ESTIMATOR: tl.constexpr,
):
    """Gradient of a tile. g, x: float32 [rows, cols]; fast: scalar."""
    WITHIN: tl.constexpr = ESTIMATOR != estimators.kPact
    if modes.clip is not None:
        passes = math.passes_clip(x, modes.clip)
        x = math.clipped(x, modes.clip)
    if fast:
        extras = extras_of(g, x, at, mask, ch, modes, seed, tensor_id, True, OFFSET, ESTIMATOR)
        d = math.fake_quantize_backward(g, x, ch, True, OFFSET, ROUNDED, extras, WITHIN)
    else:
        extras = extras_of(g, x, at, mask, ch, modes, seed, tensor_id, False, OFFSET, ESTIMATOR)
        d = math.fake_quantize_backward(g, x, ch, False, OFFSET, ROUNDED, extras, WITHIN)
    if modes.clip is not None:
        d = math.Gradient(tl.where(passes, d.dx, 0.0), d.scale, d.outside)
    return d


@triton.jit(do_not_specialize=["seed", "tensor_id"])
def fake_quantize_backward_kernel(
    g_ptr,  # [shape.rows, shape.length] in memory order, like x and dx
    x_ptr,
    dx_ptr,
    partial_ptr,  # float64 [1 + SHIFT, *partials], or None: dx alone
    grid,
    shape,
    partials,
    modes,
    seed,
    tensor_id,
    TILE: tl.constexpr,
    ROUNDED: tl.constexpr,
    SHIFT: tl.constexpr,
    ESTIMATOR: tl.constexpr,
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
        d = gradient(g, x, at, mask, ch, fast, modes, seed, tensor_id, OFFSET, ROUNDED, ESTIMATOR)
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


class Rule(NamedTuple):
    """The constants of a tensor's gradient."""

    rounded_mask: bool
    lsq_grad_scale: bool = False
    estimator: int = STE
    seed: int = 0
    tensor_id: int = 0


def write_gradients(g, x, grid: layout.Grid, axis: int | None, rule: Rule, modes: Modes, dx, dscale, dshift) -> None:
    """dx, and dscale and dshift where they are not empty. g, x, dx: one shape, any strides, and some element."""
    x = layout.dense(x) if modes.step is None else x.contiguous()  # the order in which random numbers are counted
    g = layout.arranged_like(g, x)
    if modes.words is not None:
        modes = modes._replace(words=layout.arranged_like(modes.words, x))
    sums, shift = dscale.numel() > 0, dshift.numel() > 0
    shape, tile, programs = layout.matrix_of(x, axis, WIDTH, reduces=sums)
    partials = reduce.partials_of(shape, tile) if sums else None
    partial = x.new_empty((1 + shift, *partials), dtype=torch.float64) if partials else None
    flags = {"TILE": tile, "ROUNDED": rule.rounded_mask, "SHIFT": shift, "ESTIMATOR": rule.estimator}
    with layout.writing(dx, x) as dx:
        arguments = (g, x, dx, partial, grid, shape, partials, modes, rule.seed, rule.tensor_id)
        launch(fake_quantize_backward_kernel, programs, *arguments, **flags)
    if partials is None:
        return
    programs, channels, depth = reduce.second_stage(partials)
    flags = {"LSQ_GRAD_SCALE": rule.lsq_grad_scale, "SHIFT": shift, "CHANNELS": channels, "DEPTH": depth}
    count = x.numel() // grid.scale.numel()
    one = grid.scale if shift else dshift
    with layout.writing(dscale, grid.scale) as dscale, layout.writing(dshift, one) as dshift:
        launch(learned_gradients_kernel, programs, partial, dscale, dshift, grid, partials, count, **flags)


def fake_quantize_backward_input(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, dx):
    """dx alone. g, x, dx: one shape, any strides; the others: see fastqat.ops.schema."""
    if x.numel() == 0:
        return
    grid, none = layout.grid_of(scale, zero_point, offset, qrange, eps), scale.new_empty(0)
    write_gradients(g, x, grid, axis, Rule(rounded_mask), Modes(), dx, none, none)


def fake_quantize_backward(
    g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, lsq_grad_scale, clip, dx, dscale, dshift
):
    """dx, dscale, dshift. g, x, dx: one shape, any strides; the others: see fastqat.ops.schema."""
    if x.numel() == 0:
        dscale.zero_()
        dshift.zero_()
        return
    grid = layout.grid_of(scale, zero_point, offset, qrange, eps)
    modes = Modes(clip=clip or None)
    write_gradients(g, x, grid, axis, Rule(rounded_mask, lsq_grad_scale), modes, dx, dscale, dshift)
