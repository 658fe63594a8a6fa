"""Time: a step is an optimizer step. Each quantizer counts its own on the device.

The count of a quantizer advances when an optimizer that owns its weight has stepped, whatever runs in between:
evaluation, gradient accumulation, recomputation. Where no optimizer can be seen, :func:`step` does it by hand.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from fastqat.nn.unowned_scales import warn_of_unowned_scales

# weight -> the quantizers that its optimizer's steps advance
_owned: WeakIdKeyDictionary = WeakIdKeyDictionary()
_hook: Any = None


class Timed(nn.Module):
    """A module with a step count, ``step``: int64 [1] on the device."""

    step: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device))
        self._clock: weakref.ref | None = None
        self.tracked = False  # True once the steps of a weight's optimizer advance this module

    def follows(self, weight: nn.Parameter) -> None:
        """Advance with every step of the optimizer that owns this weight, instead of another one."""
        global _hook
        if self._clock is not None and self._clock() is weight:
            return
        previous = self._clock() if self._clock is not None else None
        if previous is not None:
            _owned[previous].discard(self)
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_advance_owned)
        if weight not in _owned:
            _owned[weight] = weakref.WeakSet()
        _owned[weight].add(self)
        self._clock = weakref.ref(weight)
        self.tracked = True

    def advanced(self) -> None:
        """Called after every step."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy has weights of its own: it follows them from its first forward on.
        return {**self.__dict__, "_clock": None, "tracked": False}


def _advance(modules: list[Timed]) -> None:
    if modules:
        with torch.no_grad():
            torch._foreach_add_([m.step for m in modules], 1)
        for module in modules:
            module.advanced()


def _advance_owned(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Hook that runs after the step of any optimizer."""
    owned = {id(m): m for group in optimizer.param_groups for p in group["params"] for m in _owned.get(p, ())}
    _advance(list(owned.values()))
    warn_of_unowned_scales(owned.values(), optimizer)


def step(target: nn.Module) -> None:
    """Advance the time of a quantizer, or of every quantizer in a model, by one optimizer step.

    Not needed for weights that a ``torch.optim`` optimizer owns: its step does it.

    Args:
        target: a quantizer, or a module that contains some.

    Raises:
        ValueError: the module contains none.
    """
    modules = [m for m in target.modules() if isinstance(m, Timed)]
    if not modules:
        raise ValueError(f"target: wanted a module that contains quantizers; got {type(target).__name__} with none")
    _advance(modules)
