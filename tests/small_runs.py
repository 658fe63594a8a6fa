"""Small runs for the tests of saving and resuming, and what came out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastqat import cli
from fastqat.train.training import Training

SMALL = "--model resume_networks:Dropped --batch-size 32 --device cpu --threads 1 --range minmax --fp32-lr 0.02"
TINY = f"{SMALL} --limit-train 96 --calibration-batches 1 --fp32-epochs 2 --epochs 2 --save-steps 1 --momentum 0.8"
WEIGHTS = ("fp32.safetensors", "model.safetensors", "best.safetensors")
TIMES = ("seconds", "images_per_second")


def results(folder: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The metrics of a run without what the clock decides, and its files of weights, with the quantizers' state."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return kept, [(folder / name).read_bytes() for name in WEIGHTS]


def undisturbed(folder: Path) -> Path:
    """Make a run that nothing disturbs."""
    assert cli.main(["train", *TINY.split(), "--out", str(folder)]) == 0
    return folder


def stop_at_step(monkeypatch: pytest.MonkeyPatch, number: int, how: Callable[[], object]) -> None:
    """Do something in the middle of the so-manieth step of a run."""
    steps = iter(range(1, 1000))
    original = Training._backward

    def watched(self: Training, *args: Any) -> Any:
        loss = original(self, *args)
        if next(steps) == number:
            how()
        return loss

    monkeypatch.setattr(Training, "_backward", watched)


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]
