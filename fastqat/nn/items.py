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
    # The dictionaries of the module itself, which take a tenth of the time: there are as many calls as weights.
    buffers, tracker = quantizer._buffers, quantizer.tracker
    estimator, factor, step = ESTIMATORS[quantizer.estimator][0], quantizer.grad_scale, buffers["step"]
    assert step is not None
    dampening = threshold = None
    if quantizer.dampening is not None and quantizer.training:
        pull = value_of(quantizer.dampening.weight, step)
        dampening = pull * (2 * quantizer.dampening.factor(x))
    state: list[Tensor | None] = [None] * len(STATE)
    if tracker is not None and not torch.compiler.is_compiling():
        tracker.prepare(x, quantizer.codes[0])
    elif tracker is not None and tracker.words is None:
        if quantizer.training:
            raise RuntimeError(
                "FakeQuant: wanted a tracked weight that was seen before compilation; got the first one inside a "
                "compiled forward. Call the module once eagerly."
            )
        tracker = None  # nothing is frozen
    if tracker is not None:
        threshold = value_of(tracker.options.freeze_threshold or 0.0, step)
        state = [tracker._buffers[name] for name in STATE]
    operands = Operands(
        x,
        scale,
        zero_point,
        quantizer._parameters["offset"],
        buffers["qrange"],  # type: ignore[arg-type]  # it is never None
        step,
        buffers["estimator_strength"],
        dampening,
        threshold,
        *state,
    )
    options = Options(
        axis,
        quantizer.group_size,
        quantizer.eps,
        quantizer.ste_mask == "rounded",
        factor == "lsq",
        None if factor == "lsq" else factor,  # type: ignore[arg-type]  # no other string
        out_dtype,
        estimator,
        quantizer.seed,
        quantizer.tensor_id if estimator == STOCHASTIC else -1,
        0.0 if tracker is None else tracker.momentum,
        tracker is None or tracker.options.use_average,
    )
    return operands, options
