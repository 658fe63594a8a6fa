"""The definition of the ops on one tensor with one scale, in plain torch: see :mod:`fastqat.ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastqat.ops import reference
from fastqat.ops.grids import grid_from_range, moving_average
from fastqat.ops.multi_tensor import drawn


def in_memory_order(x: Tensor) -> Tensor:
    """A dense tensor as a vector of its elements as they lie in memory: a view."""
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d]), reverse=True)
    return x.permute(order).view(-1)


def dense(x: Tensor) -> Tensor:
    """x with the strides of ``torch.empty_like(x)``, which are dense."""
    copy = torch.empty_like(x)
    return x if copy.stride() == x.stride() else copy.copy_(x)


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
    """y = value(level(clipped(x))), and what its elements say in memory order: see the schema."""
    like = dense(x)
    x = in_memory_order(like)
    passes = reference.passes_clip(x, clip)
    x = reference.clipped(x, clip)
    if low.numel():
        smallest, largest = torch.empty_like(low), torch.empty_like(high)
        reference.minmax(x, None, smallest, largest)
        low.copy_(torch.minimum(low, smallest))
        high.copy_(torch.maximum(high, largest))
    if beyond.numel():
        beyond.add_((x.float().abs() > limit).sum())
    grid = reference.grid_of(x, scale, zero_point, offset, qrange, None, eps)
    r = reference.shifted(x, grid) / grid.scale
    tested = r
    if tensor_id >= 0:
        r = drawn(r, seed, step, tensor_id)
    if rounded_mask:
        tested = r.round()
    if inside.numel():
        _write_bits(inside, passes & (tested >= grid.low) & (tested <= grid.high))
    if above.numel():
        _write_bits(above, tested > grid.high)
    level = reference.level(r, grid)
    if codes.numel():
        known = torch.where(level.isnan(), torch.zeros_like(level).clamp(grid.low, grid.high), level)
        reference.pack((known + grid.zero).int(), code_bits, codes)
    if y.numel():
        result = torch.empty_like(like, dtype=y.dtype)
        in_memory_order(result).copy_(reference.value(level, grid))
        y.copy_(result)


def _write_bits(bits: Tensor, values: Tensor) -> None:
    """Bit i % 8 of byte i // 8 is the i-th value. values: bool [n]; bits: uint8 [ceil(n / 8)]."""
    reference.pack(values.int(), 1, bits)


def _read_bits(bits: Tensor, numel: int) -> Tensor:
    values = torch.empty(numel, dtype=torch.uint8, device=bits.device)
    reference.unpack(bits, 1, numel, False, values)
    return values.bool()


def fake_quantize_tensor_backward(g, inside, above, qrange, dx, dscale):
    """dx = g inside, 0 outside; dscale = qmax * sum of g above."""
    laid_out = torch.empty_like(dx, dtype=g.dtype)
    laid_out.copy_(g)
    g = in_memory_order(laid_out)
    if dx.numel():
        in_memory_order(dx).copy_(torch.where(_read_bits(inside, g.numel()), g.float(), 0.0))
    if dscale.numel():
        total = reference.ordered_sum(torch.where(_read_bits(above, g.numel()), g.double(), 0.0), None)
        dscale.copy_(total * qrange[1].double())


def dequantize_tensor(codes, scale, zero_point, offset, qrange, eps, code_bits, y):
    """y = value(code - zero)."""
    if y.numel() == 0:
        return
    values = torch.empty(y.numel(), dtype=torch.int32, device=y.device)
    reference.unpack(codes, code_bits, y.numel(), False, values)
    values = torch.where((qrange[0] < 0) & (values >= 2 ** (code_bits - 1)), values - 2**code_bits, values)
    grid = reference.grid_of(values, scale, zero_point, offset, qrange, None, eps)
    in_memory_order(y).copy_(reference.value(values.float() - grid.zero, grid))


def _choose(condition: Tensor, kept: Tensor, new: Tensor | float | int) -> None:
    kept.copy_(torch.where(condition, new, kept))


def _is_new(step: Tensor, observed_step: Tensor, always: bool) -> Tensor:
    return (step != observed_step) | always


def advance_range(qrange, step, always, momentum, low, high, new_low, new_high, observed_step, scale, zero_point):
    """The moving average of the range takes in what was seen since, once per step; then the grid of it."""
    fresh = _is_new(step, observed_step, always)
    for kept, seen, nothing in ((low, new_low, torch.inf), (high, new_high, -torch.inf)):
        _choose(fresh, kept, moving_average(kept, seen, momentum))
        _choose(fresh, seen, nothing)
    observed_step.copy_(step)
    qmin, qmax = qrange.unbind()
    new_scale, new_zero_point = grid_from_range(low, high, qmin, qmax, zero_point.numel() == 0)
    scale.copy_(new_scale)
    if zero_point.numel():
        zero_point.copy_(new_zero_point)


def advance_interval(
    low,
    high,
    qrange,
    step,
    always,
    numel,
    alpha,
    stride,
    smallest,
    gamma,
    beyond,
    seen,
    observed_step,
    limit,
    scale,
):
    """gamma moves by at most one stride per step, towards its fraction of elements beyond; then the interval of g."""
    fresh, qmax = _is_new(step, observed_step, always), qrange[1].double()
    excess = beyond.double() * (2 * qmax + 1) - alpha * seen.double()
    moved = (gamma + stride * excess.sign().float()).clamp(smallest, 1.0)
    _choose(fresh & (seen > 0), gamma, moved)
    _choose(fresh, beyond, 0)
    _choose(fresh, seen, 0)
    observed_step.copy_(step)
    largest = torch.maximum(-low, high)
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 0.0)
    seen.add_(torch.where(largest > 0, numel, 0))
    limit.copy_(gamma * largest)
    scale.copy_(limit / qmax.float())
