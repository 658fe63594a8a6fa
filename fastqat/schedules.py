"""Values that change with the step: thresholds, dampening weights, and whatever else follows a schedule.

The value on the device is computed from the step count on the device: nothing is read back, nothing is compiled anew
from step to step, and a CUDA graph that holds the computation goes on following the schedule when it is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastqat.ops import checks

KINDS = ("cosine", "linear", "step", "constant")


@dataclass(frozen=True)
class Schedule:
    """A value h(t) over T steps that stays at ``start`` until the step a*T and is at ``end`` from the step T on.

    With p = (t - a*T) / (T - a*T), for t >= a*T::

        cosine     h = end + (start - end) * (1 + cos(pi * p)) / 2
        linear     h = end + (start - end) * (1 - p)
        step       h = end
        constant   h = start

    t counts the optimizer steps taken so far: it is 0 in the first step, which therefore sees the start; in the
    released code the first step is 1. The options are all that there is: two schedules of equal options are equal, and
    nothing of a schedule needs a place in a checkpoint but :meth:`to_dict`.

    Args:
        kind: "cosine", "linear", "step" or "constant".
        start, end: the values; "constant" has no end.
        steps: T, at least 1. "constant" needs none, unless it is off before it begins.
        begin: a, the part of the steps after which the change begins, in [0, 1).
        off_before: the value before a*T is 0, not ``start``: a freezing threshold of 0 freezes nothing.

    Raises:
        TypeError, ValueError: naming the option, what was wanted, and what came.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, and its released code
        for the cosine and its relative start.
    """

    kind: str
    start: float
    end: float | None = None
    steps: int | None = None
    begin: float = 0.25
    off_before: bool = False

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, KINDS)
        constant = self.kind == "constant"
        if constant and self.end is not None:
            checks.fail(ValueError, "end", "none for a constant", self.end)
        for name in ("start", "begin") if constant else ("start", "end", "begin"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))  # 1 and 1.0 are one schedule
        if not 0 <= self.begin < 1:
            checks.fail(ValueError, "begin", "a part of the steps, in [0, 1)", self.begin)
        if not isinstance(self.off_before, bool):
            checks.fail(TypeError, "off_before", "True or False", repr(self.off_before))
        if self.steps is None and constant and not self.off_before:
            return
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            checks.fail(TypeError, "steps", "the number of all steps, an int", repr(self.steps))
        elif self.steps < 1:
            checks.fail(ValueError, "steps", "at least 1", self.steps)

    def __call__(self, step: int) -> float:
        """Return the value at a step: the definition, in float64."""
        begin, length = self._change()
        if step < begin:
            return 0.0 if self.off_before else self.start
        return self._mixed(min((step - begin) / length, 1.0), math.cos)

    def tensor(self, step: Tensor) -> Tensor:
        """Return the value at a step that is known to the device alone.

        Args:
            step: count of optimizer steps, int64 of any shape; that of a quantizer is [1].

        Returns:
            float32 of the shape of step, on its device: the float64 definition within 1 unit in the last place.

        Raises:
            TypeError: step is no tensor of integers.
        """
        if not isinstance(step, Tensor) or step.dtype != torch.int64:
            checks.fail(TypeError, "step", "an int64 tensor", getattr(step, "dtype", type(step).__name__))
        begin, length = self._change()
        t = step.double()
        after = self._mixed(((t - begin) / length).clamp(max=1.0), torch.cos)
        return after.masked_fill(t < begin, 0.0 if self.off_before else self.start).float()

    def to_dict(self) -> dict[str, Any]:
        """Return the options that are not at their defaults, as YAML and JSON know them."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], steps: int | None = None) -> Schedule:
        """Make a schedule from the options that :meth:`to_dict` returned, or that someone wrote.

        Args:
            options: of the schedule, by name.
            steps: T, where the options name none: a recipe need not know how long the training will be.

        Raises:
            TypeError, ValueError: an option that is unknown, missing or wrong.
        """
        if not isinstance(options, Mapping):
            checks.fail(TypeError, "schedule", "options by name", repr(options))
        known = [field.name for field in fields(cls)]
        for name in options:
            checks.choice("schedule", name, tuple(known))
        for name in ("kind", "start"):
            if name not in options:
                checks.fail(ValueError, "schedule", f"the option {name!r}", ", ".join(map(str, options)) or "none")
        return cls(**{"steps": steps, **options})

    def _change(self) -> tuple[float, float]:
        """First step of the change, and its length in steps."""
        begin = self.begin * self.steps if self.steps is not None else 0.0
        return begin, (self.steps or 1) - begin

    def _mixed(self, p: Any, cos: Callable[[Any], Any]) -> Any:
        """Value at the part p of the change, a float or a tensor."""
        end = self.start if self.end is None else self.end
        if self.kind == "cosine":
            share = (1 + cos(math.pi * p)) / 2
        else:
            share = 1 - p if self.kind == "linear" else 0 * p
        # Rounding keeps the order of a product and of a sum with a constant, so that the value is monotone like p, and
        # exactly the end at p = 1.
        return end + (self.start - end) * share


def cosine(start: float, end: float, *, steps: int, begin: float = 0.25, off_before: bool = False) -> Schedule:
    """Make a :class:`Schedule` that falls (or rises) along half a cosine."""
    return Schedule("cosine", start, end, steps, begin, off_before)


def linear(start: float, end: float, *, steps: int, begin: float = 0.25, off_before: bool = False) -> Schedule:
    """Make a :class:`Schedule` along a line."""
    return Schedule("linear", start, end, steps, begin, off_before)


def step(start: float, end: float, *, steps: int, begin: float = 0.25) -> Schedule:
    """Make a :class:`Schedule` that jumps from start to end at the step begin * steps."""
    return Schedule("step", start, end, steps, begin)


def constant(value: float) -> Schedule:
    """Make a :class:`Schedule` that has one value, from the first step on."""
    return Schedule("constant", value)


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        checks.fail(TypeError, name, "a number", repr(value))
    elif not math.isfinite(value):
        checks.fail(ValueError, name, "a finite number", value)
    return float(value)  # type: ignore[arg-type]
