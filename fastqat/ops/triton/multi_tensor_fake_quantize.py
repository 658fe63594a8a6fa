"""multi_tensor_fake_quantize: many tensors rounded to their grids, with oscillation tracking and freezing in the pass.

A tensor is one launch, and one more of a single program where its state moves on: the clock must not change while the
programs of the first read it.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqat.ops.triton import layout, math, oscillation, philox
from fastqat.ops.triton.fake_quantize import fake_quantize
from fastqat.ops.triton.launch import launch

WIDTH = 1024  # elements of a tile: the state of a weight takes registers
EVENTS = tl.constexpr(1024)  # programs whose events are added up at a time


class State(NamedTuple):
    """The state of a tracked tensor, as kernels get it; see fastqat.ops.schema."""

    words: Tensor  # like x, and the next two
    frequency: Tensor
    average: Tensor
    clock: Tensor
    threshold: Tensor


class Noise(NamedTuple):
    """Stochastic rounding, as kernels get it."""

    step: Tensor
    seed: int
    tensor_id: int


def unless_empty(t: Tensor) -> Tensor | None:
    """None where a tensor of a list is empty."""
    return t if t.numel() else None


def axis_of(axis: int) -> int | None:
    """The axis, None where it is -1."""
    return None if axis < 0 else axis


def grid_at(i: int, scales, zero_points, offsets, qranges, eps) -> layout.Grid:
    """Grid of the i-th tensor."""
    shifts = (unless_empty(p[i]) for p in (zero_points, offsets))
    return layout.grid_of(scales[i], *shifts, qranges[i], eps[i])


@triton.jit
def own_level(x, at, ch, step_ptr, seed, tensor_id, FAST: tl.constexpr, OFFSET: tl.constexpr, NOISE: tl.constexpr):
    """Level of a tile without regard to its state; NaN stays NaN. x: float32 [rows, cols], at: where it lies."""
    t = math.shifted(x, ch, OFFSET)
    if NOISE:
        drawn = philox.drawn(tl.div_rn(t, ch.scale), philox.uniform_at(at, seed, step_ptr, tensor_id))
        return math.clamp(drawn, ch.low, ch.high)
    else:
        return math.level(t, ch, FAST)


@triton.jit
def tracked_level(own, at, mask, ch, qrange_ptr, state, moment, events_ptr, USE_AVERAGE: tl.constexpr):
    """Levels of a tile with frozen weights at theirs; records what has changed where there are events to write.

    own: float32 [rows, cols]; qrange_ptr: int32 [2]; events_ptr: int32 [3], or None. Only words are read where nothing
    changes. Flags of the moment meet those of elements in tl.where alone: the interpreter broadcasts a scalar
    comparison as a number.
    """
    word = tl.load(state.words + at, mask=mask, other=0)
    flags, last = oscillation.flags_of(word), ch.low + oscillation.index_of(word).to(tl.float32)
    number = own == own
    held = tl.where(moment.first, False, flags >= oscillation.kSettled) & number
    settled = held & (flags == oscillation.kSettled)
    lev = tl.where(settled, last, own)
    visited = tl.where(moment.sweeps | moment.first, True, (flags > oscillation.kSettled) | (lev != last))
    visited = tl.where(moment.acts | moment.first, visited & mask, False)
    changes, oscillates, freezes = 0, 0, 0
    if tl.max(visited.to(tl.int32)) == 1:
        frequency = tl.load(state.frequency + at, mask=visited, other=0.0)
        average = tl.load(state.average + at, mask=visited, other=0.0)
        weight = oscillation.Tracked(oscillation.index_of(word), flags, frequency, average)
        qmin, qmax = tl.load(qrange_ptr).to(tl.float32), tl.load(qrange_ptr + 1).to(tl.float32)
        now = (tl.where(number, own, math.clamp(0.0, ch.low, ch.high)) - ch.low).to(tl.int32)
        index, weight, event = oscillation.record(weight, now, number, moment, qmin, qmax, USE_AVERAGE)
        lev = tl.where(held & visited, ch.low + index.to(tl.float32), lev)
        if events_ptr is not None:
            made = oscillation.make_word(weight.index, weight.flags, word.dtype)
            tl.store(state.words + at, made, mask=visited)
            tl.store(state.frequency + at, weight.frequency, mask=visited)
            tl.store(state.average + at, weight.average, mask=visited)
            changes = tl.sum((event.changes & visited).to(tl.int32))
            oscillates = tl.sum((event.oscillates & visited).to(tl.int32))
            freezes = tl.sum((event.freezes & visited).to(tl.int32))
    if events_ptr is not None:
        tl.store(events_ptr, changes)
        tl.store(events_ptr + 1, oscillates)
        tl.store(events_ptr + 2, freezes)
    return lev


@triton.jit(do_not_specialize=["seed", "tensor_id"])
def tracked_fake_quantize_kernel(
    x_ptr,  # [shape.rows, shape.length] in memory order, like y and the words
    y_ptr,
    grid,
    shape,
    step_ptr,
    seed,
    tensor_id,
    state,  # State, or None
    events_ptr,  # int32 [programs, 3], or None: the state stays as it is
    TILE: tl.constexpr,
    NOISE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    USE_AVERAGE: tl.constexpr,
):
    """y, the state but for its counts and its clock, and the events of each program."""
    OFFSET: tl.constexpr = grid.offset is not None
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    mask = layout.tile_mask(rows, cols, shape, TILE)
    at = rows * shape.length + cols
    x = layout.load_float(x_ptr + at, mask)
    index, exists = layout.channel_index(rows, cols, shape, TILE)
    ch = layout.load_channel(grid, index, exists)
    if layout.all_fast(ch, TILE):
        lev = own_level(x, at, ch, step_ptr, seed, tensor_id, True, OFFSET, NOISE)
    else:
        lev = own_level(x, at, ch, step_ptr, seed, tensor_id, False, OFFSET, NOISE)
    if state is not None:
        moment = oscillation.moment(tl.load(step_ptr), state.clock, tl.load(state.threshold), MOMENTUM)
        events = None if events_ptr is None else events_ptr + 3 * tl.program_id(0)
        lev = tracked_level(lev, at, mask, ch, grid.qrange, state, moment, events, USE_AVERAGE)
    layout.store_float(y_ptr + at, math.value(lev, ch, OFFSET), mask)


@triton.jit
def events_kernel(counts_ptr, clock_ptr, step_ptr, threshold_ptr, events_ptr, programs, MOMENTUM: tl.constexpr):
    """Counts and clock of one step. counts: int64 [5]; clock: float64 [3]; events: int32 [programs, 3]."""
    step, threshold = tl.load(step_ptr), tl.load(threshold_ptr)
    at = oscillation.moment(step, clock_ptr, threshold, MOMENTUM)
    k = tl.arange(0, 4)[:, None]
    sums = tl.zeros((4, EVENTS), tl.int64)
    for start in range(0, programs, EVENTS):
        program = start + tl.arange(0, EVENTS)[None, :]
        mask = (k < 3) & (program < programs)
        sums += tl.load(events_ptr + 3 * program.to(tl.int64) + k, mask=mask, other=0)
    total, kind = tl.sum(sums, 1), tl.arange(0, 4)
    before = tl.load(counts_ptr + kind)
    later = tl.where(kind == 3, tl.sum(tl.where(kind == 0, total, 0)), tl.where(at.first, 0, before + total))
    tl.debug_barrier()  # no thread writes the clock before all have read it
    if at.acts | at.first:
        tl.store(counts_ptr + kind, later)
        tl.store(clock_ptr, at.growth)
        tl.store(clock_ptr + 1, step.to(tl.float64))
        tl.store(clock_ptr + 2, threshold.to(tl.float64))


def multi_tensor_fake_quantize(
    xs,
    scales,
    zero_points,
    offsets,
    qranges,
    axes,
    eps,
    seeds,
    tensor_ids,
    steps,
    momenta,
    use_average,
    thresholds,
    advance,
    words,
    frequencies,
    averages,
    counts,
    clocks,
    ys,
):
    """ys, and the state of what is tracked; see fastqat.ops.schema."""
    for i, x in enumerate(xs):
        axis, noise = axis_of(axes[i]), Noise(steps[i], seeds[i], tensor_ids[i])
        if not momenta[i] and noise.tensor_id < 0:
            shifts = (unless_empty(p[i]) for p in (zero_points, offsets))
            fake_quantize(x, scales[i], *shifts, qranges[i], axis, eps[i], None, ys[i])
            continue
        grid = grid_at(i, scales, zero_points, offsets, qranges, eps)
        state = State(words[i], frequencies[i], averages[i], clocks[i], thresholds[i]) if momenta[i] else None
        events = quantize_one(x, grid, axis, noise, state, momenta[i], bool(use_average[i]), advance, ys[i])
        if events is not None:
            arguments = (counts[i], clocks[i], steps[i], thresholds[i], events, len(events))
            launch(events_kernel, 1, *arguments, MOMENTUM=momenta[i])


def quantize_one(
    x: Tensor,
    grid: layout.Grid,
    axis: int | None,
    noise: Noise,
    state: State | None,
    momentum: float,
    use_average: bool,
    advance: bool,
    y: Tensor,
) -> Tensor | None:
    """y, and the state but for its counts and clock. Result: the events, int32 [programs, 3], where it moves on."""
    tracks = state is not None and advance
    if x.numel() == 0:
        return x.new_empty((0, 3), dtype=torch.int32) if tracks else None
    x = layout.dense(x) if noise.tensor_id < 0 else x.contiguous()  # the order in which random numbers are counted
    shape, tile, programs = layout.matrix_of(x, axis, WIDTH)
    events = x.new_empty((programs, 3), dtype=torch.int32) if tracks else None
    flags = {"TILE": tile, "NOISE": noise.tensor_id >= 0, "MOMENTUM": momentum, "USE_AVERAGE": use_average}
    with contextlib.ExitStack() as stack:
        y = stack.enter_context(layout.writing(y, x))
        if state is not None:
            state = State(*(stack.enter_context(layout.updating(t, x)) for t in state[:3]), *state[3:])
        launch(tracked_fake_quantize_kernel, programs, x, y, grid, shape, *noise, state, events, **flags)
    return events
