"""The functions that users call on tensors.

A call checks its arguments once and hands over to the kernel (:mod:`fastqat.ops.schema`), through
:mod:`fastqat.autograd` where there is a gradient. Everything here is stateless: it works under ``torch.func``
transforms, ``torch.compile`` and export.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastqat.arguments import (
    check_number,
    check_positive,
    check_scale,
    checked_grid,
    checked_options,
    qrange_tensor,
)
from fastqat.autograd import activated, apply_fake_quantize, as_rows, flat, from_rows, needs_grad
from fastqat.ops import checks

_ops = torch.ops.fastqat


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    offset: Tensor | None = None,
    ste_mask: str = "rounded",
    grad_scale: float | str | None = None,
    eps: float | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize-dequantize x in one pass, with straight-through gradients for x, scale, zero_point and offset.

    Zero-point grid::  c = clamp(rint(x / s) + z, qmin, qmax);  y = s * (c - z)
    Offset grid::      c = clamp(rint((x - o) / s), qmin, qmax);  y = s * c + o

    with s = max(scale, eps), z = clamp(rint(zero_point), qmin, qmax), ties to even, everything in float32, one rounding
    to the dtype of the result. NaN gives NaN, and no gradient.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        scale: float32; [1] per tensor, [C] per channel with C = x.shape[axis], or [C, groups] with group_size.
        zero_point: float32 like scale, need not be an integer; None is 0.
        qmin, qmax: lowest and highest code, at most 256 codes within [-128, 255].
        axis: the channel dimension; None is per tensor.
        group_size: elements that share a scale, counted along all other dimensions flattened.
        offset: float32 like scale; selects the offset grid (LSQ+). Excludes zero_point.
        ste_mask: which x pass their gradient: "rounded", where qmin <= rint(x/s) + z <= qmax, or "unrounded", where
            qmin <= x/s + z <= qmax.
        grad_scale: factor on the gradients of scale, zero_point and offset; "lsq" is 1 / sqrt(N * max(qmax, 1)) with
            N elements to a scale.
        eps: floor of the scale, with a straight-through gradient. None asks for a positive scale, which is checked
            where that needs no copy from a device.
        out_dtype: floating dtype of the result; None is that of x.
        activation: "relu" or "relu6" of x comes first, in the same pass where the scale is one of the whole tensor.
        out: tensor to write into, instead of a new one; takes no part in autograd.

    Returns:
        Tensor of the shape of x, with the strides of ``torch.empty_like(x)``.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.

    Source: White Paper on Neural Network Quantization (2106.08295), section 2; LSQ (1902.08153); LSQ+ (2004.09576).
    """
    asked = (qmin, qmax, axis, group_size, eps, ste_mask, grad_scale, out_dtype, activation)
    options = checked_options(x, scale, zero_point, offset, asked)
    if eps is None:
        check_positive("scale", scale)
    if out is not None:
        checks.float_tensor("out", out)
        return _into(
            out,
            _ops.fake_quantize_out,
            activated(x, options.clip),
            scale,
            zero_point,
            offset,
            options.qrange,
            options.axis,
            group_size,
            options.eps,
            out.dtype,
        )
    return apply_fake_quantize(x, scale, zero_point, offset, options)


