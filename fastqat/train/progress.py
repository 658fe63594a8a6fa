"""What a run shows while it works: a live bar on a terminal, plain lines elsewhere, and the table at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from fastqat.train.extras import import_extra

BAR_PERIOD = 0.2  # seconds between looks at the running loss: each one waits for the device
LINE_PERIOD = 30.0
TESTS = {"": "test", "bn_": "re-estimated", "ema_": "average", "bn_ema_": "average re-estimated"}  # by prefix of a row
SHARES = ("oscillating", "frozen")  # of the tracked weights
WIDTHS = {"weight_bits": "W", "activation_bits": "A"}  # learned bit-widths
COLUMNS = {  # of the table at the end: heading, key of a row, format
    "top-1": ("test_accuracy", ".2%"),
    "BN re-estimated": ("bn_test_accuracy", ".2%"),
    "loss": ("test_loss", ".4f"),
    **{name: (name, ".2%") for name in SHARES},
    "scales at the floor": ("scales_at_floor", ","),
    **{f"{short} bits": (key, ".2f") for key, short in WIDTHS.items()},
    "WCR": ("weight_compression_rate", ".2f"),
    "BitOPs": ("bit_operations", ","),
}


class Meter:
    """Mean loss and accuracy over the batches of an epoch, summed on the device so that no step waits for it.

    Args:
        state: what :meth:`state` returned; None starts at 0.
    """

    def __init__(self, state: list[float] | None = None) -> None:
        self._sums = torch.tensor(state or [0.0, 0.0, 0.0], dtype=torch.float64)  # [3]: images, loss, correct

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: float32 [], the sum over the batch.
            logits: [N, classes].
            labels: int64 [N].
        """
        correct = (logits.argmax(1) == labels).sum()
        images = torch.full_like(correct, len(labels))
        batch = torch.stack([images.double(), loss.detach().double(), correct.double()])
        self._sums = self._sums.to(batch.device) + batch

    def state(self) -> list[float]:
        """Return the sums: images, loss, correct."""
        return self._sums.tolist()

    def read(self, total: Callable[[Tensor], Tensor] | None = None) -> tuple[float, float]:
        """Return the mean loss, and the accuracy in 0..1.

        Args:
            total: adds up the sums, [3], of all processes; None takes those of this one.
        """
        images, loss, correct = (total(self._sums) if total else self._sums).tolist()
        return (loss / images, correct / images) if images else (math.nan, math.nan)


@final
class Progress:
    """Shows a phase of training: loss, accuracy, images per second, time left.

    Args:
        phase: its name.
        epochs: epochs of the phase.
        images: training images per epoch.
        done: images that the phase has seen already, where it is resumed.
        shows: False in the processes that leave this to another one.
    """

    def __init__(self, phase: str, epochs: int, images: int, done: int = 0, shows: bool = True) -> None:
        self.phase, self.epochs, self.images, self.done = phase, epochs, images, done
        self.console = import_extra("rich.console").Console(highlight=False, quiet=not shows)
        self.started = self.shown = time.monotonic()
        self.bar = _make_bar(self.console) if self.console.is_terminal and shows else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.phase, total=self.epochs * self.images, completed=self.done, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, meter: Meter, epoch: int, seen: int, note: str = "") -> None:
        """Show the state of the running epoch, if it was not shown just before.

        Args:
            meter: of this process.
            epoch: epochs finished before.
            seen: images of this epoch that all processes have seen.
            note: what else is to be shown.
        """
        now = time.monotonic()
        if now - self.shown < (BAR_PERIOD if self.bar else LINE_PERIOD):
            return
        self.shown = now
        loss, accuracy = meter.read()
        done = epoch * self.images + seen
        rate = (done - self.done) / (now - self.started)
        parts = [f"loss {loss:.4f}", f"accuracy {accuracy:.2%}", note, f"{rate:,.0f} images/s"]
        state = "  ".join(filter(None, parts))
        title = f"{self.phase} epoch {epoch + 1}/{self.epochs}"
        if self.bar:
            self.bar.update(self.task, completed=done, description=title, state=state)
        else:
            left = (self.epochs * self.images - done) / rate
            self.console.print(f"{title}  {seen / self.images:.0%}  {state}  {left:.0f} s left")

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the result of an epoch.

        Args:
            row: its row in ``metrics.jsonl``.
        """
        epoch = f"{row['epoch']:>{len(str(self.epochs))}}/{self.epochs}"
        train = f"train {row['train_loss']:.4f} {row['train_accuracy']:7.2%}"
        shares = [f"{name} {row[name]:.2%}" for name in SHARES if name in row]
        floor = f"{row['scales_at_floor']} scales at the floor" if "scales_at_floor" in row else ""
        widths = [f"{short}{row[key]:.2f}" for key, short in WIDTHS.items() if key in row]
        rate = f"{row['images_per_second']:,.0f} images/s"
        parts = [f"{self.phase} epoch {epoch}", train, test_text(row), *shares, floor, " ".join(widths), rate]
        line = "  ".join(filter(None, parts))
        self.console.print(line, soft_wrap=True)


def test_text(row: dict[str, Any]) -> str:
    """Say what a row of ``metrics.jsonl`` has reached on the test images."""
    return "  ".join(
        f"{name} {row[f'{prefix}test_loss']:.4f} {row[f'{prefix}test_accuracy']:7.2%}"
        for prefix, name in TESTS.items()
        if f"{prefix}test_loss" in row
    )


def _make_bar(console: Any) -> Any:
    rich = import_extra("rich.progress")
    columns = ("{task.description}", rich.BarColumn(), "{task.fields[state]}", rich.TimeRemainingColumn())
    return rich.Progress(*columns, console=console, transient=True)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print what each phase has reached, one line per phase; a column that no row has a value for is left out.

    Args:
        title: above the table.
        rows: the last row of each phase, as in ``metrics.jsonl``.
    """
    table = import_extra("rich.table").Table(title=title, min_width=len(title))
    table.add_column("")
    columns = {heading: each for heading, each in COLUMNS.items() if any(each[0] in row for row in rows)}
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        values = [format(row[key], form) if key in row else "" for key, form in columns.values()]
        table.add_row(row["phase"], *values)
    import_extra("rich.console").Console(highlight=False).print(table)
