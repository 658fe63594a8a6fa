"""Ops on a weight that is wanted at two bit-widths, from one read of it, and DoReFa's gradient."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqat.ops.triton import dorefa, layout, math, reduce
from fastqat.ops.triton.fake_quantize import store_rounded
from fastqat.ops.triton.launch import launch, power_of_two


@triton.jit
def two_widths_kernel(x_ptr, first_ptr, second_ptr, first_grid, second_grid, shape, TILE: tl.constexpr):
    """x, first, second: [shape.rows, shape.length] in memory order."""
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    mask = layout.tile_mask(rows, cols, shape, TILE)
    at = rows * shape.length + cols
    x = layout.load_float(x_ptr + at, mask)
    index, exists = layout.channel_index(rows, cols, shape, TILE)
    store_rounded(first_ptr + at, x, mask, first_grid, index, exists, TILE)
    store_rounded(second_ptr + at, x, mask, second_grid, index, exists, TILE)


class Extremes(NamedTuple):
    """Of x, as minmax finds them: float32 [1] each."""

    low: Tensor
    high: Tensor


@triton.jit
def normalizer_of(extremes):
    """How a tensor with these extremes is normalized."""
    return dorefa.make_normalizer(tl.load(extremes.low), tl.load(extremes.high))


@triton.jit
def store_level(y_ptrs, u, mask, n):
    """Store the values of a tile at one bit-width; r, int32, 0 for NaN and outside the mask."""
    r = dorefa.dorefa_level(u, n)
    layout.store_float(y_ptrs, dorefa.dorefa_value(r, n), mask)
    return tl.where(mask & (r == r), r, 0.0).to(tl.int32)


@triton.jit
def add_sums(sums_ptr, r, squares):
    """Add what a program has counted to the sums of one width, int64 [2]: of integers, in any order."""
    tl.atomic_add(sums_ptr, tl.sum(r.to(tl.int64)))
    tl.atomic_add(sums_ptr + 1, tl.sum(squares.to(tl.int64)))


@triton.jit
def dorefa_kernel(
    x_ptr,  # [1, shape.length] in memory order, like first and second
    first_ptr,
    second_ptr,  # or None
    extremes,
    qmax_ptr,
    sums_ptr,  # zeros, or None
    shape,
    TILE: tl.constexpr,
):
    """Values at one or two bit-widths, and the sums of r and r^2: of 12 bits at most, as int32."""
    by = normalizer_of(extremes)
    fast = math.is_fast_scale(by.largest.scale)
    n = dorefa.divisor(tl.load(qmax_ptr).to(tl.float32))
    other = dorefa.divisor(tl.load(qmax_ptr + 1).to(tl.float32))
    sums = tl.zeros((1, TILE.cols), tl.int32)
    squares, other_sums, other_squares = sums, sums, sums
    row, begin = layout.first_element(shape, TILE)
    for tile in range(reduce.steps(row, begin, shape, TILE)):
        cols = layout.tile_cols(begin + tile * TILE.cols, TILE)
        mask = cols < shape.length
        t = dorefa.tanh(layout.load_float(x_ptr + cols, mask))
        if fast:
            u = dorefa.normalized(t, by, True)
        else:
            u = dorefa.normalized(t, by, False)
        r = store_level(first_ptr + cols, u, mask, n)
        if sums_ptr is not None:
            sums += r
            squares += r * r
        if second_ptr is not None:
            r = store_level(second_ptr + cols, u, mask, other)
            if sums_ptr is not None:
                other_sums += r
                other_squares += r * r
    if sums_ptr is not None:
        add_sums(sums_ptr, sums, squares)
        if second_ptr is not None:
            add_sums(sums_ptr + 2, other_sums, other_squares)


@triton.jit
def dorefa_backward_kernel(
    g_ptr,  # [1, shape.length] in memory order, like x and dx
    x_ptr,
    dx_ptr,
    extremes,
    factor_ptr,  # or None: 1
    total_ptr,  # float64 [programs]: sums of g u
    ties_ptr,  # int32 [programs]: elements with |x| = m
    shape,
    TILE: tl.constexpr,
):
    """dx as if no element were the largest, and what is to be known for those that are."""
    by = normalizer_of(extremes)
    fast = math.is_fast_scale(by.largest.scale)
    factor = 1.0 if factor_ptr is None else tl.load(factor_ptr)
    end = tl.where(by.m > 0.0, float("inf"), 0.0)  # of what passes a gradient
    sums, ties = reduce.no_sums(TILE), tl.zeros((1, TILE.cols), tl.int32)
    row, begin = layout.first_element(shape, TILE)
    for tile in range(reduce.steps(row, begin, shape, TILE)):
        cols = layout.tile_cols(begin + tile * TILE.cols, TILE)
        mask = cols < shape.length
        x, g = layout.load_float(x_ptr + cols, mask), layout.load_float(g_ptr + cols, mask)
        t = dorefa.tanh(x)
        passes = tl.abs(x) < end  # false for NaN
        if fast:
            u, dx = dorefa.normalized(t, by, True), dorefa.dorefa_dx(g, t, 0.0, factor, by, True)
        else:
            u, dx = dorefa.normalized(t, by, False), dorefa.dorefa_dx(g, t, 0.0, factor, by, False)
        layout.store_float(dx_ptr + cols, tl.where(passes, dx, 0.0), mask)
        sums += reduce.fold(tl.where(passes, g * u, 0.0), TILE)
        ties += (mask & (tl.abs(x) == by.m)).to(tl.int32)
    tl.store(total_ptr + tl.program_id(0), tl.sum(sums))
    tl.store(ties_ptr + tl.program_id(0), tl.sum(ties))


@triton.jit
def whole(partial_ptr, count, DEPTH: tl.constexpr):
    """The sum of all partial results, in their order: float64."""
    sums = tl.zeros((DEPTH,), tl.float64)
    for start in range(0, count, DEPTH):
        at = start + tl.arange(0, DEPTH)
        sums += tl.load(partial_ptr + at, mask=at < count, other=0).to(tl.float64)
    return tl.sum(sums)


@triton.jit
def dorefa_mend_kernel(
    g_ptr,
    x_ptr,
    dx_ptr,
    extremes,
    factor_ptr,
    total_ptr,
    ties_ptr,
    shape,
    programs,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dx of the elements that are the largest: in few programs, as a rule. The arguments of dorefa_backward_kernel."""
    by = normalizer_of(extremes)
    if (tl.load(ties_ptr + tl.program_id(0)) > 0) & (by.m > 0.0):
        share = (whole(total_ptr, programs, DEPTH) / whole(ties_ptr, programs, DEPTH)).to(tl.float32)
        factor = 1.0 if factor_ptr is None else tl.load(factor_ptr)
        row, begin = layout.first_element(shape, TILE)
        for tile in range(reduce.steps(row, begin, shape, TILE)):
            cols = layout.tile_cols(begin + tile * TILE.cols, TILE)
            x = layout.load_float(x_ptr + cols, cols < shape.length)
            tied = (cols < shape.length) & (tl.abs(x) == by.m)
            g, through = layout.load_float(g_ptr + cols, tied), dorefa.through_largest(x, share)
            dx = dorefa.dorefa_dx(g, dorefa.tanh(x), through, factor, by, False)
            layout.store_float(dx_ptr + cols, dx, tied)


