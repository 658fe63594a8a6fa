"""The definition of the ops on many tensors, tensor by tensor, in plain torch; see :mod:`fastqat.ops.reference`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastqat.ops import reference, words
from fastqat.ops.estimators import EWGS, PACT, PSG, SIGMOID, STOCHASTIC
from fastqat.ops.reference import Grid

LARGEST_GROWTH = 2.0**60


def grid_at(i: int, x: Tensor, scales, zero_points, offsets, qranges, axes, eps) -> Grid:
    """Grid of the i-th tensor."""
    zero_point, offset = (p[i] if p[i].numel() else None for p in (zero_points, offsets))
    return reference.grid_of(x, scales[i], zero_point, offset, qranges[i], axis_of(axes[i]), eps[i])


def axis_of(axis: int) -> int | None:
    """The axis, None where it is -1."""
    return None if axis < 0 else axis


def drawn(r: Tensor, seed: int, step: Tensor, tensor_id: int) -> Tensor:
    """floor(r + u) with u of Philox, elements counted in logical order."""
    u = torch.empty(r.numel(), dtype=torch.float32, device=r.device)
    reference.philox_uniform(step, seed, tensor_id, r.numel(), u)
    return (r + u.view(r.shape)).floor()


class Moment(NamedTuple):
    """One step of tracking, as its tensor sees it: 0-dim tensors. t counts from where the growth was last 1."""

    acts: Tensor  # the step is another than the last tracked one, so that freezes decided there act
    first: Tensor  # nothing was tracked before
    activates: Tensor  # the threshold is no longer 0: averages begin anew, at the current codes
    sweeps: Tensor  # any weight may be due for freezing, not only those that change
    rescale: Tensor  # float32: 1, or what brings the growth back to 1
    growth: Tensor  # float64: (1 - m)^-t
    increment: Tensor  # float32: m * (1 - m)^-t
    previous_growth: Tensor  # float32: (1 - m)^-(t - 1)
    decay: Tensor  # float32: (1 - m)^t
    previous_decay: Tensor  # float64: (1 - m)^(t - 1)


def moment(step: Tensor, clock: Tensor, momentum: float, threshold: Tensor) -> Moment:
    """What a step means for the state of a tensor: step [1], clock [3], threshold float32 [1]."""
    growth, tracked, previous_threshold = clock.unbind()
    limit = threshold[0].double()
    elapsed = step[0] - tracked.long()
    first = tracked < 0
    passed = power(1.0 / (1.0 - momentum), elapsed.clamp(min=0))
    now = torch.where(first, 1.0, growth * passed)
    too_large = now > LARGEST_GROWTH
    rescale = torch.where(too_large, 1.0 / now, 1.0)
    now = torch.where(too_large, 1.0, now)
    activates = (limit > 0) & (previous_threshold <= 0)
    falls = (limit > 0) & (limit * passed < previous_threshold)  # faster than a frequency decays
    before = now * (1.0 - momentum)
    return Moment(
        acts=elapsed != 0,  # a step that was set back begins where it is
        first=first,
        activates=activates,
        sweeps=too_large | activates | falls,
        rescale=rescale.float(),
        growth=now,
        increment=(momentum * now).float(),
        previous_growth=before.float(),
        decay=(1.0 / now).float(),
        previous_decay=1.0 / before,
    )


def power(base: float, exponent: Tensor) -> Tensor:
    """base^exponent by repeated squaring, float64: the same multiplications on every backend, and no pow."""
    result = torch.ones((), dtype=torch.float64, device=exponent.device)
    for bit in range(31):
        result = torch.where((exponent >> bit) & 1 != 0, result * base, result)
        base = min(base * base, 1e300)
    return result


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
    state_words,
    frequencies,
    averages,
    counts,
    clocks,
    ys,
):
    """y = value(level), with the frozen level of frozen weights; then the state moves on."""
    for i, x in enumerate(xs):
        grid = grid_at(i, x, scales, zero_points, offsets, qranges, axes, eps)
        r = reference.shifted(x, grid) / grid.scale
        if tensor_ids[i] >= 0:
            r = drawn(r, seeds[i], steps[i], tensor_ids[i])
        level = reference.level(r, grid)
        if momenta[i]:
            state = (state_words[i], frequencies[i], averages[i], counts[i], clocks[i])
            rule = (momenta[i], bool(use_average[i]), thresholds[i])
            level = track(level, grid, state, *rule, steps[i], advance, qranges[i])
        ys[i].copy_(reference.value(level, grid))


def track(level, grid, state, momentum, use_average, threshold, step, advance, qrange):
    """Levels with frozen weights at theirs; records what has changed, where `advance` says so.

    level: float32, NaN where x is; state: the five tensors of the schema.
    Source: Nagel et al., ICML 2022, Algorithm 1, between two changes of a code in closed form.
    """
    state_words, frequency, average, counts, clock = state
    word = words.unpacked(state_words)
    at = moment(step, clock, momentum, threshold)
    nan = level.isnan()
    lowest = grid.low.expand_as(level)
    now = (torch.where(nan, lowest.clamp(min=0.0).minimum(grid.high), level) - lowest).to(torch.int32)
    held = (word.settled | (word.pending & at.acts)) & ~at.first
    index = torch.where(held, word.index, now)
    if advance:
        record(index, word, held, nan, at, use_average, threshold, state, qrange)
        moved = at.acts | at.first
        clock.copy_(torch.where(moved, torch.stack([at.growth, step[0].double(), threshold[0].double()]), clock))
    return torch.where(held & ~nan, lowest + index, level)


def record(index, word, held, nan, at, use_average, threshold, state, qrange):
    """One step of the state. index: int32, code - qmin in this step; held: at a frozen code.

    A weight that is frozen here has its own code until the next step, where the frozen one, which its word has already,
    is a change against it; the own one stands in the place of the average.
    """
    state_words, frequency, average, counts, clock = state
    free = ~word.frozen
    last = torch.where(word.pending, average, word.index.float())
    changed = (index != last) & ~nan & ~word.settled
    way = torch.where(index > last, words.UP, words.DOWN)
    oscillates = changed & (word.direction != words.NONE) & (way != word.direction)

    rescaled = frequency * at.rescale
    f = torch.where(oscillates, rescaled + at.increment, rescaled)
    a = torch.where(free, average * at.rescale, average)
    mean = frozen_index(word.index, a.double() * at.previous_decay, qrange)
    frozen = torch.where(at.activates, index, mean) if use_average else index
    limit = threshold[0]  # 0-dim: a weight of one number may have no dimension either
    due = (changed | at.sweeps) & (limit > 0) & (f * at.decay > limit)
    freezes = due & free & ~nan
    moved = torch.where(changed, a + (word.index - index).float() * at.previous_growth, a)
    moved = torch.where(at.activates, 0.0, moved)
    a = torch.where(freezes, index.float(), torch.where(free, moved, a))

    direction = torch.where(held & ~nan, words.NONE, torch.where(changed, way, word.direction))
    new_index = torch.where(nan, word.index, torch.where(freezes, frozen, index))
    new_words = words.packed(new_index, direction, word.frozen | freezes, state_words.dtype)
    events = torch.stack([changed.sum(), oscillates.sum(), freezes.sum(), changed.sum()])
    counts = counts[:4]  # the fifth is the caller's own
    kept = counts * counts.new_tensor([1, 1, 1, 0])

    first_words = words.packed(index, torch.zeros_like(index), torch.zeros_like(free), state_words.dtype)
    for tensor, later, begin in (
        (state_words, new_words, first_words),
        (frequency, f, torch.zeros_like(f)),
        (average, a, torch.zeros_like(a)),
        (counts, kept + events, torch.zeros_like(counts)),
    ):
        tensor.copy_(torch.where(at.first, begin, torch.where(at.acts, later, tensor)))


def frozen_index(index, deviation, qrange):
    """The index of the code nearest to an average, of two the even code; no average, were it NaN, leaves the grid.

    index: int32; deviation: float64, beside which a float32 code of 200 would keep no more than 2^-16.
    """
    low, high = qrange.double()
    mean = low + index + deviation
    mean = torch.where(mean > low, mean, low)
    mean = torch.where(mean < high, mean, high)
    return (mean.round() - low).to(torch.int32)


def multi_tensor_fake_quantize_backward(
    gs,
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
    rounded_masks,
    lsq_grad_scales,
    estimators,
    strengths,
    dampenings,
    state_words,
    dxs,
    dscales,
    dshifts,
):
    """dx = g * E inside; dscale = sum g * (level - inside * E * r); the shifts as in fake_quantize_backward.

    A frozen weight passes nothing to x, and g * level to the scale.
    """
    for i, (g, x) in enumerate(zip(gs, xs, strict=True)):
        grid = grid_at(i, x, scales, zero_points, offsets, qranges, axes, eps)
        t = reference.shifted(x, grid)
        r = t / grid.scale
        rounded = drawn(r, seeds[i], steps[i], tensor_ids[i]) if estimators[i] == STOCHASTIC else r.round()
        tested = rounded if rounded_masks[i] else r
        mask = (tested >= grid.low) & (tested <= grid.high)
        level = rounded.clamp(grid.low, grid.high)
        free = torch.ones_like(mask)
        if state_words[i].numel():
            word = words.unpacked(state_words[i])
            level = torch.where(word.settled & ~r.isnan(), grid.low + word.index, level)
            free = ~word.settled
            mask = mask & free
        factor = slope_factor(estimators[i], g.float(), r, grid, strengths[i])
        dx = torch.where(mask, g.float() * factor, 0.0)
        exact = level.double() * grid.scale.double()
        if dampenings[i].numel():
            in_range = free & (t >= grid.scale * grid.low) & (t <= grid.scale * grid.high) & (dampenings[i][0] != 0)
            dx = dx + torch.where(in_range, dampenings[i][0] * (t.double() - exact).float(), 0.0)
        dxs[i].copy_(dx)
        if dscales[i].numel():
            within = exact if estimators[i] == PACT else factor.double() * t.double()
            slope = (exact - torch.where(mask, within, 0.0)) / grid.scale.double()
            sums(i, g, x, grid, slope, mask, axis_of(axes[i]), lsq_grad_scales[i], qranges, dscales, dshifts)


def slope_factor(estimator: int, g: Tensor, r: Tensor, grid: Grid, strength: Tensor) -> Tensor:
    """E of an estimator, float32 like r."""
    f = r - r.round()
    if estimator == EWGS:
        return 1.0 + strength[0] * g.sign() * f
    if estimator == SIGMOID:
        k = strength[0].double()
        return (0.5 * k / torch.tanh(0.5 * k) / torch.cosh(k * (0.5 - f.double().abs())).square()).float()
    if estimator == PSG:
        return strength[0] * (f.abs() * grid.scale)
    return torch.ones_like(r)


def sums(i, g, x, grid, slope, mask, axis, lsq, qranges, dscales, dshifts):
    """Write dscale and dshift of the i-th tensor."""
    g, nan = g.double(), x.isnan()
    factor = reference.lsq_factor(x, dscales[i], qranges[i]) if lsq else 1.0
    dscales[i].copy_(reference.ordered_sum(torch.where(nan, 0.0, g * slope), axis) * factor)
    if dshifts[i].numel():
        outside = reference.ordered_sum(torch.where(nan | mask, 0.0, g), axis)
        scale = grid.scale.double().reshape(-1)
        dshifts[i].copy_((outside if grid.offset is not None else -scale * outside) * factor)