def _into(
    out: Tensor,
    op: Any,
    x: Tensor,
    scale: Any,
    zero_point: Any,
    offset: Any,
    qrange: Tensor,
    axis: Any,
    group_size: Any,
    eps: float,
    dtype: Any,
) -> Tensor:
    """Run the out form of an op on a grid, and return out."""
    if out.shape != x.shape or out.device != x.device:
        checks.fail(ValueError, "out", f"shape {list(x.shape)} on {x.device}", f"{list(out.shape)} on {out.device}")
    if torch.is_grad_enabled() and needs_grad(x, scale, zero_point, offset):
        checks.fail(ValueError, "out", "no argument that requires a gradient (use torch.no_grad())", "one that does")
    if group_size is None:
        op(x, scale, zero_point, offset, qrange, axis, eps, dtype, out)
        return out
    rows, row_axis = as_rows(x, axis, group_size)
    out_rows, _ = as_rows(out, axis, group_size)
    op(rows, flat(scale), flat(zero_point), flat(offset), qrange, row_axis, eps, dtype, out_rows)
    if out_rows.data_ptr() != out.data_ptr():
        out.copy_(from_rows(out_rows, out, axis, group_size))
    return out


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    offset: Tensor | None = None,
    eps: float | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Integer codes clamp(rint(x / s) + z, qmin, qmax) of x; the code of NaN is z.

    Args:
        x, scale, zero_point, qmin, qmax, axis, group_size, offset, eps: as for :func:`fake_quantize`.
        dtype: int8, uint8 or int32; None is int8 where qmin < 0, else uint8.
        out: tensor of such a dtype to write into.

    Returns:
        Codes of the shape of x. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """
    checks.float_tensor("x", x)
    axis, eps = checked_grid(x, scale, zero_point, offset, axis, group_size, eps)
    qrange = qrange_tensor(qmin, qmax, x.device)
    if out is not None:
        checks.code_tensor("out", out)
        dtype = out.dtype
    dtype = dtype or (torch.int8 if qmin < 0 else torch.uint8)
    checks.choice("dtype", dtype, checks.CODE_DTYPES)
    lowest, highest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if qmin < lowest or qmax > highest:
        checks.fail(ValueError, "dtype", f"one that holds {qmin} to {qmax}", dtype)
    with torch.no_grad():
        if out is not None:
            return _into(out, _ops.quantize_out, x, scale, zero_point, offset, qrange, axis, group_size, eps, dtype)
        rows, row_axis = as_rows(x, axis, group_size)
        codes = _ops.quantize(rows, flat(scale), flat(zero_point), flat(offset), qrange, row_axis, eps, dtype)
        return from_rows(codes, x, axis, group_size)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    axis: int | None = None,
    group_size: int | None = None,
    offset: Tensor | None = None,
    eps: float | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Values s * (codes - z), or s * codes + o, of integer codes.

    Args:
        codes: int8, uint8 or int32.
        scale, zero_point, axis, group_size, offset, eps: as for :func:`fake_quantize`.
        qmin, qmax: the range that the zero point is clamped to; needed only where there is one.
        dtype: floating dtype of the result.
        out: tensor of such a dtype to write into.

    Returns:
        Values of the shape of codes. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """
    checks.code_tensor("codes", codes)
    axis, eps = checked_grid(codes, scale, zero_point, offset, axis, group_size, eps)
    qrange = qrange_tensor(qmin, qmax, codes.device)
    if out is not None:
        checks.float_tensor("out", out)
        dtype = out.dtype
    checks.choice("dtype", dtype, checks.FLOAT_DTYPES)
    with torch.no_grad():
        if out is not None:
            return _into(
                out, _ops.dequantize_out, codes, scale, zero_point, offset, qrange, axis, group_size, eps, dtype
            )
        rows, row_axis = as_rows(codes, axis, group_size)
        y = _ops.dequantize(rows, flat(scale), flat(zero_point), flat(offset), qrange, row_axis, eps, dtype)
        return from_rows(y, codes, axis, group_size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit stream of the low `bits` bits of each code; the first code takes the lowest bits of the first byte.

    Args:
        codes: int8, uint8 or int32, any shape, taken in logical order.
        bits: 1 to 8.

    Returns:
        uint8 [ceil(codes.numel() * bits / 8)].

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """
    checks.code_tensor("codes", codes)
    checks.bit_width(bits)
    return _ops.pack(codes, bits)


def unpack(
    packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...] | list[int], *, signed: bool = True
) -> Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: uint8, as pack made it.
        bits: 1 to 8.
        shape: shape of the codes.
        signed: the highest bit of a code is its sign.

    Returns:
        Codes of that shape: int8 where signed, else uint8.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """
    checks.bit_width(bits)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        checks.fail(TypeError, "packed", "a uint8 tensor", getattr(packed, "dtype", type(packed).__name__))
    numel = torch.Size(shape).numel()
    if packed.numel() != (numel * bits + 7) // 8:
        wanted = f"{(numel * bits + 7) // 8} bytes for {numel} codes of {bits} bits"
        checks.fail(ValueError, "packed", wanted, f"{packed.numel()} bytes")
    return _ops.unpack(packed, bits, numel, signed).view(shape)


def minmax(x: Tensor, *, axis: int | None = None, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest finite value from one read of x.

    Args:
        x: float32, bfloat16 or float16.
        axis, group_size: as for :func:`fake_quantize`.

    Returns:
        Two float32 tensors of the shape of a scale; +inf and -inf where there is no finite value.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """
    checks.float_tensor("x", x)
    axis = checks.normalized_axis(x, axis)
    shape = checks.scale_shape(x, axis, group_size)
    with torch.no_grad():
        low, high = _ops.minmax(*as_rows(x, axis, group_size))
    return low.view(shape), high.view(shape)


def range_search(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Squared quantization errors of K candidate grids from one read of x: sum (fake_quantize(x) - x)^2.

    Values that are not finite do not count. At a tie either code may be used; both have the same error.

    Args:
        x: float32, bfloat16 or float16.
        scales: float32 [K, *scale], with the shape of a scale of x behind K; positive.
        zero_points: float32 like scales, or None.
        qmin, qmax, axis, group_size: as for :func:`fake_quantize`.

    Returns:
        float32 [K, *scale].

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.

    Source: White Paper on Neural Network Quantization (2106.08295), section 3.1, MSE ranges.
    """
    checks.float_tensor("x", x)
    axis = checks.normalized_axis(x, axis)
    shape = checks.scale_shape(x, axis, group_size)
    count = scales.shape[0] if isinstance(scales, Tensor) and scales.dim() else 1
    check_scale("scales", scales, x, (count, *shape))
    check_positive("scales", scales)
    checks.parameter("zero_points", zero_points, x, tuple(scales.shape))
    with torch.no_grad():
        rows, row_axis = as_rows(x, axis, group_size)
        errors = _ops.range_search(
            rows,
            scales.flatten(1).contiguous(),
            None if zero_points is None else zero_points.flatten(1).contiguous(),
            qrange_tensor(qmin, qmax, x.device),
            row_axis,
        )
    return errors.view(scales.shape)


def fake_quantize_two_widths(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    qmin: tuple[int, int],
    qmax: tuple[int, int],
    axis: int | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Quantize-dequantize x on two grids from one read of it, such as those of neighbouring bit-widths; no gradient.

    Args:
        x: float32, bfloat16 or float16.
        scales: float32 [2, *scale], with the shape of a scale of x behind the two; positive.
        zero_points: float32 like scales, or None.
        qmin, qmax: lowest and highest codes of both.
        axis, eps: as for :func:`fake_quantize`.

    Returns:
        Two tensors like x: what :func:`fake_quantize` gives on each grid.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """
    checks.float_tensor("x", x)
    axis = checks.normalized_axis(x, axis)
    check_scale("scales", scales, x, (2, *checks.scale_shape(x, axis, None)))
    check_positive("scales", scales)
    checks.parameter("zero_points", zero_points, x, tuple(scales.shape))
    check_number("eps", eps)
    for name, codes in (("qmin", qmin), ("qmax", qmax)):
        if not isinstance(codes, (tuple, list)) or len(codes) != 2:
            checks.fail(ValueError, name, "the codes of two grids", repr(codes))
    with torch.no_grad():
        qranges = torch.stack([qrange_tensor(low, high, x.device) for low, high in zip(qmin, qmax, strict=True)])
        first, second = torch.empty_like(x), torch.empty_like(x)
        both = [None if p is None else p.contiguous() for p in (scales, zero_points)]
        _ops.fake_quantize_two_widths(x, *both, None, qranges, axis, eps, first, second)
    return first, second


def philox_uniform(shape: torch.Size | tuple[int, ...], *, seed: int, step: Tensor, tensor_id: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, of the counter-based generator Philox4x32-10.

    Element i takes lane i % 4 of counter (i // 4 low, i // 4 high, step, tensor_id) under the key `seed`: the same
    arguments give the same bits on every backend, whatever else was drawn.

    Args:
        shape: of the result; elements are counted in row-major order.
        seed: 64-bit key.
        step: int64 [1]; its device is that of the result.
        tensor_id: 32-bit number that tells tensors of one step apart.

    Returns:
        float32 of the shape.

    Raises:
        TypeError: step is not int64.
        ValueError: step is not of shape [1].

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    if not isinstance(step, Tensor) or step.dtype != torch.int64:
        checks.fail(TypeError, "step", "an int64 tensor", getattr(step, "dtype", type(step).__name__))
    if step.shape != (1,):
        checks.fail(ValueError, "step", "shape [1]", list(step.shape))
    signed_seed = (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)
    return _ops.philox_uniform(step, signed_seed, tensor_id, torch.Size(shape).numel()).view(shape)
