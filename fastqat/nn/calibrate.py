"""``calibrate``: sets the ranges of a model's quantizers from some batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

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
) -> nn.Module:
    """Set the ranges of the activation quantizers from some batches, in one pass and in evaluation mode.

    While it runs, the quantizers being calibrated pass their input through; those of weights quantize as ever. A
    compiled model runs eagerly here.

    Args:
        model: a module that contains quantizers.
        batches: each is a tensor; (inputs, targets), of which only the inputs are used; or a mapping, whose items are
            the model's keyword arguments. Tensors are moved to the device of the model.
        forward: runs the model on a batch of any other kind; it moves what it must.
        progress: show a bar on a terminal (stderr), where rich or tqdm is installed.

    Returns:
        The model, every module of it in the training mode that it had.

    Raises:
        ValueError: there is nothing to calibrate, no batch, or a quantizer that no finite value reached; the message
            names it, and the others have their ranges.
    """
    parametrized = {q for m in model.modules() if isinstance(m, ParametrizationList) for q in m}
    of_weights = {q for m in model.modules() if isinstance(m, QuantizedLayer) for q in m.weight_quantizers().values()}
    named = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuant) and m not in parametrized}
    observing = [q for q in named.values() if q.range != "fixed" and q not in of_weights]
    if not observing:
        checks.fail(ValueError, "model", "a model with quantizers to calibrate", type(model).__name__)
    run = forward or run_batch
    count = 0
    with evaluating(model), eagerly(), Calls(named.values()) as calls:
        try:
            for q in observing:
                q.begin_calibration()
            for batch in _with_bar(batches, progress):
                run(model, batch)
                count += 1
        finally:
            blind = {q for q in observing if not q.end_calibration()}
    blind |= {q for q in of_weights if not calls.count[q]}  # a layer that something goes past
    if blind:
        got = f"{count} batches, in which these saw none: {', '.join(name for name, q in named.items() if q in blind)}"
        checks.fail(ValueError, "batches", "data for every quantizer", got)
    return model


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
