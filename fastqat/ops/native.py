"""The compiled library ``fastqat._C`` (C++, CPU): loading it, and the reason where it cannot be loaded."""

from __future__ import annotations

import importlib
from pathlib import Path

# setup.py writes the reason here when the library could not be built.
BUILD_LOG = Path(__file__).resolve().parent.parent / "_C.not-built.txt"

_reason: str | None = "not loaded yet"


def load() -> None:
    """Import ``fastqat._C``, which registers its kernels with the dispatcher; never raises."""
    global _reason
    try:
        importlib.import_module("fastqat._C")
        _reason = None
    except ModuleNotFoundError:
        _reason = "the C++ library fastqat._C was not built"
        if BUILD_LOG.exists():
            _reason += f": {BUILD_LOG.read_text().strip()}"
    except ImportError as error:
        _reason = f"the C++ library fastqat._C cannot be loaded: {error}"


def why_not() -> str | None:
    """None if the CPU library runs, else the reason."""
    return _reason
