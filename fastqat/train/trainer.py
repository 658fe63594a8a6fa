"""From an FP32 network to a quantized one: train or load it, quantize and calibrate it, train it quantized.

Everything that has to do with quantization is in :meth:`Trainer.quantize` and :meth:`Trainer.train_quantized`.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastqat
from fastqat import models
from fastqat.train import data
from fastqat.train.checkpoint import load_checkpoint
from fastqat.train.config import Config
from fastqat.train.curves import draw_curves
from fastqat.train.extras import import_extra
from fastqat.train.progress import Meter, Progress, print_table
from fastqat.train.run_folder import RunFolder

Row = dict[str, Any]  # one row of metrics.jsonl


class Trainer:
    """One run. Everything that can be wrong with its options shows here, before anything is written.

    Args:
        config: the options.

    Raises:
        ValueError: an option, a data file or a checkpoint is wrong; the message names it.
        OSError: a file is missing, or the folder of the run cannot be made.
        ImportError: a package of the ``train`` extra is missing.
    """

    def __init__(self, config: Config) -> None:
        for extra in ("rich.progress", "matplotlib.figure"):  # better now than at the end
            import_extra(extra)
        self.config = config
        self.device = choose_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.shuffling = torch.Generator().manual_seed(config.seed)
        dataset = data.load(config.data, config.root)
        self.data = dataset.limit_train(config.limit_train or len(dataset.train)).to(self.device)
        self.model = models.build(config.model, dataset.num_classes).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
        check_images_fit(config, dataset)
        if config.checkpoint:
            load_checkpoint(self.model, config.checkpoint)
        weight = fastqat.QSpec(bits=config.bits_weight, axis=0, range=config.range, learn="scale")
        activation = fastqat.QSpec(bits=config.bits_activation, range=config.range, learn="scale")
        self.qconfig = fastqat.QConfig(weight, activation)
        self.title = f"{config.data}, model {config.model}, W{config.bits_weight}A{config.bits_activation}"
        self.folder = RunFolder(config.out or default_folder(config), config)

    def run(self) -> list[Row]:
        """Run all phases, and leave metrics, weights and curves in the folder.

        Returns:
            the last row of each phase.

        Raises:
            FloatingPointError: the training loss is no longer finite.
        """
        results = [self.train_fp32(), self.quantize()]
        if self.config.epochs:
            results.append(self.train_quantized())
        self.folder.save_figure(draw_curves(self.folder.rows, self.title), "curves.png")
        print_table(self.title, results)
        return results

    def train_fp32(self) -> Row:
        """Train the network in float32, unless it comes from a checkpoint; return the last row of the phase."""
        config = self.config
        epochs = 0 if config.checkpoint else config.fp32_epochs
        optimizer = self.sgd(list(self.model.parameters()), config.fp32_lr)
        return self.fit("FP32", [optimizer], epochs) or self.measure("FP32")

    def quantize(self) -> Row:
        """Quantize weights and activations after training (PTQ): nothing but ranges is chosen from the data."""
        config = self.config
        fastqat.prepare(self.model, self.qconfig, first_last_bits=config.first_last_bits or None)
        batches = self.data.train_batches(config.batch_size, self.shuffling, augment=False)
        fastqat.calibrate(self.model, itertools.islice(batches, config.calibration_batches))
        self.folder.save_weights(self.model, "model.pt")
        return self.measure("PTQ")

    def train_quantized(self) -> Row:
        """Train weights and scales together (QAT); return the last row of the phase."""
        config = self.config
        scales = fastqat.quantizer_parameters(self.model)
        scale_ids = {id(scale) for scale in scales}
        weights = [parameter for parameter in self.model.parameters() if id(parameter) not in scale_ids]
        optimizers = [self.sgd(weights, config.lr), Adam(scales, lr=config.quantizer_lr)]
        return self.fit("QAT", optimizers, config.epochs) or self.measure("QAT")

    def sgd(self, parameters: list[nn.Parameter], lr: float) -> SGD:
        """Make the optimizer of the network's own parameters."""
        return SGD(parameters, lr=lr, momentum=self.config.momentum, weight_decay=self.config.weight_decay)

    def fit(self, phase: str, optimizers: list[Optimizer], epochs: int) -> Row | None:
        """Train for some epochs, with a cosine from each optimizer's learning rate to 0; return the last row.

        Args:
            phase: its name in metrics and curves.
            optimizers: together they own what is trained; the first one's learning rate is reported.
            epochs: passes over the training images.
        """
        steps = epochs * math.ceil(len(self.data.train) / self.config.batch_size)
        schedules = [CosineAnnealingLR(optimizer, T_max=steps) for optimizer in optimizers]
        row = None
        with Progress(phase, epochs, len(self.data.train)) as progress:
            for epoch in range(1, epochs + 1):
                lr = optimizers[0].param_groups[0]["lr"]
                started = time.monotonic()
                loss, accuracy = self.train_epoch(optimizers, schedules, progress)
                seconds = time.monotonic() - started
                speed = {"seconds": seconds, "images_per_second": len(self.data.train) / seconds}
                row = self.measure(phase, epoch, train_loss=loss, train_accuracy=accuracy, lr=lr, **speed)
                self.folder.save_weights(self.model, "fp32.pt" if phase == "FP32" else "model.pt")
                progress.epoch(row)
        return row

    def train_epoch(
        self, optimizers: list[Optimizer], schedules: list[CosineAnnealingLR], progress: Progress
    ) -> tuple[float, float]:
        """Take one pass over the training images; return their mean loss and accuracy.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self.model.train()
        meter = Meter()
        for images, labels in self.data.train_batches(self.config.batch_size, self.shuffling):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            meter.add(loss, logits, labels)
            progress.step(meter)
        loss_mean, accuracy = meter.read()
        if not math.isfinite(loss_mean):
            raise FloatingPointError(f"the training loss became {loss_mean}; try a smaller learning rate")
        return loss_mean, accuracy

    def measure(self, phase: str, epoch: int = 0, **training: float) -> Row:
        """Evaluate on the test images, and add a row to the metrics.

        Args:
            phase: its name.
            epoch: passes over the training images that the phase has made.
            training: what is known of the last pass.
        """
        loss, accuracy = evaluate(self.model, self.data, self.config.batch_size)
        row = {"phase": phase, "epoch": epoch, **training, "test_loss": loss, "test_accuracy": accuracy}
        self.folder.add_metrics(row)
        return row


def evaluate(model: nn.Module, dataset: data.Dataset, batch_size: int = 256) -> tuple[float, float]:
    """Return mean loss, and accuracy in 0..1, on the test images; leaves the model in evaluation mode."""
    model.eval()
    meter = Meter()
    with torch.no_grad():
        for images, labels in dataset.test_batches(batch_size):
            logits: Tensor = model(images)
            meter.add(F.cross_entropy(logits, labels), logits, labels)
    return meter.read()


def choose_device(name: str) -> torch.device:
    """Return the device of a name: "cpu", "cuda", or "auto" for the best one.

    Raises:
        ValueError: "cuda" was asked for, and torch finds none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: wanted a CUDA device that torch can use; got none")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_images_fit(config: Config, dataset: data.Dataset) -> None:
    """Check that the network takes the images of the data set.

    Raises:
        ValueError: it does not.
    """
    wanted, got = models.MODELS[config.model].image_shape, tuple(dataset.train.images.shape[1:])
    if wanted != got:
        raise ValueError(f"model {config.model}: wanted images of shape {wanted}; got {got} from data {config.data}")


def default_folder(config: Config) -> Path:
    """Name the folder of a run by what it does and when it starts."""
    bits = f"w{config.bits_weight}a{config.bits_activation}"
    return Path("runs") / f"{config.data}-{config.model}-{bits}-{time.strftime('%Y%m%d-%H%M%S')}"
