"""The definition of every op in plain torch: slow, on any device, and the oracle of all other backends.

Each function computes in float32 from the stored values, rounds once to the dtype of the result, and writes into
the result tensors it is given last (see :mod:`fastqat.ops.schema` for shapes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """A quantization grid broadcast against x: float32, shape [1, .., C, .., 1]."""

    scale: Tensor
    zero: Tensor  # the integer zero point; 0 on the offset grid
    low: Tensor  # qmin - zero: the lowest level
    high: Tensor  # qmax - zero
    offset: Tensor | None


def grid_of(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    qrange: Tensor,
    axis: int | None,
    eps: float,
) -> Grid:
    """Clamp and round the grid's parameters and give them the shape that broadcasts against x.

    A zero point that is NaN makes the scale NaN: all values are, as where the scale itself is.
    """
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = x.shape[axis]
    qmin, qmax = qrange.float().unbind()
    scale = torch.where(scale < eps, eps, scale).view(shape)  # a NaN scale stays one
    zero = torch.zeros_like(scale)
    if zero_point is not None:
        scale = torch.where(zero_point.isnan().view(shape), torch.nan, scale)
        zero = torch.where(zero_point.isnan(), 0.0, zero_point).round().clamp(qmin, qmax).view(shape)
    return Grid(scale, zero, qmin - zero, qmax - zero, None if offset is None else offset.view(shape))


def shifted(x: Tensor, grid: Grid) -> Tensor:
    """x in float32; x - o on the offset grid."""
    return x.float() if grid.offset is None else x.float() - grid.offset


def clipped(x: Tensor, clip: float) -> Tensor:
    """x clamped to [0, clip], in float32; clip 0: as it is. NaN stays NaN."""
    return x.float().clamp(0.0, clip) if clip else x


def passes_clip(x: Tensor, clip: float) -> Tensor:
    """Where the derivative of :func:`clipped` is 1: that of a ReLU is 0 at 0, that of a ReLU6 also at 6."""
    return (x > 0) & (x.float() < clip) if clip else torch.ones_like(x, dtype=torch.bool)


def level(r: Tensor, grid: Grid) -> Tensor:
    """Code relative to the zero point: clamp(rint(r), qmin - z, qmax - z), ties to even; NaN stays NaN."""
    return r.round().clamp(grid.low, grid.high)


def value(lev: Tensor, grid: Grid) -> Tensor:
    """s * level, or s * level + o with two roundings on the offset grid."""
    y = grid.scale * lev
    return y if grid.offset is None else y + grid.offset


def inside(r: Tensor, grid: Grid, rounded_mask: bool) -> Tensor:
    """Straight-through mask: low <= k <= high for k = rint(r) (rounded) or k = r (unrounded); False for NaN."""
    k = r.round() if rounded_mask else r
    return (k >= grid.low) & (k <= grid.high)


def rows_of(x: Tensor, axis: int | None) -> Tensor:
    """x as [C, -1] with a row per channel, or as [1, -1]; works for empty tensors too."""
    channels = 1 if axis is None else x.shape[axis]
    x = x if axis is None else x.movedim(axis, 0)
    return x.reshape(channels, x.numel() // max(channels, 1))


def ordered_sum(terms: Tensor, axis: int | None) -> Tensor:
    """Sum of terms over all dimensions but axis, as a tree of element-wise additions: the same bits on every run.

    terms: float64, any shape; result: float64 [C] or [1].
    """
    rows = rows_of(terms, axis)
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0])
    while rows.shape[1] > 1:
        half = (rows.shape[1] + 1) // 2
        head, tail = rows[:, :half].clone(), rows[:, half:]
        head[:, : tail.shape[1]] += tail
        rows = head
    return rows[:, 0]


def fake_quantize(x, scale, zero_point, offset, qrange, axis, eps, out_dtype, y):
    """y = value(level(x / s))."""
    grid = grid_of(x, scale, zero_point, offset, qrange, axis, eps)
    y.copy_(value(level(shifted(x, grid) / grid.scale, grid), grid))


def fake_quantize_backward_input(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, dx):
    """dx = g inside the mask, 0 elsewhere."""
    grid = grid_of(x, scale, zero_point, offset, qrange, axis, eps)
    dx.copy_(torch.where(inside(shifted(x, grid) / grid.scale, grid, rounded_mask), g.float(), 0.0))


def lsq_factor(x: Tensor, scale: Tensor, qrange: Tensor) -> Tensor:
    """1 / sqrt(N * max(qmax, 1)) with N elements of x to a scale (LSQ, section 2.2). float64, 0-dim."""
    count = max(x.numel() // max(scale.numel(), 1), 1)
    return (count * qrange[1].double().clamp(min=1)).rsqrt()


def fake_quantize_backward(
    g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, lsq_grad_scale, clip, dx, dscale, dshift
):
    """dx = g inside; dscale = sum g * (level - inside * r); dz = -s * sum outside g; do = sum outside g.

    A NaN in x adds to no sum. With lsq_grad_scale the sums are multiplied by 1 / sqrt(N * max(qmax, 1)), where N is
    the number of elements that share a scale (LSQ, section 2.2). x is clamped to [0, clip] first, and dx is 0 where
    that is flat.
    """
    grid = grid_of(x, scale, zero_point, offset, qrange, axis, eps)
    passes = passes_clip(x, clip)
    x = clipped(x, clip)
    t = shifted(x, grid)
    r = t / grid.scale
    mask = inside(r, grid, rounded_mask)
    dx.copy_(torch.where(mask & passes, g.float(), 0.0))

    s, g, nan = grid.scale.double(), g.double(), x.isnan()
    slope = level(r, grid).double() - torch.where(mask, t.double() / s, 0.0)
    factor = lsq_factor(x, scale, qrange) if lsq_grad_scale else 1.0
    dscale.copy_(ordered_sum(torch.where(nan, 0.0, g * slope), axis) * factor)
    if dshift.numel():
        outside = ordered_sum(torch.where(nan | mask, 0.0, g), axis)
        dshift.copy_((outside if offset is not None else -s.view(-1) * outside) * factor)


def quantize(x, scale, zero_point, offset, qrange, axis, eps, dtype, codes):
    """codes = clamp(rint(x / s) + z, qmin, qmax); the code of NaN is clamp(z)."""
    grid = grid_of(x, scale, zero_point, offset, qrange, axis, eps)
    r = shifted(x, grid) / grid.scale
    codes.copy_(level(torch.where(r.isnan(), 0.0, r), grid) + grid.zero)


def dequantize(codes, scale, zero_point, offset, qrange, axis, eps, dtype, y):
    """y = s * (codes - z), or s * codes + o."""
    grid = grid_of(codes, scale, zero_point, offset, qrange, axis, eps)
    y.copy_(value(codes.float() - grid.zero, grid))


def pack(codes, bits, packed):
    """Bit i of code k is bit k * bits + i of the stream; bit j of the stream is bit j % 8 of byte j // 8."""
    stream = (codes.reshape(-1, 1).to(torch.int64) >> torch.arange(bits, device=codes.device)) & 1  # [n, bits]
    stream = torch.nn.functional.pad(stream.reshape(-1), (0, packed.numel() * 8 - stream.numel()))
    packed.copy_((stream.view(-1, 8) << torch.arange(8, device=codes.device)).sum(1))


