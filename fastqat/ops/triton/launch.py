"""How every kernel is launched: on the device and stream of its tensors, without contraction."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fixed when the kernels are decorated; a Python bool, and the same as a constant for kernels.
interpreted = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(interpreted)

WARPS = 4


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Inf and NaN are data here: no warnings from the interpreter, which computes with numpy."""
    if not interpreted:
        return contextlib.nullcontext()
    import numpy

    return numpy.errstate(all="ignore")


def launch(kernel, programs: int, tensor: Tensor, *arguments: object, planes: int = 1, **constants: object) -> None:
    """Run ``programs`` x ``planes`` programs of a kernel on the device of its first argument, ``tensor``.

    The first dimension of a CUDA grid takes 2^31 - 1 programs, the second 65535.
    """
    with torch.cuda.device_of(tensor), _quiet():
        kernel[(programs, planes)](tensor, *arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()
