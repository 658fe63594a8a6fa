"""Quantization-aware training: gradient descent, and what is done and said about quantized tensors on the way."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

import fastqat
from fastqat.train.quantization import undampened
from fastqat.train.quantizer_recorder import QuantizerRecorder
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
        if run.config.compress_activations:
            fastqat.compress_saved_activations(run.model)
        fastqat.quantize_weights_together(run.model, BUCKET_BYTES if run.processes.world_size > 1 else None)
        if run.config.compile:
            _see_first_gradients(run, first_order)
        super().__init__(run, phase, optimizers, epochs, first_order, warmup_epochs)
        config, position, steps = self.config, self.state.position, epochs * self.batches
        done = position.epoch * self.batches + position.batch
        self.regularization: fastqat.Schedule | None = None
        if config.bin_regularization:
            begin = config.bin_regularization_begin
            self.regularization = fastqat.Schedule("step", 0.0, config.bin_regularization, steps, begin)
        self.recorder: Recorder | None = None
        if config.track_oscillations:
            self.recorder = Recorder(run.folder, run.model, steps=steps, step=done)
        self.quantizers: QuantizerRecorder | None = None
        if config.record_quantizers:
            activations = bool(config.bits_activation)
            self.quantizers = QuantizerRecorder(run.folder, run.model, activations=activations, steps=steps, step=done)

    def _step(self, images: Tensor, labels: Tensor) -> tuple[bool, bool]:
        with self.quantizers.before() if self.quantizers else contextlib.nullcontext():
            asked_and_due = super()._step(images, labels)
        if self.config.bits_gradient:
            self.processes.merge_gradient_grids(self.run.model)
        if self.recorder:
            self.recorder.step()
        if self.quantizers:
            self.quantizers.step()
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
        if self.quantizers:
            batches = self.run.data.train_batches(
                self.config.batch_size, seed=self.config.seed, epoch=self.first_order, augment=False
            )
            self.quantizers.epoch(row, next(iter(batches)))

    def save(self) -> None:
        """Write what was recorded, and then a checkpoint: nothing that the checkpoint has passed is lost."""
        for recorder in (self.recorder, self.quantizers):
            if recorder:
                recorder.save()
        super().save()


def _see_first_gradients(run: Run, order: int) -> None:
    """Show a batch to quantizers of gradients that have seen none: what is compiled does not ask for it.

    Args:
        run: whose network is not compiled yet.
        order: number of the order of the images that the batch is from.
    """
    if all(m.initialized for m in run.model.modules() if isinstance(m, fastqat.GradientFakeQuant)):
        return
    config = run.config
    images, labels = next(iter(run.data.train_batches(config.batch_size, seed=config.seed, epoch=order)))
    run.model.train()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bf16):
        logits = run.model(images)
    F.cross_entropy(logits.float(), labels).backward()
    run.model.zero_grad()
