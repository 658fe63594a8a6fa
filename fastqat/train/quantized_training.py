"""Quantization-aware training: gradient descent, and what is done and said about oscillating weights on the way."""

from __future__ import annotations

import contextlib

from torch import Tensor
from torch.optim import Optimizer

import fastqat
from fastqat.train.quantization import undampened
from fastqat.train.recorder import Recorder
from fastqat.train.run import Run
from fastqat.train.run_folder import Row
from fastqat.train.training import Training

BUCKET_BYTES = 25 * 2**20  # of weights that are quantized together in data-parallel training: torch's of gradients


class QuantizedTraining(Training):
    """The phase of a run that trains quantized weights, which are quantized together.

    Args:
        run, phase, optimizers, epochs, first_order, warmup_epochs: see :class:`Training`.
    """

    def __init__(
        self, run: Run, phase: str, optimizers: list[Optimizer], epochs: int, first_order: int, warmup_epochs: float
    ) -> None:
        # Before the network is wrapped and compiled: these see its hooks.
        fastqat.quantize_weights_together(run.model, BUCKET_BYTES if run.processes.world_size > 1 else None)
        super().__init__(run, phase, optimizers, epochs, first_order, warmup_epochs)
        config, position, steps = self.config, self.state.position, epochs * self.batches
        self.regularization: fastqat.Schedule | None = None
        if config.bin_regularization:
            begin = config.bin_regularization_begin
            self.regularization = fastqat.Schedule("step", 0.0, config.bin_regularization, steps, begin)
        self.recorder: Recorder | None = None
        if config.track_oscillations:
            done = position.epoch * self.batches + position.batch
            self.recorder = Recorder(run.folder, run.model, steps=steps, step=done)

    def _step(self, images: Tensor, labels: Tensor) -> tuple[bool, bool]:
        asked_and_due = super()._step(images, labels)
        if self.recorder:
            self.recorder.step()
        return asked_and_due

    def penalty(self) -> Tensor | None:
        """Bin regularization, whose weight follows its schedule."""
        return fastqat.bin_regularization(self.run.model, self.regularization) if self.regularization else None

    def piece(self, index: int) -> contextlib.AbstractContextManager[object]:
        """The first piece of a batch alone is dampened: the gradient of a step is that of its weight."""
        return undampened(self.run.model) if index and self.config.dampening else contextlib.nullcontext()

    def facts(self) -> dict[str, float]:
        """Shares of oscillating and of frozen weights among those that are tracked."""
        if not self.config.track_oscillations:
            return {}
        summary = fastqat.oscillation_summary(self.run.model)
        return {name: summary[name] for name in ("oscillating", "frozen")}

    def end_epoch(self, row: Row) -> None:
        """Keep what the report of the run needs."""
        if self.recorder:
            self.recorder.epoch(row)

    def save(self) -> None:
        """Write what was recorded, and then a checkpoint: nothing that the checkpoint has passed is lost."""
        if self.recorder:
            self.recorder.save()
        super().save()
