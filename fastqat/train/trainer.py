"""From an FP32 network to a quantized one: train or load it, quantize and calibrate it, train it quantized.

All that has to do with quantization is here; :class:`Training` descends gradients, and :class:`Run` knows where to
resume.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

import fastqat
from fastqat.batch_norm import reestimated
from fastqat.nn.calibrate import to_calibrate
from fastqat.nn.coverage import check_coverage, coverage_of
from fastqat.ops.checks import fail
from fastqat.train.bit_width_search import adaqat
from fastqat.train.bn_statistics import explanation, running_statistics
from fastqat.train.config import Config
from fastqat.train.curves import draw_curves
from fastqat.train.optimization import scale_optimizer, weight_optimizer
from fastqat.train.progress import print_table, test_text
from fastqat.train.quantization import prepare_as, quantizers
from fastqat.train.quantized_training import QuantizedTraining
from fastqat.train.run import Run
from fastqat.train.run_folder import Row
from fastqat.train.run_state import PHASES
from fastqat.train.training import Training


class Trainer(Run):
    """One run, and its phases: FP32 training, quantization (PTQ), quantization-aware training (QAT).

    Args:
        config, resume: see :class:`Run`, which also says what is raised.
    """

    def __init__(self, config: Config, resume: Path | None = None) -> None:
        super().__init__(config, resume)
        self.title = f"{config.data}, model {config.model}, {config.bit_widths} of {self.coverage}"

    def run(self) -> list[Row]:
        """Run the phases that are left, and leave metrics, weights and curves in the folder.

        Returns:
            the last row of each phase.

        Raises:
            FloatingPointError: a loss, a gradient or a weight is no longer finite.
            Interrupted: a signal stopped the run, which is saved.
            OSError: something could not be written; what there was is still there.
        """
        if self.config.reestimate_bn == "always" and not self.reestimates and self.processes.main:
            print(f"model {self.config.model} has no batch normalisation: nothing to re-estimate", flush=True)
        work = {"FP32": self.train_fp32, "PTQ": self.quantize, "QAT": self.train_quantized}
        with self.signals:
            for phase in PHASES[PHASES.index(self.state.position.phase) : -1]:
                work[phase]()
        rows = self.folder.rows
        results = list({row["phase"]: row for row in rows}.values())
        if self.processes.main:
            self.folder.save_figure(draw_curves(rows, self.title), "curves.png")
            print_table(self.title, results)
        return results

    def train_fp32(self) -> Row:
        """Train the network in float32, unless it comes from a checkpoint; return the last row of the phase."""
        config = self.config
        epochs = 0 if config.checkpoint else config.fp32_epochs
        optimizer = weight_optimizer(config, list(self.model.parameters()), config.fp32_lr)
        row = self.fit("FP32", [optimizer], epochs) or self.test("FP32")
        self.enter("PTQ")
        return row

    def check(self) -> None:
        """Raise a ValueError where the network cannot be quantized, or does not use all that would be."""
        steps = self.config.epochs * self.data.train_batch_count(self.config.batch_size)
        self.qconfig = quantizers(self.config, steps)
        # Calibration finds the quantizers that nothing reaches, those of weights too, where it has some of activations.
        self._prepare(replace(self.qconfig, activation=self.qconfig.activation or fastqat.QSpec()))
        zeros = torch.zeros(1, *self.data.image_shape, dtype=torch.float32)
        if to_calibrate(self.model):
            fastqat.calibrate(self.model, [zeros], progress=False, distributed=False)
        elif lost := fastqat.report(self.model, zeros).never_ran:
            got = f"{self.config.model}, which never calls {', '.join(row.layer for row in lost)}"
            fail(ValueError, "model", "a network that calls all layers that are quantized", got)
        self.coverage = coverage_of(self.model, zeros)
        if not self.resumes:  # what was accepted once goes on
            check_coverage(self.model, zeros, self.config.coverage or None, raises=True)
        if self.config.adaqat:
            adaqat(self.config, self.model, zeros).remove()
        fastqat.remove(self.model)

    def prepare(self) -> None:
        """Quantize weights, and inputs of the layers if these have bits."""
        self._prepare(self.qconfig)

    def _prepare(self, qconfig: fastqat.QConfig) -> None:
        prepare_as(self.config, self.model, qconfig)

    def quantize(self) -> Row:
        """Quantize weights and activations after training (PTQ): nothing but ranges is chosen from the data."""
        with self._known_statistics():
            self.prepare()
            if to_calibrate(self.model):  # one layer may be the only one
                self.calibrate()
        row = self.test("PTQ")
        self.save_weights(row)
        self.enter("QAT")
        return row

    def calibrate(self) -> None:
        """Choose the ranges of the activations."""
        fastqat.calibrate(self.model, self.calibration_batches(), distributed=False)

    def _known_statistics(self) -> contextlib.AbstractContextManager[object]:
        """Context in which a network that nobody trained has statistics of BN as its first step will have them."""
        untrained = not (self.config.fp32_epochs or self.config.checkpoint)
        if not (untrained and running_statistics(self.model)):
            return contextlib.nullcontext()
        return reestimated(self.model, self.calibration_batches(), self.config.calibration_batches)

    def train_quantized(self) -> Row | None:
        """Train weights and scales together (QAT); return the last row of the phase, None if it has no epochs."""
        config = self.config
        scales = fastqat.quantizer_parameters(self.model)
        optimizers = [weight_optimizer(config, self.weights(scales), config.lr)]
        if scales:  # ranges that follow the data are not learned
            optimizers.append(scale_optimizer(config, scales))
        row = self.fit("QAT", optimizers, config.epochs)
        if row:
            self.explain(row)
        self.enter("done")
        return row

    def test(self, phase: str) -> Row:
        """Measure and show a phase without epochs; return its row."""
        row = self.measure(phase)
        if self.processes.main:
            print(f"{phase}  {test_text(row)}", flush=True)
        self.explain(row)
        return row

    def explain(self, row: Row) -> None:
        """Show why a row has two accuracies, where it has."""
        if self.processes.main and (text := explanation(row)):
            print(text, flush=True)

    def weights(self, scales: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters of the network that are none of the quantizers'."""
        scale_ids = {id(scale) for scale in scales}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in scale_ids]

    def fit(self, phase: str, optimizers: list[Optimizer], epochs: int) -> Row | None:
        """Train for some epochs, or what is left of them; return the last row, None without epochs.

        Args:
            phase: its name in metrics and curves.
            optimizers: together they own what is trained; the first one owns the weights.
            epochs: passes over the training images.
        """
        if not epochs:
            return None
        config = self.config
        fp32 = phase == "FP32"
        warmup = config.fp32_warmup_epochs if fp32 else config.warmup_epochs
        training = Training if fp32 else QuantizedTraining
        # Calibration has an order of the images to itself, between those of the two trainings.
        return training(self, phase, optimizers, epochs, 0 if fp32 else config.fp32_epochs + 1, warmup).fit()

    def enter(self, phase: str) -> None:
        """Save at the beginning of the next phase, and stop there if a signal asks for it."""
        self.state.end(phase)
        self.save()
        self.stop_if(*self.processes.any(self.signals.received is not None))
