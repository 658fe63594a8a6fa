"""How weights and scales are updated: optimizers, their schedule, and the limit on the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastqat.train.config import Config
from fastqat.transition_rate import TransitionRateScheduler

TRANSITIONS = "transitions."  # before the names of their state


def schedule_factor(config: Config, step: int, steps: int, warmup_steps: int) -> float:
    """Return the factor on all learning rates for one step; it depends on nothing but its arguments.

    The rates rise in a line through the warm-up. Then "cosine" takes them to 0 at the end of the phase, "step"
    multiplies them by ``step_factor`` after each part in ``step_at`` of the phase, and "constant" leaves them.

    Args:
        config: the options.
        step: steps taken so far in this phase.
        steps: all steps of the phase.
        warmup_steps: those of its warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1))) / 2
    if config.schedule == "step":
        return config.step_factor ** sum(step >= part * steps for part in config.step_at)
    return 1.0


def weight_optimizer(config: Config, weights: list[nn.Parameter], lr: float) -> Optimizer:
    """Make the optimizer of the network's own parameters."""
    if config.optimizer != "sgd":
        kind = AdamW if config.optimizer == "adamw" else Adam
        return kind(weights, lr=lr, weight_decay=config.weight_decay)
    return SGD(weights, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)


def scale_optimizer(config: Config, scales: list[nn.Parameter]) -> Optimizer:
    """Make the optimizer of the quantizers' parameters, which do not decay."""
    return Adam(scales, lr=config.quantizer_lr)


def hold_rate(optimizer: Optimizer, weights: list[Tensor]) -> None:
    """Take some of the weights of an optimizer out of the schedule: their learning rate stays as it is.

    Args:
        optimizer: new, with one group of parameters.
        weights: of this group; those of no group are left alone.
    """
    group, held = optimizer.param_groups[0], {id(weight) for weight in weights}
    own = [p for p in group["params"] if id(p) in held]
    group["params"] = [p for p in group["params"] if id(p) not in held]
    optimizer.add_param_group({**group, "params": own, "held": True})


class Updates:
    """The optimizers of a phase, which step together.

    Args:
        config: the options.
        optimizers: each owns some parameters; the first one the network's weights, whose gradient may be clipped.
        steps: all steps of the phase.
        warmup_steps: those of its warm-up.

    Attributes:
        transitions: what scales the updates of quantized weights; None leaves them as they are.
    """

    def __init__(self, config: Config, optimizers: list[Optimizer], steps: int, warmup_steps: int) -> None:
        self.config, self.optimizers = config, optimizers
        self.steps, self.warmup_steps = steps, warmup_steps
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self.transitions: TransitionRateScheduler | None = None

    def lr(self, step: int) -> float:
        """Return the learning rate of the weights at a step of the phase."""
        return self.rates[0] * schedule_factor(self.config, step, self.steps, self.warmup_steps)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def clip(self) -> Tensor | None:
        """Bring the gradient of the weights to the norm that it may have; return its norm, [], from before.

        The scales are left out: Adam does not feel the size of a gradient, and theirs would drown that of the weights.
        """
        if not self.config.clip_norm:
            return None
        weights = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(weights, self.config.clip_norm)

    def step(self, step: int) -> None:
        """Update everything.

        Args:
            step: steps taken so far in this phase.
        """
        factor = schedule_factor(self.config, step, self.steps, self.warmup_steps)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate if group.get("held") else rate * factor
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the optimizers by name; rates are no state, as they follow from the step."""
        named = dict(_named(enumerate(optimizer.state_dict()["state"] for optimizer in self.optimizers)))
        if self.transitions is not None:
            named |= {TRANSITIONS + name: tensor for name, tensor in self.transitions.state_dict().items()}
        return named

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`tensors` returned."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        own = {name for name in tensors if name.startswith(TRANSITIONS)}
        if self.transitions is not None:
            self.transitions.load_state_dict({name.removeprefix(TRANSITIONS): tensors[name] for name in own})
        for name, tensor in tensors.items():
            if name in own:
                continue
            number, index, key = name.split(".", 2)
            states[int(number)].setdefault(int(index), {})[key] = tensor
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    if value.shape == parameter.shape:  # with its strides: the loop that runs decides how sums round
                        values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _named(states: Iterable[tuple[int, dict[int, dict[str, object]]]]) -> Iterator[tuple[str, Tensor]]:
    for number, state in states:
        for parameter, values in state.items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    yield f"{number}.{parameter}.{key}", value
