"""What the phases of a run share: data, network, state, folder; to measure, to save, and to go on from there."""

from __future__ import annotations

import itertools
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastqat import batch_norm, models
from fastqat.nn.coverage import Coverage
from fastqat.nn.scales import scales_at_floor
from fastqat.train import data
from fastqat.train.bn_statistics import are_better, are_reestimated_in, running_statistics
from fastqat.train.config import Config
from fastqat.train.diagnosis import non_finite_parameters
from fastqat.train.distributed import Processes, synchronize_batch_norm
from fastqat.train.environment import environment
from fastqat.train.extras import import_extra
from fastqat.train.interrupt import Interrupted, StopSignals
from fastqat.train.progress import Meter
from fastqat.train.random_state import seed_random
from fastqat.train.run_folder import Row, RunFolder, create_folder
from fastqat.train.run_state import RunState
from fastqat.train.weights import load_weights


class Run(ABC):
    """A run before its first step, or where it was saved. Whatever is wrong with its options shows here.

    Args:
        config: the options.
        resume: folder of the run that goes on; None starts a new one, and makes its folder if nothing is wrong.

    Raises:
        ValueError: an option, a data file or a checkpoint is wrong; the message names it.
        OSError: a file is missing, or the folder of the run cannot be made.
        ImportError: a package of the ``train`` extra is missing.
    """

    coverage: Coverage  # of the quantized network, once it was checked

    def __init__(self, config: Config, resume: Path | None = None) -> None:
        for extra in ("rich.progress", "matplotlib.figure", "safetensors.torch", "yaml"):  # better now than at the end
            import_extra(extra)
        if config.tensorboard:
            import_extra("torch.utils.tensorboard", extra="tensorboard")
        self.config = config
        self.processes = Processes(choose_device(config.device).type)
        self.device = self.processes.device
        if config.threads:
            torch.set_num_threads(config.threads)
        dataset = data.load(config.data, config.root, image_size=config.image_size)
        self.data = dataset.limit_train(config.limit_train or len(dataset.train)).to(self.device)
        seed_random(config.seed)
        self.model = self._build()
        self.resumes = resume is not None
        self.check()
        self.state = RunState(config, self.model, self.processes)
        self.reestimates = config.reestimate_bn != "never" and bool(running_statistics(self.model))
        self._tested: dict[str, dict[str, Tensor]] = {}  # state_dicts of the newest row, by the prefix of its results
        self.signals = StopSignals(patient=self.processes.world_size > 1, says=self.processes.main)
        self.saved = time.monotonic()
        self.folder = self._restore(resume) if resume else self._start()
        if config.tensorboard:
            self.folder.open_board()

    @abstractmethod
    def check(self) -> None:
        """Raise a ValueError where a later phase would find that the network is not fit for it."""

    @abstractmethod
    def prepare(self) -> None:
        """Quantize weights and inputs of the layers."""

    def _build(self) -> nn.Module:
        """Build the network for the data, in float32 and with the weights of the seed."""
        config = self.config
        model = models.build(config.model, self.data.num_classes, self.data.image_shape, **config.model_options)
        model = model.to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
        if self.processes.world_size > 1:
            model = synchronize_batch_norm(model, self.device)
            seed_random((config.seed + self.processes.rank) % 2**63)  # each draws dropout masks of its own
        return model

    def _start(self) -> RunFolder:
        """Load the FP32 weights, if there are some, and make the folder of a new run."""
        config = self.config
        if config.checkpoint:
            load_weights(self.model, config.checkpoint)
        about = environment(self.device, self.processes.world_size)

        def create() -> Path:
            path = config.out or default_folder(config)
            create_folder(path, config, about)
            return path

        return RunFolder(self.processes.once(create), writes=self.processes.main)

    def _restore(self, path: Path) -> RunFolder:
        """Go to where the newest good checkpoint of a run was written; to its beginning if it has written none."""
        folder = RunFolder(path, writes=self.processes.main)
        snapshot = self.processes.once(lambda: folder.checkpoints.latest(self.state.check))
        if snapshot:
            self.state.restore(snapshot, self.prepare)
            folder.set_metrics(snapshot.facts["rows"])
        elif self.config.checkpoint:
            load_weights(self.model, self.config.checkpoint)
        return folder

    def measure(self, phase: str, epoch: int = 0, **training: float) -> Row:
        """Evaluate on the test images, weights and their average, and add a row to the metrics.

        Results with re-estimated statistics of BN, where the options want them, are named ``bn_*``. The network keeps
        the statistics that it has: training goes on from these.

        Args:
            phase: its name.
            epoch: passes over the training images that the phase has made.
            training: what is known of the last pass.
        """
        row = {"phase": phase, "epoch": epoch, **training}
        named = {"": self.model} | ({"ema_": self.state.average.module} if self.state.average else {})
        self._tested = {}
        for prefix, model in named.items():
            row |= self._test(prefix, model)
            if self.reestimates and are_reestimated_in(self.config, phase, epoch):
                row |= self._test_reestimated(prefix, model)
        if phase != "FP32":
            row["coverage"] = self.coverage.multiplications
            if at_floor := sum(scales_at_floor(self.model).values()):
                row["scales_at_floor"] = at_floor
        self.folder.add_metrics(row)
        return row

    def _test(self, prefix: str, model: nn.Module) -> Row:
        loss, accuracy = evaluate(model, self.data, self.config.batch_size, self)
        self._tested[prefix] = model.state_dict()
        return {f"{prefix}test_loss": loss, f"{prefix}test_accuracy": accuracy}

    def _test_reestimated(self, prefix: str, model: nn.Module) -> Row:
        """Test with re-estimated statistics of BN, and choose between these and those of training.

        No test image decides: both are compared on the training images that have chosen the ranges, as no others are
        set apart. Weights are fitted to these images, and in both cases they are the same.
        """
        trained = self._on_training_images(model)
        with self._reestimated(model):
            row = self._test(f"bn_{prefix}", model)
            self._tested[f"bn_{prefix}"] |= running_statistics(model)
            reestimated = self._on_training_images(model)
        for name, (loss, accuracy) in {prefix: trained, f"bn_{prefix}": reestimated}.items():
            row |= {f"{name}compared_loss": loss, f"{name}compared_accuracy": accuracy}
        return row | {f"bn_{prefix}chosen": are_better(reestimated, trained)}

    def _on_training_images(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on the images of the calibration; every process takes all of them."""
        return forward_all(model, self.calibration_batches(), self.config.bf16).read()

    def calibration_batches(self) -> Iterator[data.Batch]:
        """Batches of training images, not augmented, that choose the ranges of activations."""
        # Every process takes these batches whole: the ranges come out equal, and as those of one process alone.
        config = self.config
        batches = self.data.train_batches(
            config.batch_size, seed=config.seed, epoch=config.fp32_epochs, augment=False, workers=config.workers
        )
        return itertools.islice(batches, config.calibration_batches)

    def _reestimated(self, model: nn.Module) -> AbstractContextManager[int]:
        """Context with re-estimated statistics, from batches in an order that no training has."""
        config, processes = self.config, self.processes
        batches = self.data.train_batches(
            config.batch_size,
            seed=config.seed,
            epoch=config.fp32_epochs + 1 + config.epochs,
            rank=processes.rank,
            world_size=processes.world_size,
            workers=config.workers,
        )

        def forward(network: nn.Module, batch: data.Batch) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                network(batch[0])

        return batch_norm.reestimated(model, batches, config.bn_batches, forward=forward)

    def save_weights(self, row: Row) -> None:
        """Save the weights that a row of the metrics was measured with; of quantized ones the best so far, too.

        Where it has results with re-estimated statistics of BN, the weights are saved with the statistics that are
        better on training images. Which epoch is the best, and whether the average of the weights is better than the
        weights, is decided by the accuracy on the test images, as no others are set apart.

        Args:
            row: the newest one.
        """
        if row["phase"] == "FP32":
            self.folder.save_weights(self._tested[""], "fp32")
            return
        kinds = [kind for kind in ("", "ema_") if kind in self._tested]
        chosen = [f"bn_{kind}" if row.get(f"bn_{kind}chosen") else kind for kind in kinds]
        self.folder.save_weights(self._tested[chosen[0]], "model")
        best = max(chosen, key=lambda prefix: row[f"{prefix}test_accuracy"])
        accuracy = row[f"{best}test_accuracy"]
        if self.state.best is None or accuracy > self.state.best:
            self.state.best = accuracy
            self.folder.save_weights(self._tested[best], "best")

    def save(self) -> None:
        """Write a checkpoint. Every process has to call this.

        Raises:
            FloatingPointError: a weight is not finite; the checkpoints that there are stay.
            OSError: it could not be written; the others are as they were.
        """
        self.check_weights()
        snapshot = self.state.snapshot(self.folder.rows)
        if self.processes.main:
            self.folder.checkpoints.save(snapshot)
        self.saved = time.monotonic()

    def check_weights(self) -> None:
        """Raise a FloatingPointError where a weight is not finite: what follows would be lost, and is not saved."""
        if names := non_finite_parameters(self.model):
            position = self.state.position
            where = f"{position.phase} epoch {position.epoch + 1}, batch {position.batch}"
            raise FloatingPointError(
                f"after {where}, {len(names)} weights hold a number that is not finite, the first of them {names[0]}; "
                "try a smaller learning rate"
            )

    def stop_if(self, asked: bool) -> None:
        """Raise :class:`Interrupted` if a signal has asked any of the processes to stop, after a checkpoint."""
        if asked:
            raise Interrupted(self.signals.received or signal.SIGTERM)

    def close(self) -> None:
        """Close files, and leave the other processes."""
        self.folder.close()
        self.processes.close()


def evaluate(
    model: nn.Module, dataset: data.Dataset, batch_size: int = 256, run: Run | None = None
) -> tuple[float, float]:
    """Return mean loss, and accuracy in 0..1, on the test images; leaves the model in evaluation mode.

    Args:
        model: the network.
        dataset: whose test images are taken.
        batch_size: images per batch.
        run: says how many processes share the work, and in which precision; None is one process in float32.
    """
    config = run.config if run else Config()
    rank, world_size = (run.processes.rank, run.processes.world_size) if run else (0, 1)
    batches = dataset.test_batches(batch_size, rank=rank, world_size=world_size, workers=config.workers)
    return forward_all(model, batches, config.bf16).read(run.processes.sum if run else None)


def forward_all(model: nn.Module, batches: Iterable[data.Batch], bf16: bool) -> Meter:
    """Add up the losses and hits over some batches; leaves the model in evaluation mode.

    Args:
        model: the network.
        batches: images and labels.
        bf16: compute in bfloat16 where autocast says so.
    """
    model.eval()
    meter = Meter()
    with torch.no_grad():
        for images, labels in batches:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                logits = model(images)
            meter.add(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)
    return meter


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


def default_folder(config: Config) -> Path:
    """Name the folder of a run by what it does and when it starts."""
    model = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in config.model)
    started = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # to the microsecond: a sweep starts many runs at once
    return Path("runs") / f"{config.data}-{model}-{config.bit_widths.lower()}-{started}"
