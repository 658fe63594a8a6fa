"""Quantization-aware training: gradient descent, and what is done and said about quantized tensors on the way."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

import fastqat
from fastqat.train.bit_width_search import BitWidthSearch
from fastqat.train.optimization import hold_rate
from fastqat.train.quantization import transition_rates, undampened
from fastqat.train.quantizer_recorder import QuantizerRecorder
from fastqat.train.recorder import Recorder
from fastqat.train.run import Run
from fastqat.train.run_folder import Row
from fastqat.train.training import Training
from fastqat.train.transition_recorder import TransitionRecorder
from fastqat.transition_rate import tracked_parameters

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
        if run.config.transition_rate:
            hold_rate(optimizers[0], tracked_parameters(run.model))
        position, batches = run.state.position, run.data.train_batch_count(run.config.batch_size)
        steps, done = epochs * batches, position.epoch * batches + position.batch
        self.search: BitWidthSearch | None = None
        if run.config.adaqat:
            self.search = BitWidthSearch(run, steps=steps, step=done)
        super().__init__(run, phase, optimizers, epochs, first_order, warmup_epochs)
        config = self.config
        self.transitions: TransitionRecorder | None = None
        if config.transition_rate:
            self.updates.transitions = transition_rates(config, optimizers[0], run.model, steps)
            self.transitions = TransitionRecorder(run.folder, self.updates.transitions, steps=steps, step=done)
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
        for recorder in (self.recorder, self.quantizers, self.transitions):
            if recorder:
                recorder.step()
        return asked_and_due

    def before_update(self, loss: Tensor, images: Tensor, labels: Tensor) -> None:
        """Move learned bit-widths, by the mean loss over the images of the batch, without what is added to it."""
        if self.search:
            # As in the backward pass: the mean over processes is the mean over all images.
            factor = self.processes.world_size / self._count()
            self.search.step(loss * factor, lambda: self._loss(images, labels) * factor)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of a batch, [], computed in the same pieces as in the backward pass."""
        pieces = self._pieces()
        total = torch.zeros((), dtype=torch.float32, device=self.run.device)
        for x, y in zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
            total += self.forward(x, y)[0]
        return total

    def penalty(self) -> Tensor | None:
        """Bin regularization, whose weight follows its schedule."""
        return fastqat.bin_regularization(self.run.model, self.regularization) if self.regularization else None

    def piece(self, index: int) -> contextlib.AbstractContextManager[object]:
        """The first piece of a batch alone is dampened: the gradient of a step is that of its weight."""
        return undampened(self.run.model) if index and self.config.dampening else contextlib.nullcontext()

    def facts(self) -> dict[str, float]:
        """Shares of oscillating and of frozen weights among those that are tracked, and learned bit-widths."""
        found = self.search.facts() if self.search else {}
        if self.config.track_oscillations:
            summary = fastqat.oscillation_summary(self.run.model)
            found |= {name: summary[name] for name in ("oscillating", "frozen")}
        return found

    def note(self) -> str:
        """The learned bit-widths."""
        return self.search.note() if self.search else ""

    def end_epoch(self, row: Row) -> None:
        """Keep what the report of the run needs."""
        if self.recorder:
            self.recorder.epoch(row)
        for recorder in (self.search, self.transitions):
            if recorder:
                recorder.save()
        if self.quantizers:
            batches = self.run.data.train_batches(
                self.config.batch_size, seed=self.config.seed, epoch=self.first_order, augment=False
            )
            self.quantizers.epoch(row, next(iter(batches)))

    def save(self) -> None:
        """Write what was recorded, and then a checkpoint: nothing that the checkpoint has passed is lost."""
        for recorder in (self.search, self.transitions, self.recorder, self.quantizers):
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
