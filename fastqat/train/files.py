"""Files that are complete or absent: written beside their place, brought to the disk, then moved there."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write a file, or replace it. Whatever happens meanwhile, there is the old one or the new one, and no other.

    Args:
        path: of the file; its folder exists.
        content: all of it.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, has to outlive a loss of power
    finally:
        os.close(folder)
