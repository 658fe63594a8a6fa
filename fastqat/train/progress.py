"""What a run shows while it works: a live bar on a terminal, plain lines elsewhere, and the table at its end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from fastqat.train.extras import import_extra

BAR_PERIOD = 0.2  # seconds between looks at the running loss: each one waits for the device
LINE_PERIOD = 30.0


class Meter:
    """Mean loss and accuracy over the batches of an epoch, summed on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.images = 0
        self._sums: Tensor | float = 0.0  # [2]: loss, correct

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: float32 [], the mean over the batch.
            logits: [N, classes].
            labels: int64 [N].
        """
        correct = (logits.argmax(1) == labels).sum()
        self._sums = self._sums + torch.stack([loss.detach().double() * len(labels), correct.double()])
        self.images += len(labels)

    def read(self) -> tuple[float, float]:
        """Return the mean loss, and the accuracy in 0..1."""
        loss, correct = (torch.as_tensor(self._sums) / self.images).tolist()
        return loss, correct


@final
class Progress:
    """Shows a phase of training: loss, accuracy, images per second, time left.

    Args:
        phase: its name.
        epochs: epochs of the phase.
        images: training images per epoch.
    """

    def __init__(self, phase: str, epochs: int, images: int) -> None:
        self.phase, self.epochs, self.images = phase, epochs, images
        self.console = import_extra("rich.console").Console(highlight=False)
        self.finished_epochs = 0
        self.started = self.shown = time.monotonic()
        self.bar = _make_bar(self.console) if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.phase, total=self.epochs * self.images, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, meter: Meter) -> None:
        """Show the state of the running epoch, if it was not shown just before."""
        now = time.monotonic()
        if now - self.shown < (BAR_PERIOD if self.bar else LINE_PERIOD):
            return
        self.shown = now
        loss, accuracy = meter.read()
        done = self.finished_epochs * self.images + meter.images
        rate = done / (now - self.started)
        state = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {rate:,.0f} images/s"
        epoch = f"{self.phase} epoch {self.finished_epochs + 1}/{self.epochs}"
        if self.bar:
            self.bar.update(self.task, completed=done, description=epoch, state=state)
        else:
            left = (self.epochs * self.images - done) / rate
            self.console.print(f"{epoch}  {meter.images / self.images:.0%}  {state}  {left:.0f} s left")

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the result of an epoch.

        Args:
            row: its row in ``metrics.jsonl``.
        """
        self.finished_epochs += 1
        epoch = f"{row['epoch']:>{len(str(self.epochs))}}/{self.epochs}"
        train = f"train {row['train_loss']:.4f} {row['train_accuracy']:7.2%}"
        test = f"test {row['test_loss']:.4f} {row['test_accuracy']:7.2%}"
        self.console.print(f"{self.phase} epoch {epoch}  {train}  {test}  {row['images_per_second']:,.0f} images/s")


def _make_bar(console: Any) -> Any:
    rich = import_extra("rich.progress")
    columns = ("{task.description}", rich.BarColumn(), "{task.fields[state]}", rich.TimeRemainingColumn())
    return rich.Progress(*columns, console=console, transient=True)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print accuracy and loss on the test images, one line per phase.

    Args:
        title: above the table.
        rows: the last row of each phase, as in ``metrics.jsonl``.
    """
    table = import_extra("rich.table").Table(title=title, min_width=len(title))
    table.add_column("")
    for heading in ("top-1", "loss"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["phase"], f"{row['test_accuracy']:.2%}", f"{row['test_loss']:.4f}")
    import_extra("rich.console").Console(highlight=False).print(table)
