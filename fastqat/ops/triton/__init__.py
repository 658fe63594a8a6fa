"""The ops in Triton: on NVIDIA GPUs, and on CPU tensors where TRITON_INTERPRET=1 is set."""

from __future__ import annotations


def why_not() -> str | None:
    """None if Triton kernels run here, else the reason."""
    return "not written yet"
