"""What quantizers hand to :mod:`fastqat.multi_tensor`: constants of their quantization, and values at their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastqat.multi_tensor import STATE, Constants, Plan, apply_multi_tensor
from fastqat.nn.tracking import value_at
from fastqat.ops.estimators import ESTIMATORS, STOCHASTIC
from fastqat.schedules import Schedule

if TYPE_CHECKING:
    from fastqat.nn.fake_quant import FakeQuant


def constants_of(quantizer: FakeQuant, x: Tensor, axis: int | None, out_dtype: torch.dtype | None) -> Constants:
    """What stays from step to step of the quantization of x by a quantizer whose range is set.

    Args:
        quantizer: whose options count.
        x: checked, of the shape that the scale wants.
        axis: in [0, x.dim()), or None.
        out_dtype: of the result.
    """
    tracker, estimator, factor = quantizer.tracker, ESTIMATORS[quantizer.estimator][0], quantizer.grad_scale
    if tracker is not None and not torch.compiler.is_compiling():
        tracker.prepare(x, quantizer.codes[0])
    elif tracker is not None and tracker.words is None:
        if quantizer.training:
            raise RuntimeError(
                "FakeQuant: wanted a tracked weight that was seen before compilation; got the first one inside a "
                "compiled forward. Call the module once eagerly."
            )
        tracker = None  # nothing is frozen
    return Constants(
        quantizer.qrange,
        quantizer.step,
        axis,
        quantizer.group_size,
        quantizer.eps,
        quantizer.ste_mask == "rounded",
        factor == "lsq",
        None if factor == "lsq" else factor,  # type: ignore[arg-type]  # no other string
        out_dtype,
        quantizer.is_on_offset_grid,
        estimator,
        quantizer.estimator_strength,
        quantizer.seed,
        quantizer.tensor_id if estimator == STOCHASTIC else -1,
        0.0 if tracker is None else tracker.momentum,
        tracker is None or tracker.options.use_average,
        *([] if tracker is None else [tuple(tracker._buffers[name] for name in STATE)]),
    )


def threshold_of(quantizer: FakeQuant, constants: Constants) -> float | Schedule | None:
    """The freezing threshold of a quantizer that tracks; None of one that does not."""
    if constants.state[0] is None or quantizer.tracker is None:
        return None
    return quantizer.tracker.options.freeze_threshold or 0.0


def dampening_of(quantizer: FakeQuant, x: Tensor) -> tuple[float | Schedule | None, float]:
    """The weight of the dampening in training, or None; and its factor in the gradient of x."""
    dampening = quantizer.dampening
    if dampening is None or not quantizer.training:
        return None, 0.0
    return dampening.weight, 2 * dampening.factor(x)


class StepValues:
    """Values of many quantizers at the step of each: one computation for all that share a schedule.

    Args:
        values: a number or a schedule for each, or None.
        steps: int64 [1] of each, which is counted in place.
        none: stands for the value of None.
        factors: times each; None is times 1.
    """

    def __init__(
        self,
        values: Sequence[float | Schedule | None],
        steps: Sequence[Tensor],
        none: Tensor,
        factors: Sequence[float] | None = None,
    ) -> None:
        places: dict[Schedule, list[int]] = {}
        self.known = [none] * len(values)
        for i, value in enumerate(values):
            if isinstance(value, Schedule):
                places.setdefault(value, []).append(i)
            elif value is not None:
                at = value_at(value, steps[i])
                self.known[i] = at if factors is None else at * factors[i]
        self.scheduled = []
        for schedule, where in places.items():
            by = None if factors is None else torch.cat([value_at(factors[i], steps[i]) for i in where])
            self.scheduled.append((schedule, where, [steps[i] for i in where], by))

    def now(self) -> list[Tensor]:
        """The values, float32 [1] each."""
        if not self.scheduled:
            return self.known
        values = list(self.known)
        for schedule, places, steps, factors in self.scheduled:
            at = schedule.tensor(torch.cat(steps))
            for i, value in zip(places, (at if factors is None else at * factors).split(1), strict=True):
                values[i] = value
        return values


def quantize_alone(
    quantizer: FakeQuant,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The quantization of x alone.

    Args:
        quantizer, x, axis, out_dtype: see :func:`constants_of`.
        scale, zero_point: of the quantizer, or of a range that follows the data.
    """
    constants = constants_of(quantizer, x, axis, out_dtype)
    plan = Plan([constants], x.device, quantizer.training)
    threshold, (weight, factor) = threshold_of(quantizer, constants), dampening_of(quantizer, x)
    shift = quantizer.grid_offset() if constants.offset_grid else zero_point
    thresholds = [plan.none if threshold is None else value_at(threshold, constants.step)]
    dampenings = [plan.none if weight is None else value_at(weight, constants.step) * factor]
    return apply_multi_tensor(plan, [x], [scale], [shift], thresholds, dampenings)[0]
