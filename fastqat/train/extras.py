"""Packages that only the trainer needs: imported when used, so that the bare package depends on torch and numpy."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str = "train") -> Any:
    """Import a module of an extra of the package.

    Args:
        module: dotted name, such as ``"rich.table"``.
        extra: the extra that installs it.

    Raises:
        ImportError: it cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"training needs {module}: pip install 'fastqat[{extra}]' ({error})") from error
