"""The folder of one run. Every file in it is complete or absent: written beside its place, then moved there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastqat.train.config import Config


class RunFolder:
    """A new folder with ``config.json`` that collects what a run produces.

    Args:
        path: the folder; it must not exist.
        config: the options of the run.

    Raises:
        FileExistsError: the folder exists.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, config: Config) -> None:
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            raise FileExistsError(f"out: wanted a folder that does not exist yet; got {path}") from error
        except OSError as error:
            raise OSError(f"out: wanted a folder that can be made; got {path} ({error.strerror})") from error
        self.path = path
        self.rows: list[dict[str, Any]] = []
        options = json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
        self._write("config.json", lambda file: file.write_text(options))

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``, which is written anew: a run has few rows."""
        self.rows.append(row)
        text = "".join(json.dumps(each) + "\n" for each in self.rows)
        self._write("metrics.jsonl", lambda file: file.write_text(text))

    def save_weights(self, model: nn.Module, name: str) -> None:
        """Save the state_dict of a model."""
        self._write(name, lambda file: torch.save(model.state_dict(), file))

    def save_figure(self, figure: Any, name: str) -> None:
        """Save a matplotlib figure as a PNG."""
        self._write(name, lambda file: figure.savefig(file, format="png", dpi=150))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        unfinished = self.path / f".{name}.unfinished"
        try:
            write(unfinished)
            os.replace(unfinished, self.path / name)
        finally:
            unfinished.unlink(missing_ok=True)
