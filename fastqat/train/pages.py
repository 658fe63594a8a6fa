"""Memory pages of a process that trains on a CPU: kept when tensors are freed, and large ones."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_KEPT = 32 << 20  # bytes of a block; glibc takes no more
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch asks Linux for them, for tensors of 2 MB and more
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_pages() -> None:
    """Have the C library keep the pages of freed tensors, and torch lay tensors on huge pages.

    Otherwise glibc hands the pages of a large tensor back, and the next step waits for the kernel to fill new ones with
    zeros; and small pages make a pass over memory wait for address translation, in virtual machines above all. For the
    whole process, so this is for who owns it. What the environment says goes before. Elsewhere than on Linux with
    glibc it does nothing.
    """
    os.environ.setdefault(HUGE_PAGES, "1")  # read by torch when it allocates for the first time
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(name in os.environ for name in OWN_SETTINGS):
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, 1 << 30)
