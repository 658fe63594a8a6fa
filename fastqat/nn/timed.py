"""Time: a step is an optimizer step. Each quantizer counts its own on the device.

The count advances when the clock of a quantizer says so (see :mod:`fastqat.nn.clock`), whatever runs in between:
evaluation, gradient accumulation, recomputation. Where no optimizer can be seen, :func:`step` does it by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastqat.nn.clock import Clock, advance, clock_of_weight


class Timed(nn.Module):
    """A module with a step count, ``step``: int64 [1] on the device.

    Attributes:
        clock: says when a step is made; the quantizers of a prepared model share it.
        tracked: True once the steps of optimizers advance it.
        by_hand: True once :func:`step` has advanced it: from then on no optimizer does.
    """

    step: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device))
        self.clock = Clock()
        self.tracked = self.by_hand = False

    def join(self, clock: Clock) -> None:
        """Take part in a clock, instead of another one."""
        self.clock.leave(self)
        self.clock, self.tracked = clock, clock.is_automatic
        clock.members.add(self)

    def follows(self, weight: nn.Parameter) -> None:
        """Advance with every step of the optimizer that owns this weight, unless a prepared model says when."""
        if not self.clock.is_of(weight):
            self.join(clock_of_weight(weight))

    def needs_time(self) -> bool:
        """True if something stands still where the time does."""
        return False

    def mark_forward(self) -> bool:
        """Tell the clock of a forward pass in training, with gradients: the next step of an optimizer is a new one.

        A compiled one leaves no mark: a graph may contain no such side effect where it is checkpointed.

        Returns:
            True if the clock wants to count it, by the tensor that comes out.
        """
        if not self.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        if torch._C._current_graph_task_id() != -1:  # a backward pass that computes a forward again
            return False
        clock = self.clock
        clock.ran = True
        return clock.is_waiting

    def advanced(self) -> None:
        """Called after every step."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a clock of its own: that of its model, or of the weight that it sees from its first forward on.
        return {**self.__dict__, "clock": Clock(), "tracked": False, "by_hand": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"clock": Clock(), "by_hand": False, **state})  # older pickles have neither


def step(target: nn.Module) -> None:
    """Advance the time of a quantizer, or of every quantizer in a model, by one optimizer step.

    Not needed for a model of which a ``torch.optim`` optimizer holds a parameter that it trains: its step does it.
    Whoever calls this has taken over: from then on no optimizer's step advances these quantizers. The first call after
    such a step, before anything ran, is for that step, and adds none: time never runs double.

    Args:
        target: a quantizer, or a module that contains some.

    Raises:
        ValueError: the module contains none.
    """
    modules = [m for m in target.modules() if isinstance(m, Timed)]
    if not modules:
        raise ValueError(f"target: wanted a module that contains quantizers; got {type(target).__name__} with none")
    advance([m for m in modules if m.by_hand or not m.clock.was_just_moved])
    for module in modules:
        module.by_hand = True
        module.clock.moved()
