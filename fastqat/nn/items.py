"""What a quantizer hands to :mod:`fastqat.multi_tensor`: the tensors and the constants of one quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastqat.multi_tensor import STATE, Item, Operands, Options
from fastqat.nn.tracking import value_at
from fastqat.ops.estimators import ESTIMATORS, STOCHASTIC
from fastqat.schedules import Schedule

if TYPE_CHECKING:
    from fastqat.nn.fake_quant import FakeQuant


def item_of(
    quantizer: FakeQuant,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    out_dtype: torch.dtype | None,
    value_of: Callable[[float | Schedule, Tensor], Tensor] = value_at,
) -> Item:
    """The quantization of x by a quantizer whose range is set.

    Args:
        quantizer: whose options count.
        x: checked, of the shape that the scale wants.
        scale, zero_point: of the quantizer, or of a range that follows the data.
        axis: in [0, x.dim()), or None.
        out_dtype: of the result.
        value_of: the value of a number or a schedule at a step.
    """
    estimator = ESTIMATORS[quantizer.estimator][0]
    tracker, lsq = quantizer.tracker, quantizer.grad_scale == "lsq"
    operands = Operands(x, scale, zero_point, quantizer.offset, quantizer.qrange, quantizer.step)
    options = Options(
        axis=axis,
        group_size=quantizer.group_size,
        eps=quantizer.eps,
        rounded_mask=quantizer.ste_mask == "rounded",
        lsq=lsq,
        factor=None if lsq else quantizer.grad_scale,  # type: ignore[arg-type]  # no other string
        out_dtype=out_dtype,
        estimator=estimator,
        seed=quantizer.seed,
        tensor_id=quantizer.tensor_id if estimator == STOCHASTIC else -1,
    )
    if quantizer.estimator_strength is not None:
        operands = operands._replace(strength=quantizer.estimator_strength)
    if quantizer.dampening is not None and quantizer.training:
        pull = value_of(quantizer.dampening.weight, quantizer.step)
        operands = operands._replace(dampening=pull * (2 * quantizer.dampening.factor(x)))
    if tracker is not None:
        if not torch.compiler.is_compiling():
            tracker.prepare(x, quantizer.codes[0])
        threshold = value_of(tracker.options.freeze_threshold or 0.0, quantizer.step)
        operands = operands._replace(threshold=threshold, **{name: getattr(tracker, name) for name in STATE})
        options = options._replace(momentum=tracker.options.momentum, use_average=tracker.options.use_average)
    return operands, options
