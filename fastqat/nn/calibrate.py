"""``calibrate``: sets the ranges of a model's quantizers from some batches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fastqat import ranges
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import Calls, eagerly, evaluating, run_batch
from fastqat.ops import checks


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = True,
    distributed: bool = True,
) -> nn.Module:
    """Set the ranges of the activation quantizers from some batches, in one pass and in evaluation mode.

    While it runs, the quantizers being calibrated pass their input through; those of weights quantize as ever, but for
    those that change the unit of a weight (DoReFa, TRS): batch normalization, which takes that in, has not seen it yet.
    A compiled model runs eagerly here.

    Args:
        model: a module that contains quantizers.
        batches: each is a tensor; (inputs, targets), of which only the inputs are used; or a mapping, whose items are
            the model's keyword arguments. Tensors are moved to the device of the model.
        forward: runs the model on a batch of any other kind; it moves what it must.
        progress: show a bar on a terminal (stderr), where rich or tqdm is installed.
        distributed: where torch.distributed is initialized, each of its processes calls this with batches of its own,
            and all end with the same ranges, those of all batches. False where some do not call it, or where all have
            the same batches.

    Returns:
        The model, every module of it in the training mode that it had.

    Raises:
        ValueError: there is nothing to calibrate, no batch, or a quantizer that no finite value reached; the message
            names it, and the others have their ranges.
        RuntimeError: another process failed; its error says why.

    Whatever else ends it, an error in a batch or an interrupt, leaves all ranges as they were.
    """
    called, of_weights = called_quantizers(model)
    observing = to_calibrate(model)
    if not observing:
        checks.fail(ValueError, "model", "a model with quantizers to calibrate", type(model).__name__)
    run = forward or run_batch
    fact = _Fact()
    with evaluating(model), eagerly(), _in_their_own_unit(of_weights), Calls(called.values()) as calls:
        try:
            for q in observing:
                q.begin_calibration()
            for batch in _with_bar(batches, progress):
                run(model, batch)
                fact.batches += 1
            fact.failed = False
        finally:
            fact.called = {name for name, q in called.items() if calls.count[q]}
            facts, blind = _set_ranges(observing, fact, distributed)
    if any(each.failed for each in facts):
        raise RuntimeError("calibrate: wanted the batches of all processes; got an error in another, which says why")
    reached = set().union(*(each.called for each in facts))
    # A layer that something goes past shows in the quantizer of its weight.
    lost = [name for name, q in called.items() if q in blind or (q in of_weights and name not in reached)]
    if lost:
        got = f"{sum(each.batches for each in facts)} batches, in which these saw none: {', '.join(lost)}"
        checks.fail(ValueError, "batches", "data for every quantizer", got)
    return model


def called_quantizers(model: nn.Module) -> tuple[dict[str, FakeQuant], set[FakeQuant]]:
    """The quantizers that modules call, by name, and which of them are of weights; without parametrizations."""
    parametrized = {q for m in model.modules() if isinstance(m, ParametrizationList) for q in m}
    of_weights = {q for m in model.modules() if isinstance(m, QuantizedLayer) for q in m.weight_quantizers().values()}
    called = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuant) and m not in parametrized}
    return called, of_weights


def to_calibrate(model: nn.Module) -> list[FakeQuant]:
    """The quantizers that :func:`calibrate` sets the ranges of: those that modules call, but for given ranges."""
    called, of_weights = called_quantizers(model)
    return [q for q in called.values() if q.range != "fixed" and q not in of_weights]


@contextlib.contextmanager
def _in_their_own_unit(quantizers: Iterable[FakeQuant]) -> Iterator[None]:
    """Let weights pass whose quantizers change their unit."""
    passing = [q for q in quantizers if q.normalize is not None and q.rescale is None and q.fake_quant_enabled]
    for q in passing:
        q.fake_quant_enabled = False
    try:
        yield
    finally:
        for q in passing:
            q.fake_quant_enabled = True


@dataclass
class _Fact:
    """What one process has to tell the others."""

    batches: int = 0
    failed: bool = True
    called: set[str] = field(default_factory=set)


def _set_ranges(observing: list[FakeQuant], fact: _Fact, distributed: bool) -> tuple[list[_Fact], set[FakeQuant]]:
    """End the calibration; set all ranges, or none where a process failed.

    Returns:
        what each process tells, and the quantizers without data in any.
    """
    observed = {q: q.stop_calibration() for q in observing}
    facts = ranges.gathered(fact) if distributed else [fact]
    if any(each.failed for each in facts):
        return facts, set()
    if distributed:
        observed = {q: ranges.joined(estimators, q.qrange.device) for q, estimators in observed.items()}
    found = {q: q.observed_range(estimators) for q, estimators in observed.items()}
    for q, each in found.items():
        if each is not None:
            q.take_range(each)
    return facts, {q for q, each in found.items() if each is None}


def _with_bar(batches: Iterable[Any], wanted: bool) -> Iterator[Any]:
    """The batches, with a bar on stderr if that is a terminal and a package that draws one is installed."""
    if wanted and sys.stderr.isatty():
        total = len(batches) if isinstance(batches, Sized) else None
        try:
            from rich.console import Console
            from rich.progress import track

            yield from track(batches, "calibrating", total=total, console=Console(stderr=True), transient=True)
            return
        except ImportError:
            pass
        try:
            from tqdm import tqdm

            yield from tqdm(batches, "calibrating", total=total, leave=False)
            return
        except ImportError:
            pass
    yield from batches
