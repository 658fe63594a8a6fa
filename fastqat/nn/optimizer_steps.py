"""What can be seen of the step of an optimizer: which others are under way, and whether it has changed anything."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

# torch wraps the step of every optimizer class in a function with this code, which runs the hooks.
_STEP_CODE = Optimizer.profile_hook_step(lambda self: None).__code__


def running_steps(ended: Optimizer) -> list[Optimizer]:
    """The optimizers whose steps are under way, apart from the one that has just ended.

    They are read from the call stack, where a step that raised leaves nothing.
    """
    found: list[Optimizer] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP_CODE:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found[1:] if found and found[0] is ended else found  # a compiled step has no such frame


def number_of_changes(optimizer: Optimizer) -> Tensor | None:
    """1, or 0 where a fused step has found infinite gradients of a ``GradScaler`` and left all as it was."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return None if found is None else (found == 0).to(torch.int64).view(())
