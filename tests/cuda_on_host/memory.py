"""Memory that shows what a kernel does beside its data: tensors next to pages that nobody may touch, and poison."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

PROT_NONE = 0
M_PERTURB = -6  # of glibc's mallopt: the complement of this byte fills what malloc gives
_libc = ctypes.CDLL(None, use_errno=True)


def at_the_edge(t: Tensor, *, end: bool) -> Tensor:
    """A copy of a tensor, with its strides, that begins or ends where its memory does: one byte beyond is a fault.

    Args:
        t: any tensor whose elements lie within its own memory.
        end: whether it ends at the edge, and then begins wherever that makes it; else it begins there.
    """
    if not t.numel():
        return t
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    size, page = span * t.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + (pages + 1) * page):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * page - size if end else page
    flat = torch.frombuffer(memory, dtype=t.dtype, count=span, offset=offset)
    return flat.copy_(t.as_strided((span,), (1,), t.storage_offset())).as_strided(t.shape, t.stride())


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill all new memory with ones, which is NaN, as far as the C library can do that."""
    perturb = getattr(_libc, "mallopt", None)
    if perturb:
        perturb(M_PERTURB, 0x100)  # not 0, which would switch it off, and 0 as a byte
    try:
        yield
    finally:
        if perturb:
            perturb(M_PERTURB, 0)
