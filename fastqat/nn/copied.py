"""What a quantizer has to prove where its tensors were written from outside: an average of integers is no integer.

Whoever averages networks copies a module and writes into its tensors, or into those of a dict. Floating values may be
averaged; codes, words and counts may be copied, and nothing else. What was done to them shows where the copy is used:
tensors count how often they were written, and a quantizer remembers at which count its integers were right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastqat.nn.state import version_of
from fastqat.nn.tracking import SEAL, Tracker

if TYPE_CHECKING:
    from fastqat.nn.fake_quant import FakeQuant
    from fastqat.nn.ranged import RangedQuantizer

_CURE = "make it once ranges are known (fastqat.calibrate), and copy integers; fastqat.AveragedModel does right"


def refuse_copy(quantizer: RangedQuantizer, name: str, wanted: str, got: str) -> NoReturn:
    """Refuse a tensor that was written from outside, with the cure."""
    layer = f"quantizer of layer {quantizer.layer_name or '?'!r}: {name}"
    raise ValueError(f"{layer}: wanted {wanted}; got {got}. If this is an average of models, {_CURE}")


def versions(quantizer: RangedQuantizer) -> tuple[int, ...]:
    """How often the integers of a quantizer were written."""
    own = version_of(quantizer._buffers["qrange"])  # type: ignore[arg-type]  # it has one
    tracker = quantizer._modules.get("tracker")
    if tracker is None or tracker._buffers["words"] is None:
        return (own,)
    of_tracker = (tracker._buffers[name] for name in ("words", "counts", "clock"))
    return (own, *(version_of(t) for t in of_tracker if t is not None))


def check_copy(quantizer: FakeQuant) -> None:
    """Check the integers of a quantizer, if they were written since they were checked last: one that has a range.

    Raises:
        ValueError: they are an average, of another bit-width, or behind the rest.
    """
    if torch.compiler.is_compiling() or not quantizer.initialized:
        return
    now = versions(quantizer)
    if now == quantizer._checked or quantizer.qrange.is_meta or is_in_torch_dispatch_mode():
        return
    _check_codes(quantizer)
    if quantizer.tracker is not None and quantizer.tracker.words is not None:
        _check_tracker(quantizer, quantizer.tracker)
    quantizer.note_checked(now)


def _check_codes(quantizer: FakeQuant) -> None:
    qmin, qmax = quantizer.qrange.tolist()
    if (qmin, qmax) == quantizer.codes:
        return
    bits = quantizer.bits
    if (qmax - qmin + 1).bit_length() - (not quantizer.restricted) == bits:
        try:
            quantizer.restore_codes()  # those of the other sign, where data decide it
        except ValueError:
            pass
        else:
            return
    low, high = quantizer.codes
    refuse_copy(quantizer, "qrange", f"{low} to {high}, the codes of {bits} bits", f"{qmin} to {qmax}")


def _check_tracker(quantizer: FakeQuant, tracker: Tracker) -> None:
    counts = tracker.counts.tolist()
    if counts[4] != SEAL:
        refuse_copy(quantizer, "tracker.counts", f"{SEAL} at the end", f"{counts[4]}: integers were averaged")
    last, step = float(tracker.clock[1]), int(quantizer.step)
    stale = last > step or (step == 0 and not last.is_integer())
    if stale and tracker.options.freezes:
        got = f"those of step {step} beside averages of step {last:g}"
        refuse_copy(quantizer, "tracker.words", "frozen codes", got)
