"""fake_quantize_tensor and its gradient: one scale, and what else one read of a tensor can give."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqat.ops.triton import bitstream, layout, math, philox, reduce
from fastqat.ops.triton.launch import launch
from fastqat.ops.triton.minmax import smallest

WIDTH = 1024  # elements of a tile where something is gathered: more take the registers that hide the memory's latency


class Made(NamedTuple):
    """What is made of each element, as kernels get it; None: not wanted. See fastqat.ops.schema."""

    inside: bitstream.Stream | None
    above: bitstream.Stream | None
    codes: bitstream.Stream | None
    y: Tensor | None


class Seen(NamedTuple):
    """Partial results of what is gathered, each [*partials]; None: not wanted."""

    low: Tensor | None  # float32: minima of x
    negated_high: Tensor | None  # float32: minima of -x
    beyond: Tensor | None  # int32


@triton.jit
def levels(x, col, ch, step_ptr, seed, tensor_id, FAST: tl.constexpr, OFFSET: tl.constexpr, ROUNDED: tl.constexpr):
    """Levels of x, and what its mask tests; NaN stays NaN. x: float32 [1, n], its first element the col-th of all.

    step_ptr: None rounds to nearest.
    """
    t = math.shifted(x, ch, OFFSET)
    # The unrounded mask needs the exact sign of a quotient however small: a bound may be 0. So does random rounding.
    NEAREST: tl.constexpr = step_ptr is None
    if NEAREST:
        r = math.ratio(t, ch, FAST and ROUNDED)
        k = math.round_even(r)
    else:
        r = math.quotient(t, ch, False)
        u = philox.uniform_from(col, seed, step_ptr, tensor_id, x.shape[1])
        k = philox.drawn(r, tl.reshape(u, (1, x.shape[1])))
    return math.clamp(k, ch.low, ch.high), k if ROUNDED else r


@triton.jit
def store_made(lev, tested, passes, col, cols, mask, ch, made, OFFSET: tl.constexpr, CODE_BITS: tl.constexpr):
    """What is wanted of each element. lev, tested: float32 [1, n]; passes: bool [1, n], of the clip, or None."""
    if made.inside is not None:
        inside = (tested >= ch.low) & (tested <= ch.high)
        if passes is not None:
            inside = inside & passes
        bitstream.store_codes(made.inside, inside, mask, col, 1)
    if made.above is not None:
        bitstream.store_codes(made.above, tested > ch.high, mask, col, 1)
    if made.codes is not None:
        known = tl.where(lev == lev, lev, math.clamp(0.0, ch.low, ch.high))
        bitstream.store_codes(made.codes, known if OFFSET else known + ch.shift, mask, col, CODE_BITS)
    if made.y is not None:
        layout.store_float(made.y + cols, math.value(lev, ch, OFFSET), mask)


@triton.jit(do_not_specialize=["seed", "tensor_id"])
def fake_quantize_tensor_kernel(
    x_ptr,  # [1, shape.length] in memory order, like all that is made of it
    made,
    seen,
    limit_ptr,
    clip,  # or None
    grid,
    shape,
    step_ptr,  # or None: rounds to nearest
    seed,
    tensor_id,
    TILE: tl.constexpr,
    ROUNDED: tl.constexpr,
    CODE_BITS: tl.constexpr,
):
    """Everything of each element, and the first stage of what is gathered."""
    OFFSET: tl.constexpr = grid.offset is not None
    row, begin = layout.first_element(shape, TILE)
    index, exists = layout.channel_index(row, begin, shape, TILE)
    ch = layout.load_channel(grid, index, exists)
    fast = math.is_fast_scale(ch.scale)
    low = tl.full((1, TILE.cols), float("inf"), tl.float32)
    negated_high = tl.full((1, TILE.cols), float("inf"), tl.float32)
    beyond = tl.zeros((1, TILE.cols), tl.int32)
    for tile in range(reduce.steps(row, begin, shape, TILE)):
        col = begin + tile * TILE.cols
        cols = layout.tile_cols(col, TILE)
        mask = cols < shape.length
        x = layout.load_float(x_ptr + cols, mask)
        passes = None
        if clip is not None:
            passes = math.passes_clip(x, clip)
            x = math.clipped(x, clip)
        if seen.low is not None:
            finite = mask & (tl.abs(x) < float("inf"))  # false for NaN
            low = tl.minimum(low, tl.where(finite, x, float("inf")))
            negated_high = tl.minimum(negated_high, tl.where(finite, -x, float("inf")))
        if seen.beyond is not None:
            beyond += (mask & (tl.abs(x) > tl.load(limit_ptr))).to(tl.int32)
        if fast:
            lev, tested = levels(x, col, ch, step_ptr, seed, tensor_id, True, OFFSET, ROUNDED)
        else:
            lev, tested = levels(x, col, ch, step_ptr, seed, tensor_id, False, OFFSET, ROUNDED)
        store_made(lev, tested, passes, col, cols, mask, ch, made, OFFSET, CODE_BITS)
    if seen.low is not None:
        reduce.store_partial(seen.low, tl.min(low, 1), row, begin, shape, TILE)
        reduce.store_partial(seen.negated_high, tl.min(negated_high, 1), row, begin, shape, TILE)
    if seen.beyond is not None:
        reduce.store_partial(seen.beyond, tl.sum(beyond, 1), row, begin, shape, TILE)


@triton.jit
def widen_kernel(low_ptr, high_ptr, seen, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Second stage: low and high, float32 [1], take in what was seen."""
    one = tl.arange(0, CHANNELS)
    low = smallest(seen.low, partials, CHANNELS, DEPTH)
    negated_high = smallest(seen.negated_high, partials, CHANNELS, DEPTH)
    tl.store(low_ptr + one, tl.minimum(tl.load(low_ptr + one), low))
    tl.store(high_ptr + one, -tl.minimum(-tl.load(high_ptr + one), negated_high))


