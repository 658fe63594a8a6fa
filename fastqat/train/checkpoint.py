"""Checkpoints of a run: all that it needs to go on as if it had never stopped.

A file is one line (format, length and SHA-256 of the rest), then safetensors whose metadata holds the rest as JSON.
Nothing in it is ever unpickled. The two newest are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastqat.train.extras import import_extra
from fastqat.train.files import write_file
from fastqat.train.weights import to_safetensors

MAGIC = b"fastqat-checkpoint"
FORMAT = b"1"
SUFFIX = ".checkpoint"
KEPT = 2
LONGEST_HEADER = 200  # bytes


class Snapshot(NamedTuple):
    """State of a run: what JSON can hold, and tensors by name."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def pack(snapshot: Snapshot) -> bytes:
    """Return the content of a checkpoint file."""
    body = to_safetensors(snapshot.tensors, {"facts": json.dumps(snapshot.facts)})
    return b"%s %s %d %s\n" % (MAGIC, FORMAT, len(body), hashlib.sha256(body).hexdigest().encode()) + body


def unpack(content: bytes) -> Snapshot:
    """Read the content of a checkpoint file.

    Raises:
        ValueError: it is damaged, of another format, or no checkpoint of a run; the message says what came.
    """
    words = content[:LONGEST_HEADER].partition(b"\n")[0].split(b" ")
    if words[0] != MAGIC or len(words) != 4:
        raise ValueError("wanted a checkpoint of a run; got a file of another kind, or its first bytes are damaged")
    if words[1] != FORMAT:
        raise ValueError(f"wanted format {FORMAT.decode()}; got format {words[1].decode(errors='replace')}")
    body = content.partition(b"\n")[2]
    if str(len(body)).encode() != words[2]:
        raise ValueError(f"wanted {words[2].decode(errors='replace')} bytes; got {len(body)}: it is cut or damaged")
    if hashlib.sha256(body).hexdigest().encode() != words[3]:
        raise ValueError("wanted bytes with the SHA-256 of their first line; got others: it is damaged")
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    return Snapshot(json.loads(header["__metadata__"]["facts"]), import_extra("safetensors.torch").load(body))


class Checkpoints:
    """The numbered checkpoint files of a run, the newest with the highest number.

    Args:
        folder: where they are; made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: list[Path] = []  # the one that was read, those before it, and those written since

    def files(self) -> list[Path]:
        """Return all of them, the newest first."""
        found = [path for path in self.folder.glob(f"*{SUFFIX}") if path.stem.isdecimal()]
        return sorted(found, key=lambda path: int(path.stem), reverse=True)

    def save(self, snapshot: Snapshot) -> None:
        """Write the next one, and remove those older than the one before it.

        Raises:
            OSError: it cannot be written; the others are as they were.
        """
        self.folder.mkdir(exist_ok=True)
        newest = next((int(path.stem) for path in self.files()), 0)
        path = self.folder / f"{newest + 1:08}{SUFFIX}"
        write_file(path, pack(snapshot))
        self._kept.append(path)
        while len(self._kept) > KEPT:
            self._kept.pop(0).unlink(missing_ok=True)

    def latest(self, check: Callable[[Snapshot], None]) -> Snapshot | None:
        """Read the newest one that is whole and of this run; say on the way which ones are not.

        Args:
            check: raises a ValueError for a checkpoint of another run.

        Returns:
            None if there is no file at all.

        Raises:
            ValueError: there are files, and none can be used.
        """
        files = self.files()
        for index, path in enumerate(files):
            try:
                snapshot = unpack(path.read_bytes())
                check(snapshot)
            except (ValueError, OSError) as error:  # a disk that gives no bytes is a kind of damage
                print(f"refused {path}: {error}", flush=True)
                continue
            self._kept = files[index:][::-1]
            return snapshot
        if files:
            raise ValueError(f"{self.folder}: wanted a checkpoint that can be used; got {len(files)} that cannot")
        return None
