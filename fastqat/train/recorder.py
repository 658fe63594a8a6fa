"""What a run keeps of the oscillations of its weights, for ``fastqat report``: small files in ``RUN/oscillations``.

    steps.jsonl     counts by kind of layer, at some hundred steps
    epochs.jsonl    the summary of every epoch, layer by layer
    start.npz, end.npz   where the latent weights lie between the codes, before the first step and after the last epoch
    traces.npz      the last steps of the weights that oscillate most

Training never waits for it, and never notices it: it reads, and what it reads stays on the device until :meth:`save`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastqat.oscillation import STEP, latent_codes, oscillation_summary, quantized_weights, tracked, tracked_counts
from fastqat.train.files import write_file
from fastqat.train.run_folder import RunFolder
from fastqat.train.traces import Traces

FOLDER = "oscillations"
STEPS, EPOCHS, START, END, TRACES = "steps.jsonl", "epochs.jsonl", "start.npz", "end.npz", "traces.npz"
POINTS = 400  # on the time axis of a whole run
EVERY = 4  # steps between points at least: counting takes 2 % of a step of MobileNetV2
BINS = 32  # of a histogram, per code
MARGIN = 1.5  # codes beyond the ends of the grid that a histogram shows


class Recorder:
    """Follows a tracked network through the steps of quantization-aware training.

    ::

        recorder = Recorder(run.folder, model, steps=all_steps, step=steps_done_before)
        for ...:
            optimizer.step();  recorder.step()
            ...                recorder.save()      # before each checkpoint
        recorder.epoch(row)                         # after the row of an epoch was measured; saves, too

    A run that goes on from a checkpoint makes a new one at the step of the checkpoint: what was recorded after that
    step is dropped, and recorded again. Traces begin anew.

    Args:
        folder: of the run; where it does not write (in all processes but one), nothing is recorded.
        model: prepared, with ranges, with quantizers that track.
        steps: optimizer steps of the whole training.
        step: those that are done.

    Raises:
        OSError: something cannot be written; what was there is still there.
    """

    def __init__(self, folder: RunFolder, model: nn.Module, *, steps: int, step: int = 0) -> None:
        self.path, self.writes, self.model = folder.path / FOLDER, folder.writes, model
        self.done = step
        self.every = max(EVERY, steps // POINTS)
        self._counts: list[tuple[int, list[str], Tensor]] = []  # step, kinds of layers, and their counts on the device
        if not self.writes:
            return
        self.path.mkdir(exist_ok=True)
        self._rows = {name: rows_until(self.path / name, step) for name in (STEPS, EPOCHS)}
        self._weights = [each for each in quantized_weights(model) if each.quantizer.tracker is not None]
        self._traces = Traces(self._weights, step)
        if step == 0:
            write_file(self.path / START, self._histograms())

    def step(self) -> None:
        """Take note of the step that the optimizer has just taken."""
        self.done += 1
        if not self.writes:
            return
        self._traces.record()
        if self.done % self.every == 0 and (weights := tracked(self._weights)):
            self._counts.append((self.done, [each.kind for each in weights], tracked_counts(weights)))

    def save(self) -> None:
        """Write the counts so far. To be called before the run writes a checkpoint, so that none is lost."""
        if not self.writes:
            return
        if self._counts:
            read = iter(torch.cat([counts for *_, counts in self._counts]).tolist())  # the only copy
            self._rows[STEPS] += [_by_kind(step, kinds, read) for step, kinds, _ in self._counts]
            self._counts = []
        for name, rows in self._rows.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_file(self.path / name, text.encode())

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Write the state at the end of an epoch.

        Args:
            row: of the run's metrics; its phase and epoch are taken.
        """
        if not self.writes:
            return
        when = {"step": self.done, "phase": row["phase"], "epoch": row["epoch"]}
        # A run that was killed between the last step of an epoch and its end has been here before.
        rows = [each for each in self._rows[EPOCHS] if each["step"] < self.done]
        self._rows[EPOCHS] = [*rows, {**when, **oscillation_summary(self.model)}]
        self.save()
        write_file(self.path / END, self._histograms())
        if traces := self._traces.arrays():
            write_file(self.path / TRACES, npz(traces))

    @torch.no_grad()
    def _histograms(self) -> bytes:
        """Histogram of the latent weights of each layer on the axis of its codes; see :func:`histogram`."""
        weights = [each for each in self._weights if each.quantizer.initialized]
        arrays = {
            "step": np.array(self.done),
            "names": np.array([each.name for each in weights], dtype=str),
            "kinds": np.array([each.kind for each in weights], dtype=str),
            "codes": np.array([each.quantizer.codes for each in weights]).reshape(-1, 2),
        }
        for index, each in enumerate(weights):
            latent = latent_codes(each.latent(), each.quantizer)
            arrays[f"histogram{index}"] = histogram(latent, *each.quantizer.codes).cpu().numpy()
        return npz(arrays)


def histogram(latent: Tensor, qmin: int, qmax: int) -> Tensor:
    """Count values in bins of 1 / :data:`BINS`, from qmin - 1.5 to qmax + 1.5; the first and last take what is beyond.

    Args:
        latent: float32, any shape, on the axis of the codes.
        qmin, qmax: the codes at the ends of the grid.

    Returns:
        int64 [(qmax - qmin + 3) * BINS + 2]; codes and thresholds lie on borders of bins.
    """
    bins = round((qmax - qmin + 2 * MARGIN) * BINS)
    place = ((latent.double() - (qmin - MARGIN)) * BINS).floor().nan_to_num(bins).clamp(-1, bins).long() + 1
    return torch.bincount(place.flatten(), minlength=bins + 2)


def npz(arrays: Mapping[str, Any]) -> bytes:
    """Return the content of a compressed file of named arrays."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the rows of a file up to a step; those after it are of steps that the run takes again."""
    if not path.is_file():
        return []
    return [row for line in path.read_text().splitlines() if (row := json.loads(line))["step"] <= step]


def _by_kind(step: int, kinds: list[str], counts: Iterator[list[int]]) -> dict[str, Any]:
    """Sums over the layers of each kind; takes the counts of as many layers as there are kinds."""
    row: dict[str, Any] = {"step": step}
    for kind, layer in zip(kinds, counts, strict=False):
        own = layer[:STEP]
        row[kind] = [a + b for a, b in zip(row[kind], own, strict=True)] if kind in row else own
    return row