def fake_quantize_two_widths(x, scales, zero_points, offsets, qranges, axis, eps, first, second):
    """first, second = fake_quantize of x on either grid. x: any shape and strides; first, second: shape of x."""
    if x.numel() == 0:
        return
    x = layout.dense(x)
    shape, tile, programs = layout.matrix_of(x, axis, layout.WIDTH)
    grids = []
    for k in range(2):
        parameters = (None if t is None else t[k] for t in (scales, zero_points, offsets, qranges))
        grids.append(layout.grid_of(*parameters, eps))
    with layout.writing(first, x) as first, layout.writing(second, x) as second:
        launch(two_widths_kernel, programs, x, first, second, *grids, shape, TILE=tile)


def dorefa_fake_quantize(x, low, high, qmax, sums, first, second):
    """Values at one or two bit-widths, and sums where they are wanted: see fastqat.ops.schema."""
    if x.numel() == 0:
        return
    x, pair, counts = layout.dense(x), second.numel() > 0, sums.numel() > 0
    shape, tile, programs = layout.matrix_of(x, None, layout.WIDTH, reduces=counts)
    sums[: 1 + pair].zero_()
    with contextlib.ExitStack() as results:
        first = results.enter_context(layout.writing(first, x))
        second = results.enter_context(layout.writing(second, x)) if pair else None
        arguments = (Extremes(low, high), qmax, sums if counts else None, shape)
        launch(dorefa_kernel, programs, x, first, second, *arguments, TILE=tile)


def dorefa_fake_quantize_backward(g, x, low, high, factor, dx):
    """dx = gradient of dorefa_fake_quantize at any bit-width. g, x, dx: one shape, any strides."""
    if x.numel() == 0:
        return
    x = layout.dense(x)
    g = layout.arranged_like(g, x)
    shape, tile, programs = layout.matrix_of(x, None, layout.WIDTH, reduces=True)
    sums = (x.new_empty(programs, dtype=torch.float64), x.new_empty(programs, dtype=torch.int32))
    depth = min(power_of_two(programs), reduce.ELEMENTS)
    with layout.writing(dx, x) as dx:
        arguments = (x, dx, Extremes(low, high), factor if factor.numel() else None, *sums, shape)
        launch(dorefa_backward_kernel, programs, g, *arguments, TILE=tile)
        launch(dorefa_mend_kernel, programs, g, *arguments, programs, TILE=tile, DEPTH=depth)
