"""What a run keeps of the transitions of its weights, for ``fastqat report``: ``RUN/transitions/steps.jsonl``.

Rate, running rate, target and learning rate of every layer, at some hundred steps. Training never waits for it: what it
takes stays on the device until :meth:`TransitionRecorder.save`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fastqat.train.files import write_file
from fastqat.train.recorder import rows_until
from fastqat.train.run_folder import RunFolder
from fastqat.transition_rate import TransitionRateScheduler

FOLDER, STEPS = "transitions", "steps.jsonl"
POINTS = 400  # on the time axis of a whole run
EVERY = 4  # steps between points at least
NUMBERS = ("rate", "running", "target", "factor")


class TransitionRecorder:
    """Follows scheduled transition rates through quantization-aware training.

    ::

        recorder = TransitionRecorder(run.folder, scheduler, steps=all_steps, step=steps_done_before)
        for ...:
            optimizer.step();  recorder.step()
            ...                recorder.save()      # before each checkpoint, and after each epoch

    Args:
        folder: of the run; where it does not write (in all processes but one), nothing is recorded.
        scheduler: of the updates.
        steps: optimizer steps of the whole training.
        step: those that are done; what was recorded after it is dropped, and recorded again.

    Raises:
        OSError: something cannot be written; what was there is still there.
    """

    def __init__(self, folder: RunFolder, scheduler: TransitionRateScheduler, *, steps: int, step: int = 0) -> None:
        self.path, self.writes, self.scheduler = folder.path / FOLDER / STEPS, folder.writes, scheduler
        self.done, self.every = step, max(EVERY, steps // POINTS)
        self._values: list[tuple[int, Tensor]] = []  # step, float32 [NUMBERS, layers] on the device
        self._rows: list[dict[str, Any]] = []
        if self.writes:
            self.path.parent.mkdir(exist_ok=True)
            self._rows = rows_until(self.path, step)

    def step(self) -> None:
        """Take note of the step that the optimizer has just taken."""
        self.done += 1
        if self.writes and self.done % self.every == 0:
            self._values.append((self.done, torch.stack([getattr(self.scheduler, name) for name in NUMBERS])))

    def save(self) -> None:
        """Write what there is so far. To be called before the run writes a checkpoint, so that nothing is lost."""
        if not self.writes:
            return
        for step, values in self._values:
            numbers = dict(zip(NUMBERS, values.tolist(), strict=True))
            self._rows.append({"step": step, "layers": self.scheduler.layers, **numbers})
        self._values = []
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self._rows).encode())
