"""Learned scales that no optimizer holds: they get gradients, and stay as they are."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastqat.nn.sharded import is_sharded

STEPS = 2  # of the weights, after which an optimizer of the scales has stepped too

_stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def warn_of_unowned_scales(quantizers: Iterable[Any], optimizer: torch.optim.Optimizer) -> None:
    """Warn once of scales that are to be learned, have a gradient, and are in no optimizer.

    Called after each step of any optimizer; what it finds is kept, so that a quantizer is looked at a few times only.

    Args:
        quantizers: those whose time the step moves; others are passed over.
        optimizer: that has stepped.

    Warns:
        UserWarning: naming the first layer, how many there are, and the cure.
    """
    _stepped.add(optimizer)
    unowned = []
    for quantizer in quantizers:
        steps = getattr(quantizer, "steps_without_owner", None)
        if steps is None or quantizer.learn is None or is_lazy(quantizer.scale) or quantizer.scale.grad is None:
            continue
        if quantizer.scale.requires_grad:
            quantizer.steps_without_owner = steps + 1
            if steps + 1 >= STEPS:
                quantizer.steps_without_owner = None  # it is known now
                unowned.append(quantizer)
    if not unowned:
        return
    unowned = _not_in(_stepped, unowned)
    if unowned:  # one that steps later in the training has not been seen: look for it, once
        unowned = _not_in([o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)], unowned)
    if unowned:
        warnings.warn(
            f"quantizer of layer {unowned[0].layer_name or '?'!r}: wanted its learned scale in an optimizer; got "
            f"{STEPS} steps of the weights without one that holds it ({len(unowned)} quantizers in all): they get "
            "gradients and stay as they are. Give the optimizer fastqat.parameter_groups(model, lr=...), or a group of "
            "fastqat.quantizer_parameters(model); scale.requires_grad_(False) says that one is not to be learned",
            stacklevel=2,
        )


def _not_in(optimizers: Iterable[torch.optim.Optimizer], quantizers: list[Any]) -> list[Any]:
    """The quantizers whose scale no optimizer holds."""
    groups = (group for o in optimizers for group in o.__dict__.get("param_groups", ()))
    owned = {key for group in groups for p in group["params"] for key in _keys(p)}
    return [q for q in quantizers if not any(key in owned for key in _keys(q.scale))]


def _keys(parameter: Tensor) -> Iterator[object]:
    """Identity, and memory: an optimizer may have the scale as a part of a flat buffer."""
    yield id(parameter)
    if not (parameter.is_meta or is_lazy(parameter) or is_sharded(parameter)):
        yield parameter.device, parameter.untyped_storage().data_ptr()