def unpack(packed, bits, numel, signed, codes):
    """Inverse of pack; the highest bit is the sign where signed."""
    stream = (packed.view(-1, 1).to(torch.int64) >> torch.arange(8, device=packed.device)) & 1
    weights = 1 << torch.arange(bits, device=packed.device)
    if signed:
        weights[-1] = -weights[-1]
    codes.copy_((stream.view(-1)[: numel * bits].view(numel, bits) * weights).sum(1))


def minmax(x, axis, low, high):
    """Extremes over the finite values."""
    rows = rows_of(x, axis).float()
    infinity = rows.new_full((rows.shape[0], 1), torch.inf)
    finite = rows.isfinite()
    low.copy_(torch.cat([torch.where(finite, rows, torch.inf), infinity], 1).amin(1))
    high.copy_(torch.cat([torch.where(finite, rows, -torch.inf), -infinity], 1).amax(1))


def range_search(x, scales, zero_points, qrange, axis, errors):
    """errors[k] = sum over finite x of (fake_quantize(x; scales[k], zero_points[k]) - x)^2, summed in float64."""
    finite = x.isfinite()
    values = torch.where(finite, x, 0).float()
    for k in range(scales.shape[0]):
        zero_point = None if zero_points is None else zero_points[k]
        grid = grid_of(x, scales[k], zero_point, None, qrange, axis, 0.0)
        residual = value(level(values / grid.scale, grid), grid) - values
        errors[k] = ordered_sum(torch.where(finite, residual, 0.0).double().square(), axis).float()


PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def philox_uniform(step, seed, tensor_id, numel, u):
    """Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (element // 4 low, high, step, tensor_id)."""
    low32 = 0xFFFFFFFF
    block = torch.arange((numel + 3) // 4, device=u.device)
    c0, c1 = block & low32, block >> 32
    c2, c3 = step.expand_as(block) & low32, torch.full_like(block, tensor_id & low32)
    key0, key1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]  # 64-bit products; wrapping keeps their bits
        c0, c1, c2, c3 = ((p1 >> 32) & low32) ^ c1 ^ key0, p1 & low32, ((p0 >> 32) & low32) ^ c3 ^ key1, p0 & low32
        key0, key1 = (key0 + PHILOX_W[0]) & low32, (key1 + PHILOX_W[1]) & low32
    bits = torch.stack([c0, c1, c2, c3], 1).view(-1)[:numel]
    u.copy_((bits >> 8).float() * 2.0**-24)
