"""Clocks: whose optimizer steps move the time of quantizers.

The quantizers that :func:`fastqat.prepare` makes share the clock of their model. A step of it is one outermost
``torch.optim`` step that changes a trained parameter of the model as it is then: the owner is found through the
modules, so that a sharded, wrapped, flattened or replaced parameter counts as well. Two optimizers of one model in one
iteration are one step, and so is a wrapper with the optimizer that it calls. A quantizer that no ``prepare`` made
follows the Parameter that it sees.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from fastqat.nn.optimizer_steps import number_of_changes, running_steps
from fastqat.nn.owner import Absence, GradientWrites, Place, common_place, has_gradients, looks_of
from fastqat.nn.unowned_scales import warn_of_unowned_scales

if TYPE_CHECKING:
    from fastqat.nn.timed import Timed

PATIENCE = 20  # forward passes, or steps of others, in which a clock may stand still before a warning
ANCHOR = "fake_quant_clock"  # attribute of the model that was prepared
_RECHECK = 16  # steps of an optimizer that owned nothing of a model until it is looked at again

_models: weakref.WeakSet[ModelClock] = weakref.WeakSet()
_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Parameter -> its clock
_hook: Any = None


class _Pass:
    """Hook of a tensor: alive and not done while the pass that made it may go on, and call the same layer again."""

    def __init__(self, clock: Clock) -> None:
        self.is_done, self._clock = False, clock

    def __call__(self, gradient: Tensor) -> None:
        self.is_done = self._clock.has_come_back = True


class Clock:
    """Time of quantizers that only :func:`fastqat.step` moves; base of those that optimizers move.

    Attributes:
        members: the quantizers.
        ran: True once a training forward with gradients ran eagerly since the last step.
        is_waiting: True until it first moves, or has warned that it does not.
    """

    is_automatic = False  # True where the steps of optimizers move it

    def __init__(self) -> None:
        self.members: weakref.WeakSet[Timed] = weakref.WeakSet()
        self.ran = False
        self.is_waiting = True
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # since it last moved, with who moved it
        self._first: weakref.ref[Timed] | None = None  # the quantizer whose forward passes are counted
        self._forwards = 0
        self.has_come_back = False  # a backward pass has reached one of them
        self._pass: weakref.ref[_Pass] | None = None  # the one that was counted last
        self._idle = 0  # forward passes of quantizers that need no time, before the first of one that does
        self._backward = -1  # the backward pass whose hooks moved it last

    def __reduce__(self) -> tuple[Any, ...]:
        return Clock, ()  # what it belongs to has another copy, or none

    def is_of(self, weight: nn.Parameter) -> bool:
        """True if it is the one to time a quantizer of this weight."""
        return False

    def leave(self, quantizer: Timed) -> None:
        """Lose a member."""
        self.members.discard(quantizer)

    @property
    def was_just_moved(self) -> bool:
        """True if an optimizer moved it and nothing ran since."""
        return bool(self._stepped) and not self.ran

    def begin_step(self, optimizer: Optimizer, task: int = -1) -> bool:
        """Take note of the step of an optimizer that owns it; True if that is a new step of the model.

        Args:
            optimizer: the outermost one.
            task: number of the backward pass whose hooks make the step, which is one step in all; -1 outside of one.
        """
        same_backward = task != -1 and task == self._backward
        if same_backward or not (self.ran or task != -1 or not self._stepped or optimizer in self._stepped):
            self._stepped.add(optimizer)
            return False
        self.moved()
        self._stepped, self._backward = weakref.WeakSet([optimizer]), task
        return True

    def moved(self) -> None:
        """Wait for the next forward pass."""
        self.ran = self.is_waiting = False

    def count_forward(self, quantizer: Timed, y: Tensor) -> None:
        """Count a forward pass by the first quantizer that needs time; warn where the clock has stood still.

        Args:
            quantizer: that was called, perhaps once more in a pass.
            y: what it made.
        """
        first = None if self._first is None else self._first()
        if first is None and quantizer.needs_time():
            self._first, first = weakref.ref(quantizer), quantizer
        elif first is None:
            self._idle += 1
            self.is_waiting = self._idle < PATIENCE * max(len(self.members), 1)
        under_way = None if self._pass is None else self._pass()
        if first is not quantizer or (under_way is not None and not under_way.is_done):
            return
        if y.grad_fn is not None:
            mark = _Pass(self)
            y.register_hook(mark)
            self._pass = weakref.ref(mark)
        self._forwards += 1
        if self._may_stand_still(y):
            self._forwards, self.has_come_back = 0, False
        elif self._forwards >= PATIENCE:
            self._warn(quantizer)

    def _may_stand_still(self, y: Tensor) -> bool:
        """True if the forward passes that were counted are no reason for a step."""
        return False

    def name_of(self, quantizer: Timed) -> str:
        """Name of a quantizer, for messages."""
        return getattr(quantizer, "layer_name", None) or type(quantizer).__name__

    def _warn(self, quantizer: Timed) -> None:
        self.is_waiting = False
        warnings.warn(
            f"quantizer {self.name_of(quantizer)!r}: wanted a step count that moves with the optimizer, for what it "
            f"tracks, draws or schedules; got {PATIENCE} training forwards with gradients and no optimizer step that "
            "changes a parameter of the model: time stands still. Call fastqat.step(model) after each update of the "
            "weights where no torch.optim optimizer holds them (master copies, an optimizer of your own). Where "
            "gradients are accumulated over as many forwards, nothing is wrong.",
            stacklevel=4,
        )


class WeightClock(Clock):
    """Time of the quantizers that follow one Parameter: the steps of optimizers that own it.

    Args:
        weight: the Parameter; it is not kept alive.
    """

    is_automatic = True

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self._weight: Callable[[], nn.Parameter | None] = weakref.ref(weight)

    def is_of(self, weight: nn.Parameter) -> bool:
        """True for its own weight."""
        return self._weight() is weight

    def leave(self, quantizer: Timed) -> None:
        """Lose a member, and with the last one the weak reference to the weight."""
        super().leave(quantizer)
        weight = self._weight()
        if weight is not None and not self.members:
            _weights.pop(weight, None)
            self._weight = _nothing


def _nothing() -> None:
    return None


def clock_of_weight(weight: nn.Parameter) -> WeightClock:
    """The clock that the quantizers of a weight share."""
    clock: WeightClock | None = _weights.get(weight)
    if clock is None:
        _listen()
        clock = _weights[weight] = WeightClock(weight)
    return clock


class ModelClock(Clock):
    """Time of the quantizers of a prepared model.

    It holds no Parameter, and no weak reference to one, which ``torch.utils.swap_tensors`` would refuse.

    Args:
        root: the model; it is not kept alive.
    """

    is_automatic = True

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = weakref.ref(root)
        self._foreign_steps = 0
        self._gradient: GradientWrites | None = None  # after the first forward pass that was counted
        self._known: weakref.WeakKeyDictionary[Optimizer, Place | Absence] = weakref.WeakKeyDictionary()
        _models.add(self)
        _listen()

    @property
    def root(self) -> nn.Module | None:
        """The model, if it is still there."""
        return self._root()

    def is_of(self, weight: nn.Parameter) -> bool:
        """True while the model is there, whatever its weights are now."""
        return self._root() is not None

    def name_of(self, quantizer: Timed) -> str:
        """Name of a quantizer in the model."""
        root = self.root
        names = () if root is None else (name for name, module in root.named_modules() if module is quantizer)
        return next(iter(names), super().name_of(quantizer))

    def _may_stand_still(self, y: Tensor) -> bool:
        """True if no backward pass has come of all forward passes, or if gradients pile up as nobody clears them."""
        root = self.root
        if self._forwards == 2:
            self._gradient = None if root is None else GradientWrites.of(root)
        if self._forwards < PATIENCE or root is None:
            return False
        if y.grad_fn is not None and not self.has_come_back:
            return True
        return self._gradient is not None and self._gradient.now(root) == self._gradient.writes + PATIENCE - 2

    def is_owned_by(self, optimizer: Optimizer) -> bool:
        """True if the optimizer, which has made a step, trains a parameter of the model as it is now."""
        is_owned = self._is_owned_by(optimizer)
        if self.is_waiting and not is_owned:
            self._count_foreign_step()
        return is_owned

    def _is_owned_by(self, optimizer: Optimizer) -> bool:
        root, known = self.root, self._known.get(optimizer)
        if root is None:
            return False
        if isinstance(known, Place) and known.holds(root, optimizer):
            return True
        if isinstance(known, Absence) and known.params == looks_of(optimizer):
            # A model that trains and that no other optimizer owns is looked through each time.
            trains = root.training and self.ran and self.is_waiting
            unclaimed = trains and not any(isinstance(k, Place) for k in self._known.values())
            if known.steps % _RECHECK and not unclaimed:
                self._known[optimizer] = known._replace(steps=known.steps + 1)
                return False
        place = common_place(root, optimizer)
        self._known[optimizer] = place or Absence(looks_of(optimizer), 1)
        return place is not None

    def _count_foreign_step(self) -> None:
        """Warn where the model gets gradients, and others step: a compiled forward pass is not counted otherwise."""
        self._foreign_steps += 1
        root = self.root
        if self._foreign_steps % PATIENCE or root is None or not has_gradients(root):
            return
        waiting = next((m for m in self.members if m.training and not m.by_hand and m.needs_time()), None)
        if waiting is not None:
            self._warn(waiting)


class Anchor:
    """Attribute of a prepared model by which its copy, with :mod:`copy` or pickle, gets a clock of its own.

    Args:
        clock: of the model.
    """

    def __init__(self, clock: ModelClock) -> None:
        self.clock = clock

    def __getstate__(self) -> dict[str, Any]:
        root, members = self.clock.root, []
        if root is not None:
            members = [m for m in root.modules() if getattr(m, "clock", None) is self.clock]
        return {"root": root, "members": members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The root may have no attributes yet; its quantizers are complete.
        self.clock = ModelClock(state["root"])
        for member in state["members"]:
            member.join(self.clock)


@torch._disable_dynamo  # a compiled step runs it as it is
def _after_step(optimizer: Optimizer, *_: object) -> None:
    """Move the clocks whose model this step has changed. Hook that runs after the step of any optimizer."""
    # Of what also belongs to an optimizer that called this one, the step is not over.
    others = {id(clock) for outer in running_steps(optimizer) for clock in _owned_by(outer)}
    owned = [clock for clock in _owned_by(optimizer) if id(clock) not in others]
    task = torch._C._current_graph_task_id()
    moved = [clock for clock in owned if clock.begin_step(optimizer, task)]
    if moved and task != -1:  # other layers may yet be computed again, and must find the time of their forward
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        engine.queue_callback(functools.partial(_move, moved, number_of_changes(optimizer)))
    else:
        _move(moved, number_of_changes(optimizer))
    warn_of_unowned_scales((m for clock in moved for m in clock.members if not m.by_hand), optimizer)


def _owned_by(optimizer: Optimizer) -> list[Clock]:
    """The clocks that the steps of an optimizer move."""
    found: dict[int, Clock] = {id(clock): clock for clock in list(_models) if clock.is_owned_by(optimizer)}
    if _weights:
        weights = (p for group in optimizer.param_groups for p in group["params"])
        found.update({id(clock): clock for p in weights if (clock := _weights.get(p)) is not None})
    return list(found.values())


def _move(clocks: Iterable[Clock], steps: Tensor | None = None) -> None:
    advance([m for clock in clocks for m in clock.members if not m.by_hand], steps)


def advance(quantizers: Sequence[Timed], steps: Tensor | None = None) -> None:
    """Add to the time of quantizers.

    Args:
        quantizers: each once.
        steps: int64 0-dim, on the device; None is 1.
    """
    if not quantizers:
        return
    with torch.no_grad():
        if steps is None:
            torch._foreach_add_([q.step for q in quantizers], 1)
        else:
            for q in quantizers:
                q.step.add_(steps.to(q.step.device))
    for q in quantizers:
        q.advanced()


def _listen() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
