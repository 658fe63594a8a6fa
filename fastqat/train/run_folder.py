"""The folder of one run. Every file in it is complete or absent, and so is the folder."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastqat.train.checkpoint import Checkpoints
from fastqat.train.config import OPTIONS, Config
from fastqat.train.extras import import_extra
from fastqat.train.files import write_file
from fastqat.train.recipe import parse_options, read_text
from fastqat.train.weights import to_safetensors

CONFIG = "config.yaml"
Row = dict[str, Any]  # one row of metrics.jsonl


class RunFolder:
    """Collects what a run produces: ``metrics.jsonl``, weights, pictures, and the checkpoints to resume from.

    Args:
        path: the folder, which exists.
        writes: False in the processes that leave the writing to another one.

    Attributes:
        rows: all rows of ``metrics.jsonl``.
        checkpoints: the files to resume from.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.rows: list[Row] = []
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._board: Any = None

    def add_metrics(self, row: Row) -> None:
        """Add a row to ``metrics.jsonl``."""
        self.set_metrics([*self.rows, row])
        if self._board:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{row['phase']}/{name}", value, len(self.rows))
            self._board.flush()

    def set_metrics(self, rows: list[Row]) -> None:
        """Write ``metrics.jsonl`` anew: a run has few rows, and those after a checkpoint are not to be kept."""
        text = "".join(json.dumps(each) + "\n" for each in rows)
        self._write("metrics.jsonl", lambda: text.encode())
        self.rows = rows

    def save_weights(self, state: Mapping[str, Tensor], name: str) -> None:
        """Save the state_dict of a network as ``name.safetensors``."""
        self._write(f"{name}.safetensors", lambda: to_safetensors(state))

    def save_figure(self, figure: Any, name: str) -> None:
        """Save a matplotlib figure as a PNG."""

        def draw() -> bytes:
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=150)
            return content.getvalue()

        self._write(name, draw)

    def open_board(self) -> None:
        """Write metrics for TensorBoard too, from the next row on; those that it has of later rows are dropped."""
        if self.writes:
            board = import_extra("torch.utils.tensorboard", extra="tensorboard")
            self._board = board.SummaryWriter(str(self.path / "tensorboard"), purge_step=len(self.rows) + 1)

    def close(self) -> None:
        """Close what is open."""
        if self._board:
            self._board.close()

    def _write(self, name: str, content: Callable[[], bytes]) -> None:
        if self.writes:
            write_file(self.path / name, content())


def create_folder(path: Path, config: Config, environment: dict[str, Any]) -> None:
    """Make the folder of a new run, with ``config.yaml`` and ``environment.json``; all of it or nothing.

    Args:
        path: it must not exist.
        config: the options of the run.
        environment: what it runs on.

    Raises:
        FileExistsError: it exists.
        OSError: it cannot be made.
    """
    if path.exists():
        raise FileExistsError(f"out: wanted a folder that does not exist yet; got {path}")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed here
        unfinished.mkdir()
        write_file(unfinished / CONFIG, import_extra("yaml").safe_dump(config.plain(), sort_keys=False).encode())
        write_file(unfinished / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())
        unfinished.rename(path)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"out: wanted a folder that can be made; got {path} ({error.strerror})") from error


def read_folder(path: Path, changes: dict[str, Any]) -> Config:
    """Read the options of a run that is to go on.

    Args:
        path: its folder.
        changes: options that replace those of the run; only some may.

    Raises:
        FileNotFoundError: it is no folder of a run.
        ValueError: its ``config.yaml`` is damaged, or a change would change its numbers.
    """
    file = path / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"resume {path}: wanted the folder of a run; got no {CONFIG} there")
    for name in changes:
        if name not in OPTIONS or not OPTIONS[name].movable:
            allowed = ", ".join(each.name for each in OPTIONS.values() if each.movable)
            raise ValueError(f"resume {path}: wanted no option but {allowed}; got {name}, which decides the numbers")
    return Config(**{**parse_options(read_text(file), str(file)), **changes})
