"""Gradient descent for some epochs: batches, steps, and a checkpoint from time to time."""

from __future__ import annotations

import contextlib
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from fastqat.train.diagnosis import first_non_finite
from fastqat.train.optimization import Updates
from fastqat.train.progress import Progress
from fastqat.train.run import Run
from fastqat.train.run_folder import Row


class Training:
    """A phase of a run in which weights change, from where its state says that it stands.

    One step takes one global batch, whatever number of processes and pieces it is cut into: the gradient is that of
    the mean loss over its images.

    Args:
        run: what is trained, on what, and where it stands.
        phase: its name in metrics and curves.
        optimizers: together they own what is trained; the first one's learning rate is reported.
        epochs: passes over the training images.
        first_order: number of the order in which the first epoch takes the images; each epoch has its own.
        warmup_epochs: those in which the learning rates rise.
    """

    def __init__(
        self, run: Run, phase: str, optimizers: list[Optimizer], epochs: int, first_order: int, warmup_epochs: float
    ) -> None:
        self.run, self.phase, self.epochs, self.first_order = run, phase, epochs, first_order
        self.config, self.state, self.processes = run.config, run.state, run.processes
        self.images = len(run.data.train)
        self.batches = run.data.train_batch_count(self.config.batch_size)
        self.updates = Updates(self.config, optimizers, epochs * self.batches, round(warmup_epochs * self.batches))
        self.network = self.processes.wrap(run.model)
        if self.config.compile:
            torch.compiler.reset()  # what was compiled for the phase before is of no more use
            self.network = torch.compile(self.network)  # type: ignore[assignment]

    def fit(self) -> Row:
        """Train through the epochs that are left; return the row of the last one.

        Raises:
            FloatingPointError: a loss, a gradient or a weight is no longer finite.
            Interrupted: a signal stopped the run, which is saved.
        """
        self.state.begin(self.updates)
        position = self.state.position
        done = position.epoch * self.images + self._seen()
        with Progress(self.phase, self.epochs, self.images, done, self.processes.main) as progress:
            while self.state.position.epoch < self.epochs:
                self._train_epoch(progress)
                progress.epoch(self._end_epoch())
        return self.run.folder.rows[-1]

    def _seen(self) -> int:
        """Images of the running epoch that are done."""
        return min(self.state.position.batch * self.config.batch_size, self.images)

    def _train_epoch(self, progress: Progress) -> None:
        """Take what is left of one pass over the training images."""
        config, state, position = self.config, self.state, self.state.position
        self.run.model.train()
        batches = self.run.data.train_batches(
            config.batch_size,
            seed=config.seed,
            epoch=self.first_order + position.epoch,
            start=position.batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            workers=config.workers,
        )
        started = time.monotonic() - position.seconds
        for images, labels in batches:
            asked, due = self._step(images, labels)
            position.batch += 1
            position.seconds = time.monotonic() - started
            progress.step(state.meter, position.epoch, self._seen(), self.note())
            if asked or due:
                self.save()
            self.run.stop_if(asked)

    def _end_epoch(self) -> Row:
        """Measure and save what an epoch has made; return its row."""
        state, position = self.state, self.state.position
        self.run.check_weights()
        loss, accuracy = state.meter.read(self.processes.sum)
        row = self.run.measure(
            self.phase,
            position.epoch + 1,
            train_loss=loss,
            train_accuracy=accuracy,
            lr=self.updates.lr(position.epoch * self.batches),
            seconds=position.seconds,
            images_per_second=self.images / position.seconds,
            **self.facts(),
        )
        self.run.save_weights(row)
        self.end_epoch(row)
        state.end_epoch()
        self.run.save()
        return row

    def facts(self) -> dict[str, float]:
        """Return what else the row of an epoch says."""
        return {}

    def note(self) -> str:
        """Return what else is shown while an epoch runs."""
        return ""

    def before_update(self, loss: Tensor, images: Tensor, labels: Tensor) -> None:
        """Do what is to be done with the gradients there, before the optimizers step.

        Args:
            loss: sum over the slice of this process, [].
            images, labels: the slice.
        """

    def end_epoch(self, row: Row) -> None:
        """Keep what else there is to keep of an epoch, before its checkpoint is written."""

    def save(self) -> None:
        """Write a checkpoint within an epoch."""
        self.run.save()

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of a step, [], if anything is."""
        return None

    def piece(self, index: int) -> contextlib.AbstractContextManager[object]:
        """Return the context in which a piece of the batch runs forward and backward."""
        return contextlib.nullcontext()

    def _step(self, images: Tensor, labels: Tensor) -> tuple[bool, bool]:
        """Update by one batch; return whether a signal asks to stop, and whether a checkpoint is due.

        Args:
            images, labels: the slice of this process.
        """
        position = self.state.position
        step = position.epoch * self.batches + position.batch
        self.updates.zero_grad()
        loss = self._backward(images, labels)
        norm = self.updates.clip()
        finite = bool(loss.isfinite()) and (norm is None or bool(norm.isfinite()))
        # One question to all processes, before anything is updated: a step is taken by all of them or by none.
        failed, asked, due = self.processes.any(not finite, self.run.signals.received is not None, self._due())
        if failed:
            raise FloatingPointError(self._explain(step + 1, "loss" if not loss.isfinite() else "gradient", images))
        self.before_update(loss, images, labels)
        self.updates.step(step)
        average = self.state.average
        if average:
            if average.updates != step:  # it comes from a checkpoint, which has the step in its position
                average.updates = step
            average.update_parameters(self.run.model)
        return asked, due

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Leave the gradient of a batch in the parameters; return the sum of the losses, []."""
        count, world_size, pieces = self._count(), self.processes.world_size, self._pieces()
        total = torch.zeros((), dtype=torch.float32, device=self.run.device)
        for index, (x, y) in enumerate(zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True)):
            waits = world_size > 1 and index < pieces - 1  # gradients are averaged once, with the last piece
            context = self.network.no_sync() if waits else contextlib.nullcontext()  # type: ignore[operator]
            with context, self.piece(index):
                loss, logits = self.forward(x, y)
                # The mean of these over the processes is the mean over all images, however uneven the slices are.
                mean = loss * (world_size / count)
                penalty = self.penalty() if index == 0 else None
                (mean if penalty is None else mean + penalty).backward()
            self.state.meter.add(loss, logits, y)
            total += loss.detach()
        return total

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of some images, [], and the logits, [N, classes]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.bf16):
            logits = self.network(images)
        smoothing = self.config.label_smoothing
        return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing), logits

    def _count(self) -> int:
        """Images of the running batch, of all processes together."""
        return min(self.config.batch_size, self.images - self._seen())

    def _pieces(self) -> int:
        """Pieces of the running batch: the same number in all processes, and none empty.

        Where there are fewer images than processes there is one piece, and for some of them it is empty.
        """
        return min(self.config.accumulate, max(self._count() // self.processes.world_size, 1))

    def _due(self) -> bool:
        """Whether a checkpoint is due after this step; the main process alone looks at the clock."""
        config = self.config
        by_steps = config.save_steps is not None and (self.state.position.batch + 1) % config.save_steps == 0
        return by_steps or (self.processes.main and time.monotonic() - self.run.saved >= config.save_seconds)

    def _explain(self, step: int, what: str, images: Tensor) -> str:
        """Say which step failed, and which layer was the first. Every process has to call this."""

        def again() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.bf16):
                for x in images.tensor_split(self._pieces()):
                    self.run.model(x)

        causes = self.processes.gather(first_non_finite(self.run.model, again))
        cause = next((each for each in causes if each.startswith("the first layer")), causes[0])
        position = self.state.position
        where = f"{self.phase} step {step} (epoch {position.epoch + 1}, batch {position.batch + 1})"
        return f"the training {what} is not finite at {where}: {cause}; try a smaller learning rate"