@triton.jit
def count_kernel(beyond_ptr, partial_ptr, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Second stage: beyond, int64 [1], grows by what was counted; a sum of float64 is exact up to 2^53."""
    one = tl.arange(0, CHANNELS)
    count = reduce.total(partial_ptr, partials, CHANNELS, DEPTH).to(tl.int64)
    tl.store(beyond_ptr + one, tl.load(beyond_ptr + one) + count)


@triton.jit
def bits_of(stream, col, TILE: tl.constexpr):
    """Bits of a tile: bool [1, cols]."""
    return tl.reshape(bitstream.load_codes(stream, col, 1, TILE.cols), (1, TILE.cols)) != 0


@triton.jit
def fake_quantize_tensor_backward_kernel(
    g_ptr,  # [1, shape.length] in memory order, like dx and the bits
    dx_ptr,
    inside,  # bitstream.Stream, and so is above
    above,
    partial_ptr,  # float64 [*partials], or None: dx alone
    shape,
    TILE: tl.constexpr,
):
    """dx, and the first stage of the sum of g above."""
    row, begin = layout.first_element(shape, TILE)
    sums = reduce.no_sums(TILE)
    for tile in range(reduce.steps(row, begin, shape, TILE)):
        col = begin + tile * TILE.cols
        cols = layout.tile_cols(col, TILE)
        mask = cols < shape.length
        g = layout.load_float(g_ptr + cols, mask)
        layout.store_float(dx_ptr + cols, tl.where(bits_of(inside, col, TILE), g, 0.0), mask)
        if partial_ptr is not None:
            sums += reduce.fold(tl.where(bits_of(above, col, TILE), g, 0.0), TILE)
    if partial_ptr is not None:
        reduce.store_partial(partial_ptr, tl.sum(sums, 1), row, begin, shape, TILE)


@triton.jit
def clip_gradient_kernel(dscale_ptr, partial_ptr, qrange_ptr, partials, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Second stage: dscale, float32 [1]."""
    total = reduce.total(partial_ptr, partials, CHANNELS, DEPTH) * tl.load(qrange_ptr + 1).to(tl.float64)
    tl.store(dscale_ptr + tl.arange(0, CHANNELS), total.to(tl.float32))


def fake_quantize_tensor(
    x,
    scale,
    zero_point,
    offset,
    qrange,
    eps,
    clip,
    rounded_mask,
    seed,
    tensor_id,
    step,
    limit,
    code_bits,
    low,
    high,
    beyond,
    inside,
    above,
    codes,
    y,
):
    """y, and what else is wanted. x: any shape and strides; y: shape of x; the others: see fastqat.ops.schema."""
    if x.numel() == 0:
        return
    x = layout.dense(x)
    extremes, counts = low.numel() > 0, beyond.numel() > 0
    width = WIDTH if extremes or counts else layout.WIDTH
    shape, tile, programs = layout.matrix_of(x, None, width, reduces=extremes or counts)
    partials = reduce.partials_of(shape, tile)
    bounds = x.new_empty((2, *partials), dtype=torch.float32).unbind() if extremes else (None, None)
    seen = Seen(*bounds, x.new_empty(partials, dtype=torch.int32) if counts else None)
    grid = layout.grid_of(scale, zero_point, offset, qrange, eps)
    noise = (None if tensor_id < 0 else step, seed, tensor_id)
    flags = {"TILE": tile, "ROUNDED": rounded_mask, "CODE_BITS": code_bits}
    with layout.writing(y, x if y.numel() else y) as own:
        made = Made(*(bitstream.stream_of(t) for t in (inside, above, codes)), own if y.numel() else None)
        launch(fake_quantize_tensor_kernel, programs, x, made, seen, limit, clip or None, grid, shape, *noise, **flags)
    _, channels, depth = reduce.second_stage(partials)
    if extremes:
        launch(widen_kernel, 1, low, high, seen, partials, CHANNELS=channels, DEPTH=depth)
    if counts:
        launch(count_kernel, 1, beyond, seen.beyond, partials, CHANNELS=channels, DEPTH=depth)


def fake_quantize_tensor_backward(g, inside, above, qrange, dx, dscale):
    """dx, and dscale where it is wanted. g: any strides; dx: shape of g, dense; the others: see fastqat.ops.schema."""
    if dx.numel() == 0:
        dscale.zero_()
        return
    g, sums = layout.arranged_like(g, dx), dscale.numel() > 0
    shape, tile, programs = layout.matrix_of(dx, None, layout.WIDTH, reduces=sums)
    partials = reduce.partials_of(shape, tile)
    partial = dx.new_empty(partials, dtype=torch.float64) if sums else None
    bits = (bitstream.stream_of(t) for t in (inside, above))
    launch(fake_quantize_tensor_backward_kernel, programs, g, dx, *bits, partial, shape, TILE=tile)
    if sums:
        _, channels, depth = reduce.second_stage(partials)
        launch(clip_gradient_kernel, 1, dscale, partial, qrange, partials, CHANNELS=channels, DEPTH=depth)
