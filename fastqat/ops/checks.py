"""Checks of the arguments that a user gives: each error names the argument, what was wanted and what came.

Only shapes, dtypes and devices are looked at; values are read where that needs no copy from a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODE_DTYPES = (torch.int8, torch.uint8, torch.int32)


def fail(kind: type[Exception], name: str, wanted: str, got: object) -> None:
    """Raise ``kind`` with the one form that all messages have."""
    raise kind(f"{name}: wanted {wanted}; got {got}")


def float_tensor(name: str, x: object) -> None:
    """Check that x is a tensor of a floating dtype that the kernels take."""
    if not isinstance(x, Tensor):
        fail(TypeError, name, "a tensor", type(x).__name__)
    elif x.dtype not in FLOAT_DTYPES:
        fail(TypeError, name, "float32, bfloat16 or float16", x.dtype)


def code_tensor(name: str, codes: object) -> None:
    """Check that codes is a tensor of an integer dtype that the kernels take."""
    if not isinstance(codes, Tensor):
        fail(TypeError, name, "a tensor of integer codes", type(codes).__name__)
    elif codes.dtype not in CODE_DTYPES:
        fail(TypeError, name, "int8, uint8 or int32", codes.dtype)


def normalized_axis(x: Tensor, axis: int | None) -> int | None:
    """The axis in [0, x.dim()), or None."""
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int):
        fail(TypeError, "axis", "None or an int", repr(axis))
    if not -x.dim() <= axis < x.dim():
        fail(ValueError, "axis", f"a dimension of a tensor of shape {list(x.shape)}", axis)
    return axis % x.dim()


def scale_shape(x: Tensor, axis: int | None, group_size: int | None) -> tuple[int, ...]:
    """Shape of the scale of x: [1], [C], or [C, groups]."""
    if axis is None:
        if group_size is not None:
            fail(ValueError, "group_size", "an axis beside it", f"group_size={group_size} with axis=None")
        return (1,)
    channels = x.shape[axis]
    if group_size is None:
        return (channels,)
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        fail(TypeError, "group_size", "None or an int", repr(group_size))
    length = x.numel() // channels if channels else 0
    if group_size < 1 or length % group_size:
        fail(
            ValueError,
            "group_size",
            f"a divisor of the {length} elements that a channel of shape {list(x.shape)}, axis {axis} has",
            group_size,
        )
    return channels, length // group_size


def parameter(name: str, p: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check a scale, zero point or offset against the tensor that it belongs to."""
    if p is None:
        return
    if not isinstance(p, Tensor):
        fail(TypeError, name, "a float32 tensor", type(p).__name__)
    if p.dtype != torch.float32:
        fail(TypeError, name, "float32", p.dtype)
    if p.shape != shape:
        fail(ValueError, name, f"shape {list(shape)} for a tensor of shape {list(x.shape)}", list(p.shape))
    if p.device != x.device:
        fail(ValueError, name, f"device {x.device}, where x is", p.device)


def positive(name: str, scale: Tensor) -> None:
    """Check the values of a scale: positive and finite. Reads the tensor back from its device."""
    scale = scale.detach()
    if scale.numel() == 0:
        return
    low, high = torch.aminmax(scale)  # one op, where comparing takes four; both are NaN if any value is
    if not (low.item() > 0 and high.item() < torch.inf):
        bad = ~((scale > 0) & (scale < torch.inf))
        fail(ValueError, name, "positive finite values", scale[bad][0].item())


def code_range(qmin: int, qmax: int) -> None:
    """Check that qmin and qmax are ints that span 1 to 8 bits."""
    for name, value in (("qmin", qmin), ("qmax", qmax)):
        if isinstance(value, bool) or not isinstance(value, int):
            fail(TypeError, name, "an int", repr(value))
    if not (qmin < qmax and qmax - qmin <= 255 and -128 <= qmin and qmax <= 255):
        fail(ValueError, "qmin, qmax", "qmin < qmax with at most 256 codes between -128 and 255", f"{qmin}, {qmax}")


def bit_width(bits: int, lowest: int = 1) -> None:
    """Check a number of bits."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        fail(TypeError, "bits", f"an int from {lowest} to 8", repr(bits))
    if not lowest <= bits <= 8:
        fail(ValueError, "bits", f"{lowest} to 8", bits)


def choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that an option is one of a few."""
    if value not in choices:
        fail(ValueError, name, "one of " + ", ".join(map(repr, choices)), repr(value))
