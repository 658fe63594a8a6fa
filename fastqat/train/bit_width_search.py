"""Bit-widths that a run learns (AdaQAT): one update in each step, and what is kept of it for ``fastqat report``.

``RUN/bit_widths/steps.jsonl`` has N and the losses at some thousand steps, and at each one in which a ceiling changed
or a width was frozen.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastqat.adaqat import AdaQAT
from fastqat.bit_widths import layer_quantizers
from fastqat.cost import cost
from fastqat.train.config import Config
from fastqat.train.files import write_file
from fastqat.train.recorder import rows_until
from fastqat.train.run import Run

FOLDER, STEPS = "bit_widths", "steps.jsonl"
POINTS = 1000  # on the time axis of a whole run
KINDS = {"weight": "W", "activation": "A"}


class BitWidthSearch:
    """AdaQAT in a run, which starts at the bit-widths that the quantizers have.

    ::

        search = BitWidthSearch(run, steps=all_steps, step=steps_done_before)
        for ...:
            ...backward();  search.step(loss, closure);  optimizer.step()
            ...             search.save()       # before each checkpoint

    Args:
        run: its network is prepared, with ranges; its state takes that of the widths.
        steps: optimizer steps of the whole training.
        step: those that are done; what was recorded after it is dropped.

    Raises:
        ValueError: options that do not fit the network; the message names them.
        OSError: something cannot be written; what was there is still there.
    """

    def __init__(self, run: Run, *, steps: int, step: int = 0) -> None:
        self.run = run
        self.path, self.writes = run.folder.path / FOLDER, run.folder.writes
        self.done, self.every = step, max(1, steps // POINTS)
        self.adaqat = adaqat(run.config, run.model, self._one_image())
        run.state.begin_search(self.adaqat)
        self._rows: list[dict[str, Any]] = []
        if self.writes:
            self.path.mkdir(exist_ok=True)
            self._rows = rows_until(self.path / STEPS, step)

    def step(self, loss: Tensor, closure: Callable[[], Tensor]) -> None:
        """Move the widths, between the backward pass and the step of the optimizer.

        Args:
            loss: of the task, [], at the bit-widths that the network has; the mean over processes is that of the batch.
            closure: computes it again.
        """
        self.done += 1
        before = self._integers()
        update = self.adaqat.step(loss, closure)
        self.adaqat.history.clear()  # it would grow in memory, and in each checkpoint
        if update is not None:
            if self._due(self.run.config.adaqat_every) or before != self._integers() or not self._rows:
                self._record(update.loss, update.hardware)
        elif self.adaqat.is_frozen and self._due(1):
            mean = self.run.processes.sum(loss.detach().double()) / self.run.processes.world_size
            self._record(float(mean), self.adaqat.cost(self.adaqat.bits()))

    def save(self) -> None:
        """Write what there is so far. To be called before the run writes a checkpoint, so that nothing is lost."""
        if self.writes:
            write_file(self.path / STEPS, "".join(json.dumps(row) + "\n" for row in self._rows).encode())

    def facts(self) -> dict[str, float]:
        """What the row of an epoch says of the widths, means over the layers, and of what the network costs."""
        found = cost(self.run.model, self._one_image())
        return {
            **{f"{kind}_bits": n for kind, n in self._mean_widths().items()},
            "weight_compression_rate": found.weight_compression_rate,
            "bit_operations": found.bit_operations,
        }

    def note(self) -> str:
        """The widths in short, such as "W3.42 A4.10"."""
        return " ".join(f"{KINDS[kind]}{n:.2f}" for kind, n in self._mean_widths().items())

    def _mean_widths(self) -> dict[str, float]:
        numbers = {kind: [w.number.value for w in self.adaqat.widths if w.kind == kind] for kind in KINDS}
        return {kind: fmean(values) for kind, values in numbers.items() if values}

    def _one_image(self) -> Tensor:
        return torch.zeros(1, *self.run.data.image_shape, dtype=torch.float32, device=self.run.device)

    def _due(self, interval: int) -> bool:
        """Whether this step is the first of its part of the time axis, of those that are so far apart."""
        return self.done // self.every != (self.done - interval) // self.every

    def _integers(self) -> list[tuple[int, bool]]:
        """The ceilings, and which of them stay."""
        return [(width.number.bits, width.number.frozen) for width in self.adaqat.widths]

    def _record(self, loss: float, hardware: float) -> None:
        """Keep the losses of this step, and the widths that came of it."""
        numbers = {width.name: width.number for width in self.adaqat.widths}
        row = {
            "step": self.done,
            "loss": loss if math.isfinite(loss) else None,  # JSON knows no NaN
            "hardware": hardware,
            "widths": {name: number.value for name, number in numbers.items()},
            "oscillations": {name: number.oscillations for name, number in numbers.items()},
            "frozen": [name for name, number in numbers.items() if number.frozen],
        }
        self._rows.append(row)


def adaqat(config: Config, model: torch.nn.Module, example_inputs: Tensor) -> AdaQAT:
    """Make what learns the bit-widths.

    The first and the last layer keep theirs, unless the options want these to be as those of other layers; so do those
    that the options give bits of their own.

    Args:
        config: the options.
        model: prepared.
        example_inputs: [1, C, H, W], for costs that count operations.
    """
    names = list(layer_quantizers(model))
    # Those in float are not among the quantized ones.
    edges = (names[0], names[-1]) if names and config.first_last_bits and not config.first_last_float else ()
    given = [pattern for pattern in config.bits if fnmatch.filter(names, pattern)]
    return AdaQAT(
        model,
        lam=config.adaqat,
        lr_weight=config.adaqat_lr_weight,
        lr_activation=config.adaqat_lr_activation,
        lowest=config.adaqat_lowest,
        every=config.adaqat_every,
        freeze_after=config.adaqat_freeze_after,
        freeze=config.adaqat_freeze,
        freeze_to=config.adaqat_freeze_to,
        cost=config.adaqat_cost,
        example_inputs=example_inputs,
        fixed=[*map(glob.escape, edges), *given],
        per_layer=config.adaqat_per_layer,
        seed=config.seed,
    )
