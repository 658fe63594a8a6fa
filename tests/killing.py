"""Runs ``fastqat train`` again and again in forks of one warm process, and kills them: a process of its own for tests.

    python killing.py FOLDER KILLS SEED OPTIONS...

makes FOLDER/whole, a run that nothing disturbs, and FOLDER/whole-killed *, runs that are killed at random moments and
resumed, until that has happened KILLS times; FOLDER/short and FOLDER/short-killed *, each killed at one of the moments
chosen below and resumed; and prints what it did as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastqat
from fastqat import cli
from fastqat.train import data, files, trainer
from fastqat.train.extras import import_extra

LONGEST_LIFE = 0.25  # of the time that a whole run takes
WARM = ("torch._dynamo", "rich.progress", "rich.table", "rich.console", "safetensors.torch", "yaml")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, *, after: bool = False) -> Callable[[], None]:
    """A change to a child: it dies at the so-manieth call of a function, or right after it."""

    def change() -> None:
        original, calls = getattr(owner, name), Counter()

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            if calls[name] == number and not after:
                die()
            result = original(*args, **options)
            if calls[name] == number:
                die()
            return result

        setattr(owner, name, counted)

    return change


def half_written() -> None:
    """A change to a child: it dies when half of its third file, a checkpoint, is written."""
    written = Counter()
    original = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = original(path, mode, *args, **options)
        written[mode] += ".checkpoint" in path.name
        if mode == "wb" and written[mode] == 3:
            file.write(b"fastqat-checkpoint 1 123")
            file.flush()
            die()
        return file

    Path.open = opened  # type: ignore[method-assign, assignment]


CHOSEN: dict[str, Callable[[], None]] = {
    "before config.yaml is there": at_call(files.os, "replace", 1),
    "half a checkpoint": half_written,
    "before the checkpoint is on the disk": at_call(files.os, "fsync", 9),
    "before it has its name": at_call(files.os, "replace", 6),
    "after it has its name": at_call(files.os, "replace", 6, after=True),
    "in prepare": at_call(fastqat, "prepare", 1),
    "after calibrate": at_call(fastqat, "calibrate", 1, after=True),
    "before the table": at_call(trainer, "draw_curves", 1),
}


def child(arguments: list[str], life: float | None = None, change: Callable[[], None] = lambda: None) -> int:
    """Run the command in a fork for at most so many seconds; return its exit code, negative after a signal."""
    pid = os.fork()
    if not pid:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = 99
        try:
            change()
            code = cli.main(["train", *arguments])
        finally:
            os._exit(code)
    if life is not None:
        time.sleep(life)
        os.kill(pid, signal.SIGKILL)  # a child that has ended is still there to be waited for
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def go_on(out: Path, options: list[str]) -> list[str]:
    """The arguments that resume a run, or start it if it was killed before it was there."""
    return ["--resume", str(out)] if out.exists() else [*options, "--out", str(out)]


def main(folder: Path, kills: int, seed: int, options: list[str]) -> None:
    torch.set_num_threads(1)
    data.load("digits")
    for module in (*WARM, "matplotlib.figure", "matplotlib.backends.backend_agg"):
        import_extra(module)
    chance = random.Random(seed)
    started = time.monotonic()
    assert child([*options, "--out", str(folder / "whole")]) == 0
    longest = LONGEST_LIFE * (time.monotonic() - started)
    killed, positions, number = 0, Counter(), 0
    while killed < kills:
        out = folder / f"whole-killed {(number := number + 1)}"
        code = -signal.SIGKILL
        while killed < kills and code:
            code = child(go_on(out, options), life=chance.uniform(0, longest))
            assert code in (0, -signal.SIGKILL), code
            killed += code != 0
            lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
            positions[len(lines)] += 1
        assert child(go_on(out, options)) == 0
    short = [*options, "--fp32-epochs", "2", "--epochs", "2"]
    assert child([*short, "--out", str(folder / "short")]) == 0
    for moment, change in CHOSEN.items():
        out = folder / f"short-killed {moment}"
        assert child(go_on(out, short), change=change) == -signal.SIGKILL, moment
        assert child(go_on(out, short)) == 0, moment
    print(json.dumps({"killed": killed, "chosen": len(CHOSEN), "after rows": dict(positions)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
