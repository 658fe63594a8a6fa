"""The ops in Triton: on NVIDIA GPUs, and on CPU tensors where TRITON_INTERPRET=1 is set.

Importing this package neither imports Triton nor compiles; the kernels are loaded when the first op is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

# Module of each op. A function of the same name replaces the module as an attribute of this package.
_MODULES = {
    "fake_quantize": "fake_quantize",
    "fake_quantize_backward": "fake_quantize_backward",
    "fake_quantize_backward_input": "fake_quantize_backward",
    "quantize": "quantize",
    "dequantize": "quantize",
    "pack": "pack",
    "unpack": "pack",
    "minmax": "minmax",
    "range_search": "range_search",
    "philox_uniform": "philox",
    "multi_tensor_fake_quantize": "multi_tensor_fake_quantize",
    "multi_tensor_fake_quantize_backward": "multi_tensor_fake_quantize_backward",
    "fake_quantize_tensor": "fake_quantize_tensor",
    "fake_quantize_tensor_backward": "fake_quantize_tensor",
    "dequantize_tensor": "dequantize_tensor",
    "advance_range": "advance",
    "advance_interval": "advance",
    "fake_quantize_two_widths": "two_widths",
    "dorefa_fake_quantize": "two_widths",
    "dorefa_fake_quantize_backward": "two_widths",
}


def why_not() -> str | None:
    """None if Triton kernels run here, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if not interpreted and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def __getattr__(name: str) -> Callable[..., None]:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    functions = {op: getattr(importlib.import_module(f"{__name__}.{module}"), op) for op, module in _MODULES.items()}
    globals().update(functions)
    return functions[name]
