"""All that changes while a run goes on, and its way into a checkpoint and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fastqat.adaqat import AdaQAT
from fastqat.averaging import AveragedModel
from fastqat.nn.state import take_bits_as_data
from fastqat.train.checkpoint import Snapshot
from fastqat.train.config import OPTIONS, Config
from fastqat.train.distributed import Processes
from fastqat.train.optimization import Updates
from fastqat.train.progress import Meter
from fastqat.train.random_state import random_state, restore_random_state

PHASES = ("FP32", "PTQ", "QAT", "done")


@dataclass
class Position:
    """Where a run stands.

    Args:
        phase: one of :data:`PHASES`.
        epoch: finished epochs of the phase.
        batch: finished batches of the running epoch.
        seconds: spent on them.
    """

    phase: str = PHASES[0]
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0


class RunState:
    """Weights, their average, optimizers, learned bit-widths, position, sums of the running epoch, random numbers.

    Args:
        config: the options of the run.
        model: the network; it learns and is quantized in place.
        processes: those that train together.
    """

    def __init__(self, config: Config, model: nn.Module, processes: Processes) -> None:
        self.config, self.model, self.processes = config, model, processes
        self.position = Position()
        self.meter = Meter()
        self.best: float | None = None  # test accuracy of the best quantized weights
        self.average: AveragedModel | None = None
        self.updates: Updates | None = None
        self.search: AdaQAT | None = None
        self._restored: dict[str, Tensor] | None = None  # state of optimizers that are still to be made
        self._restored_search: dict[str, Any] | None = None

    def begin(self, updates: Updates) -> None:
        """Take the optimizers of a phase: fresh, or as they were where the phase is resumed."""
        self.updates = updates
        if self._restored is not None:
            updates.load(self._restored)
            self._restored = None
        if self.config.ema and self.average is None:
            self.average = AveragedModel(self.model, self.config.ema)

    def begin_search(self, search: AdaQAT) -> None:
        """Take what learns bit-widths: fresh, or as it was where the phase is resumed."""
        self.search = search
        if self._restored_search is not None:
            search.load_state_dict(self._restored_search)
            self._restored_search = None

    def end(self, phase: str) -> None:
        """Leave a phase for the beginning of the next one."""
        self.position, self.meter = Position(phase), Meter()
        self.average = self.updates = self.search = None

    def end_epoch(self) -> None:
        """Leave an epoch for the beginning of the next one."""
        self.position, self.meter = Position(self.position.phase, self.position.epoch + 1), Meter()

    def snapshot(self, rows: list[dict[str, Any]]) -> Snapshot:
        """Return a copy of the state; every process has to call this.

        Args:
            rows: the metrics so far.
        """
        own = {"random": random_state(self.processes.device), "meter": self.meter.state()}
        facts = {
            "config": _decisive(self.config),
            "position": asdict(self.position),
            "best": self.best,
            "rows": rows,
            "processes": self.processes.gather(own),
        }
        if self.search:
            facts["search"] = self.search.state_dict()
        parts: dict[str, dict[str, Tensor]] = {"model": self.model.state_dict()}
        if self.average:
            parts["average"] = self.average.module.state_dict()
        if self.updates:
            parts["optimizers"] = self.updates.tensors()
        tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        return Snapshot(facts, tensors)

    def check(self, snapshot: Snapshot) -> None:
        """Raise a ValueError where a snapshot is of a run with other options."""
        wanted, got = _decisive(self.config), snapshot.facts["config"]
        for name in wanted:
            if json.dumps(wanted[name]) != json.dumps(got.get(name)):  # a checkpoint has been through JSON
                raise ValueError(f"wanted a checkpoint of a run with {name} {wanted[name]!r}; got {got.get(name)!r}")

    def restore(self, snapshot: Snapshot, prepare: Callable[[], object]) -> None:
        """Go back to a snapshot.

        Args:
            snapshot: of a run with the same options.
            prepare: quantizes the network; used if it was quantized by then.

        Raises:
            ValueError: the network is another one by now, as the code that makes it may have changed.
        """
        facts = snapshot.facts
        self.position, self.best = Position(**facts["position"]), facts["best"]
        if PHASES.index(self.position.phase) > PHASES.index("PTQ"):
            prepare()
        if facts.get("search"):  # its bit-widths are those of the moment
            take_bits_as_data(self.model)
        try:
            self.model.load_state_dict(_part(snapshot.tensors, "model"))
        except RuntimeError as error:
            wanted, got = "the network of the checkpoint", " ".join(str(error).split())
            raise ValueError(f"model {self.config.model}: wanted {wanted}; got {got}") from None
        if average := _part(snapshot.tensors, "average"):
            self.average = AveragedModel(self.model, self.config.ema)
            self.average.module.load_state_dict(average)
        self._restored = _part(snapshot.tensors, "optimizers") or None
        self._restored_search = facts.get("search")
        self._restore_own(facts["processes"])

    def _restore_own(self, saved: list[dict[str, Any]]) -> None:
        """Take what this process had; another number of processes has the sums, and random numbers of its own."""
        rank, world_size = self.processes.rank, self.processes.world_size
        if len(saved) == world_size:
            self.meter = Meter(saved[rank]["meter"])
        else:
            total = [sum(values) for values in zip(*(each["meter"] for each in saved), strict=True)]
            self.meter = Meter(total if self.processes.main else None)
            if self.processes.main:
                print(f"saved by {len(saved)} processes, goes on with {world_size}: not to the bit", flush=True)
        if rank < len(saved):
            restore_random_state(saved[rank]["random"], self.processes.device)


def _decisive(config: Config) -> dict[str, Any]:
    """The options that decide what comes out of a run."""
    return {name: value for name, value in config.plain().items() if name != "out" and not OPTIONS[name].movable}


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
