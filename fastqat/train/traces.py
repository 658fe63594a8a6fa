"""Traces of single weights over the steps: latent value, code, and average of the codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastqat.nn.tracking import Tracker
from fastqat.oscillation import COUNTS, KINDS, QuantizedWeight, channels_of, latent_codes, tracked, tracked_counts

LENGTH = 512  # steps of a trace
SHORTEST = 16
FOLLOWED, SHOWN = 32, 3  # weights of a layer: those that oscillated most before the trace, and within it


class Traces:
    """Follows the weights that oscillate most, of each kind of layer in the layer that has most of them.

    They are chosen anew from time to time, so that they are those of late.

    Args:
        weights: of which some may be tracked later only.
        step: optimizer steps that are done.
    """

    def __init__(self, weights: list[QuantizedWeight], step: int) -> None:
        self._weights, self._step = weights, step
        self._running: list[_Trace] = []
        self._finished: list[_Trace] = []
        self._left = 0  # steps until the next choice

    @torch.no_grad()
    def record(self) -> None:
        """Take note of the state after one more optimizer step."""
        self._step += 1
        if self._left == 0 or not all(trace.is_current() for trace in self._running):
            self._choose()
        for trace in self._running:
            trace.record()
        self._left -= 1

    def arrays(self) -> dict[str, Any]:
        """Return what was recorded last, as named arrays; nothing if there is nothing.

        For trace i: name, kind [], index [W] in the flattened weight, steps [T], and latent, code, average [W, T].
        """
        # A choice that was made just now has nothing to show yet.
        fresh = self._running and self._finished and 2 * self._running[0].recorded < self._finished[0].recorded
        found: dict[str, Any] = {}
        shown = [trace for trace in (self._finished if fresh else self._running) if trace.is_current()]
        for i, trace in enumerate(shown):
            found |= {f"{name}{i}": array for name, array in trace.arrays().items()}
        return found

    def _choose(self) -> None:
        """Begin new traces; the older a run is, the longer."""
        self._left = max(SHORTEST, min(LENGTH, self._step // 2))
        weights = tracked(self._weights)
        if not weights:
            return
        counts = tracked_counts(weights).tolist()  # waits for the device: once per choice
        oscillating = {each: row[COUNTS.index("oscillating")] for each, row in zip(weights, counts, strict=True)}
        best: dict[str, QuantizedWeight] = {}
        for each in sorted(weights, key=lambda each: oscillating[each], reverse=True):
            best.setdefault(each.kind, each)
        self._finished, self._running = self._running, [_Trace(best[k], self._left) for k in KINDS if k in best]


class _Trace:
    """The most oscillating weights of a layer.

    What is recorded is the state of its tracker as it is, which is decoded only when it is written.

    Args:
        weight: the layer's.
        length: steps.
    """

    def __init__(self, weight: QuantizedWeight, length: int) -> None:
        self.weight, self.recorded = weight, 0
        tracker: Any = weight.quantizer.tracker
        self._seen = tracker, tracker.resets
        frequency = torch.where(tracker.frozen(), -1.0, tracker.frequency())
        chosen = frequency.flatten().topk(min(FOLLOWED, frequency.numel())).indices
        self.index, self.place = chosen, torch.unravel_index(chosen, frequency.shape)
        self.channels = channels_of(weight.latent(), weight.quantizer)[self.place]

        def buffer(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, length, dtype=dtype, device=chosen.device)

        count = len(chosen)
        self.latent, self.scaled_average = buffer(count, torch.float32), buffer(count, torch.float32)
        self.words, self.clock = buffer(count, tracker.words.dtype), buffer(3, torch.float64)
        self.steps = buffer(1, torch.int64)  # of the latent weights

    def is_current(self) -> bool:
        """False once the tracker has begun anew, as it does with another bit-width."""
        tracker: Any = self.weight.quantizer.tracker
        return (tracker, tracker.resets) == self._seen

    def record(self) -> None:
        """Copy the latent weights, and what the tracker has of them."""
        quantizer, t = self.weight.quantizer, self.recorded
        tracker: Any = quantizer.tracker
        self.latent[:, t] = latent_codes(self.weight.latent()[self.place], quantizer, self.channels)
        self.words[:, t] = tracker.words[self.place]
        self.scaled_average[:, t] = tracker.scaled_average[self.place]
        self.clock[:, t] = tracker.clock
        self.steps[:, t] = quantizer.step
        self.recorded += 1

    def arrays(self) -> dict[str, Any]:
        """Return the steps of which both are known: a tracker sees a weight in the forward after its update."""
        tracker: Any = self.weight.quantizer.tracker
        recorded: Any = Tracker(tracker.options, self.weight.quantizer.bits, torch.device("cpu"))
        recorded.lowest = tracker.lowest
        for name in ("words", "scaled_average", "clock"):
            setattr(recorded, name, getattr(self, name)[:, : self.recorded].cpu())
        latent_steps, tracked_steps = self.steps[0, : self.recorded].cpu(), recorded.clock[1].long()
        steps, of_latent, of_state = np.intersect1d(latent_steps, tracked_steps, return_indices=True)
        code = recorded.codes().numpy()[:, of_state]
        changes = (np.diff(code) != 0).sum(1)
        shown = np.argsort(-changes, kind="stable")[:SHOWN]
        return {
            "name": np.array(self.weight.name),
            "kind": np.array(self.weight.kind),
            "index": self.index.cpu().numpy()[shown],
            "steps": steps,
            "latent": self.latent.cpu().numpy()[shown][:, of_latent],
            "code": code[shown],
            "average": recorded.average().numpy()[shown][:, of_state],
        }
