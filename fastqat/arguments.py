"""Checks of the arguments of :mod:`fastqat.functional`, and what they come to in the terms of the kernels.

What depends on shapes, dtypes, devices and options alone is checked once for each kind of call, and remembered.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastqat.autograd import CLIPS, Options, lsq_or_factor
from fastqat.ops import checks

# Scales of a caller who gives no eps are used as they are; this floor keeps the kernels safe where values are not read.
SMALLEST_SCALE = 2.0**-126


def _is_traced() -> bool:
    """Whether tensors may be fake or traced ones, which must not be kept."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


@functools.lru_cache(maxsize=None, typed=True)  # typed: True is not 1
@torch.inference_mode(False)  # autograd cannot save a tensor that inference made
def _cached_qrange(qmin: int, qmax: int, device: torch.device) -> Tensor:
    checks.code_range(qmin, qmax)
    return torch.tensor([qmin, qmax], dtype=torch.int32, device=device)


def qrange_tensor(qmin: int, qmax: int, device: torch.device) -> Tensor:
    """qmin and qmax as the int32 tensor [2] that the ops take; one per device, made once."""
    if _is_traced():
        checks.code_range(qmin, qmax)
        return torch.tensor([qmin, qmax], dtype=torch.int32, device=device)
    try:
        return _cached_qrange(qmin, qmax, device)
    except TypeError:  # that of an unhashable bound does not name it
        checks.code_range(qmin, qmax)
        raise


def checked_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    axis: int | None,
    group_size: int | None,
    eps: float | None,
) -> tuple[int | None, float]:
    """Check a grid against x; return the normalized axis and eps."""
    checked = _checked_but_for_values(x, scale, zero_point, offset, axis, group_size, eps)
    if eps is None:
        check_positive("scale", scale)
    return checked


def _checked_but_for_values(x, scale, zero_point, offset, axis, group_size, eps) -> tuple[int | None, float]:
    axis = checks.normalized_axis(x, axis)
    shape = checks.scale_shape(x, axis, group_size)
    check_scale("scale", scale, x, shape)
    checks.parameter("zero_point", zero_point, x, shape)
    checks.parameter("offset", offset, x, shape)
    if zero_point is not None and offset is not None:
        checks.fail(ValueError, "zero_point, offset", "at most one of them", "both")
    if eps is None:
        return axis, SMALLEST_SCALE
    check_number("eps", eps)
    if not eps > 0:
        checks.fail(ValueError, "eps", "a positive number", eps)
    return axis, float(eps)


@functools.lru_cache(maxsize=4096, typed=True)  # typed: True is not 1
def _memory(*call: Any) -> list[Options]:
    """Where to keep what the checks of a call have come to; new, and empty, for a call that was not seen before."""
    return []


def _described(p: Tensor | None) -> tuple[Any, ...] | None:
    return None if p is None else (p.dtype, p.shape, p.device)


def checked_options(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, offset: Tensor | None, asked: tuple[Any, ...]
) -> Options:
    """Check a call of fake_quantize; what it asks for, in the terms of the kernels.

    Only values of the scale are left unchecked. All else follows from shapes, dtypes, devices and options, and is
    checked once: in training the same call comes again in every step, when the caches are full of tensors and each
    Python function that it runs through costs a microsecond or two.
    """
    memory = []
    if isinstance(x, Tensor) and isinstance(scale, Tensor) and not _is_traced():
        try:
            memory = _memory(
                x.dtype,
                x.shape,
                x.device,
                scale.dtype,
                scale.shape,
                scale.device,
                _described(zero_point),
                _described(offset),
                *asked,
            )
        except (AttributeError, TypeError):  # neither a tensor nor None, or not hashable: the checks say what it is
            pass
    if not memory:
        memory.append(_check_options(x, scale, zero_point, offset, *asked))
    return memory[0]


def _check_options(
    x, scale, zero_point, offset, qmin, qmax, axis, group_size, eps, ste_mask, grad_scale, out_dtype, activation
) -> Options:
    checks.float_tensor("x", x)
    axis, eps = _checked_but_for_values(x, scale, zero_point, offset, axis, group_size, eps)
    checks.choice("ste_mask", ste_mask, ("rounded", "unrounded"))
    if isinstance(grad_scale, str):
        checks.choice("grad_scale", grad_scale, ("lsq",))
    elif grad_scale is not None:
        check_number("grad_scale", grad_scale)
    if out_dtype is not None:
        checks.choice("out_dtype", out_dtype, checks.FLOAT_DTYPES)
    checks.choice("activation", activation, tuple(CLIPS))
    qrange, rounded, clip = qrange_tensor(qmin, qmax, x.device), ste_mask == "rounded", CLIPS[activation]
    return Options(qrange, axis, group_size, eps, rounded, *lsq_or_factor(grad_scale), clip, out_dtype)


def check_scale(name: str, scale: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check that there is a scale, of this shape."""
    if not isinstance(scale, Tensor):
        checks.fail(TypeError, name, "a float32 tensor", type(scale).__name__)
    checks.parameter(name, scale, x, shape)


def check_positive(name: str, scale: Tensor) -> None:
    """Check the values of a scale where that needs no copy from a device."""
    if scale.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_wrapped(scale):
        checks.positive(name, scale)


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        checks.fail(TypeError, name, "a number", repr(value))


def _is_wrapped(t: Tensor) -> bool:
    """True for tensors of torch.func transforms and for fake tensors, whose values cannot be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or type(t) not in (Tensor, torch.nn.Parameter)
