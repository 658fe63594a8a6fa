"""What a run keeps of its activations and gradients, for ``fastqat report``: small files in ``RUN/quantizers``.

    gradients.jsonl     gamma, range, share beyond and error of large gradients of every layer, at some steps
    activations.jsonl   range, clipped share and SQNR of every layer after each epoch, on a training batch

The steps in between are as fast as without it, and training comes out the same, unless it is compiled: what is recorded
runs eagerly, and a compiler rounds otherwise.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastqat.activation_statistics import ActivationStatistics, activation_statistics
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.observe import eagerly
from fastqat.train.files import write_file
from fastqat.train.recorder import rows_until
from fastqat.train.run_folder import RunFolder

FOLDER = "quantizers"
GRADIENTS, ACTIVATIONS = "gradients.jsonl", "activations.jsonl"
POINTS = 100  # on the time axis of a whole run
EVERY = 4  # steps between points at least: errors take several passes over each gradient
NUMBERS = ("gamma", "low", "high", "beyond", "large_error", "largest")


class QuantizerRecorder:
    """Follows the quantizers of activations and gradients through quantization-aware training.

    ::

        recorder = QuantizerRecorder(run.folder, model, activations=True, steps=all_steps, step=steps_done_before)
        for ...:
            with recorder.before():  ...backward();  optimizer.step()
            recorder.step()
            ...                 recorder.save()         # before each checkpoint
        recorder.epoch(row, batch)                      # after the row of an epoch was measured; saves, too

    Args:
        folder: of the run; where it does not write (in all processes but one), nothing is recorded.
        model: prepared.
        activations: it has quantizers of activations.
        steps: optimizer steps of the whole training.
        step: those that are done; what was recorded after it is dropped.

    Raises:
        OSError: something cannot be written; what was there is still there.
    """

    def __init__(self, folder: RunFolder, model: nn.Module, *, activations: bool, steps: int, step: int = 0) -> None:
        self.activations = activations
        self.path, self.writes, self.model = folder.path / FOLDER, folder.writes, model
        self.done, self.every = step, max(EVERY, steps // POINTS)
        self._values: list[tuple[int, Tensor]] = []  # step, [layers, NUMBERS] on the device
        quantizers = {m.layer_name: m for m in model.modules() if isinstance(m, GradientFakeQuant)}
        self._quantizers = quantizers if self.writes else {}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if self.writes:
            self.path.mkdir(exist_ok=True)
            self._rows = {name: rows_until(self.path / name, step) for name in (GRADIENTS, ACTIVATIONS)}

    def before(self) -> contextlib.AbstractContextManager[object]:
        """Measure the backward passes that come, if their step is one to record; return the context that it runs in.

        Such a step runs eagerly: nothing is compiled a second time for it.
        """
        if (self.done + 1) % self.every or not self._quantizers:
            return contextlib.nullcontext()
        for quantizer in self._quantizers.values():
            quantizer.watch()
        return eagerly()

    @torch.no_grad()
    def step(self) -> None:
        """Take note of the step that the optimizer has just taken."""
        self.done += 1
        if self.done % self.every or not self._quantizers:
            return
        self._values.append((self.done, torch.stack([_numbers(q) for q in self._quantizers.values()])))
        for quantizer in self._quantizers.values():
            quantizer.watch(False)

    def save(self) -> None:
        """Write what there is so far. To be called before the run writes a checkpoint, so that nothing is lost."""
        if not self.writes:
            return
        for step, values in self._values:
            layers = dict(zip(self._quantizers, map(_row, values.tolist()), strict=True))
            self._rows[GRADIENTS].append({"step": step, "layers": layers})
        self._values = []
        for name, rows in self._rows.items():
            if rows:
                write_file(self.path / name, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def epoch(self, row: Mapping[str, Any], batch: Any) -> None:
        """Write the state at the end of an epoch.

        Args:
            row: of the run's metrics; its epoch is taken.
            batch: on which activations are measured; see :func:`fastqat.activation_statistics`.
        """
        if not self.writes:
            return
        if self.activations:
            found = activation_statistics(self.model, [batch])
            layers = {each.layer: _activation(each) for each in found}
            # A run that was killed between the last step of an epoch and its end has been here before.
            rows = [each for each in self._rows[ACTIVATIONS] if each["step"] < self.done]
            self._rows[ACTIVATIONS] = [*rows, {"step": self.done, "epoch": row["epoch"], "layers": layers}]
        self.save()


def _numbers(quantizer: GradientFakeQuant) -> Tensor:
    """What is recorded of a gradient, float32 [NUMBERS]."""
    assert quantizer.watched is not None
    if quantizer.symmetric:
        limit = quantizer.get_buffer("limit")
        grid = [quantizer.gamma, -limit, limit]
    else:
        low = quantizer.get_buffer("range_low")
        grid = [torch.full_like(low, torch.nan), low, quantizer.get_buffer("range_high")]
    return torch.cat([*grid, quantizer.watched])


def _row(values: list[float]) -> dict[str, float | None]:
    """JSON knows no NaN: what does not exist is null."""
    return {name: _finite(value) for name, value in zip(NUMBERS, values, strict=True)}


def _activation(found: ActivationStatistics) -> dict[str, float | None]:
    numbers = {"low": found.range_low, "high": found.range_high, "clipped": found.clipped, "sqnr": found.sqnr}
    return {name: _finite(value) for name, value in numbers.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
