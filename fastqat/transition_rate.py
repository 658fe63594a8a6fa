"""Transition rate scheduling: how often weights change their codes follows a schedule, whatever the optimizer does.

A learning rate that is scheduled says little about quantized weights: what moves the network is how many of them change
their code. Here the target of that rate is scheduled, and the learning rate of each weight tensor adapts to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastqat.ops import checks
from fastqat.oscillation import QuantizedWeight, quantized_weights
from fastqat.schedules import Schedule

RULES = ("multiplicative", "additive", "unsmoothed")
SMALL = 1e-8  # keeps the ratio of target and rate finite, as in the released code
LARGEST = 1e18  # factor: what a tensor whose codes never change would reach is infinite, and makes an update of 0 NaN
STATE = ("step", "running", "factor", "rate", "target")


@dataclass(frozen=True)
class TransitionRate:
    """Transitions of one weight tensor at the last step, read back from its device.

    Attributes:
        layer: its name.
        rate: k, the part of the weights whose code changed.
        running: K, its moving average.
        target: R.
        factor: on the learning rate.
    """

    layer: str
    rate: float
    running: float
    target: float
    factor: float


class TransitionRateScheduler:
    """Scale the updates of quantized weights so that the rate of their transitions follows a target.

    With k^t the part of the weights of a tensor whose code changed in the forward pass of step t, its bit-width b, the
    value h(t) of a schedule, and the update that the optimizer makes with its own learning rate a::

        R^t = lam * sqrt(b) * h(t)                     target
        K^t = m * K^(t-1) + (1 - m) * k^t              running rate, K^0 = R^0
        q^t = m * q^(t-1) + (1 - m) * q^(t-1) * R^t / (K^t + 1e-8)                        rule="multiplicative"
        q^t = max(0, q^(t-1) + gain * (R^t - K^t))                                        rule="additive"
        q^t = q^(t-1) * R^t / (K^t + 1e-8)                                                rule="unsmoothed"
        w   = w + q^t * (update of the optimizer)      q^0 = 1: the learning rate is U = a * q

    The optimizer itself stays as it is, whichever it is: what it has added to a weight is scaled after its step, weight
    decay and all. Its learning rate for these weights is U^0, and better stays constant; a scheduler that changes it
    multiplies with q. In the first step, which has no code to compare with, and in one in which a tensor was not used,
    K and q stay. Nothing is read back from the device, and nothing goes between processes: equal weights have equal
    counts.

    Transitions are counted by what tracks oscillations (:class:`fastqat.Oscillation`). Frozen weights change no more
    and leave the count of weights, so that the target holds for those that are free; where none is, K and q stay.

    Args:
        optimizer: any of torch.optim, or with its hooks.
        model: prepared, its weights tracked.
        lam: of the target; about 5e-3 in the paper.
        schedule: h(t), a :class:`fastqat.Schedule`; None is 1. The paper's is ``Schedule("cosine", 1.0, 0.0, steps,
            begin=0.0)``.
        momentum: m, in [0, 1).
        rule: "multiplicative", which the released code has; "additive", which the paper prints (eq. 11); or
            "unsmoothed", which its discussion names (S1; "multiplicative" is S2 there).
        gain: of the additive rule; 1 is the paper's eta = U^0.
        bounds: of the ratio R / (K + 1e-8), which grows without end where no code changes; None has none, as released.
            The additive rule has no ratio.

    Attributes:
        enabled: False leaves the optimizer's updates alone, bit for bit.
        layers: names of those whose weights are scaled.
        rate, running, target, factor: k, K, R and q of their weights at the last step, float32 [layers].

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came: no tracked weight, a weight that
            the optimizer does not own.

    Source: Lee et al., "Scheduling Weight Transitions for Quantization-Aware Training", ICCV 2025 (2404.19248),
        sections 4.2 and 4.3, and its released code.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        lam: float = 5e-3,
        schedule: Schedule | None = None,
        momentum: float = 0.99,
        rule: str = "multiplicative",
        gain: float = 1.0,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        if not lam > 0:
            checks.fail(ValueError, "lam", "a positive number", lam)
        if not 0 <= momentum < 1:
            checks.fail(ValueError, "momentum", "0 <= momentum < 1", momentum)
        if not isinstance(schedule, (Schedule, type(None))):
            checks.fail(TypeError, "schedule", "a fastqat.Schedule or None", repr(schedule))
        checks.choice("rule", rule, RULES)
        if bounds is not None and not 0 <= bounds[0] <= 1 <= bounds[1]:
            checks.fail(ValueError, "bounds", "(low, high) with 0 <= low <= 1 <= high", bounds)
        self.lam, self.schedule, self.momentum, self.rule = lam, schedule, momentum, rule
        self.gain, self.bounds, self.enabled = gain, bounds, True
        self._found = _owned(optimizer, model)
        self.layers = [found.name for found in self._found]
        self._weights = tracked_parameters(model)
        self._before = [torch.empty_like(weight) for weight in self._weights]
        self._device = self._weights[0].device
        self._numels = torch.tensor([weight.numel() for weight in self._weights], device=self._device)
        self._bits: list[int] = []
        self.step = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.target = self._target()
        self.running, self.factor = self.target.clone(), torch.ones_like(self.target)
        self.rate = torch.zeros_like(self.target)
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._keep()),
            optimizer.register_step_post_hook(lambda *_: self._adapt()),
        ]

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rates(self) -> list[TransitionRate]:
        """Rates of all tensors at the last step; reads them back."""
        columns = [getattr(self, name).tolist() for name in ("rate", "running", "target", "factor")]
        return [TransitionRate(name, *values) for name, *values in zip(self.layers, *columns, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: the step count, and K, q, k and R of each tensor."""
        return {name: getattr(self, name).clone() for name in STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: of a scheduler of another number of tensors; nothing is loaded then.
        """
        for name in STATE:
            got = None if name not in state else list(state[name].shape)
            if got != list(getattr(self, name).shape):
                checks.fail(ValueError, f"state {name!r}", f"shape {list(getattr(self, name).shape)}", got)
        for name in STATE:
            getattr(self, name).copy_(state[name])

    @torch.no_grad()
    def _keep(self) -> None:
        if self.enabled:
            torch._foreach_copy_(self._before, self._weights)

    @torch.no_grad()
    def _adapt(self) -> None:
        """Move the factors on by what the last forward pass counted, and scale what the optimizer has added."""
        trackers: list[Any] = [found.quantizer.tracker for found in self._found]
        if not self.enabled or any(tracker.counts is None for tracker in trackers):
            return  # switched off; or no forward pass in training has come yet
        self._move_on(trackers)
        for weight, before, factor in zip(self._weights, self._before, self.factor.unbind(), strict=True):
            torch.lerp(before, weight, factor.to(weight.device, weight.dtype), out=weight)

    def _move_on(self, trackers: list[Any]) -> None:
        counts = torch.stack([tracker.counts.to(self._device) for tracker in trackers])  # int64 [tensors, 5]
        clocks = torch.stack([tracker.clock.to(self._device) for tracker in trackers])  # float64 [tensors, 3]
        steps = torch.cat([found.quantizer.step.to(self._device) for found in self._found])
        free = self._numels - counts[:, 2]
        # A tensor that took no part in this step says nothing; in the first step nothing has changed yet.
        counts_now = (clocks[:, 1] == steps) & (self.step > 0) & (free > 0)
        self.rate = torch.where(counts_now, counts[:, 3] / free.clamp(min=1), 0.0).float()
        self.target = self._target()
        running = self.momentum * self.running + (1 - self.momentum) * self.rate
        self.running = torch.where(counts_now, running, self.running)
        self.factor = torch.where(counts_now, self._next_factor(), self.factor)
        self.step.add_(1)

    def _next_factor(self) -> Tensor:
        if self.rule == "additive":
            return (self.factor + self.gain * (self.target - self.running)).clamp(min=0.0)
        ratio = self.target / (self.running + SMALL)
        if self.bounds is not None:
            ratio = ratio.clamp(*self.bounds)
        momentum = 0.0 if self.rule == "unsmoothed" else self.momentum
        return (momentum * self.factor + (1 - momentum) * self.factor * ratio).clamp(max=LARGEST)

    def _target(self) -> Tensor:
        bits = [found.quantizer.bits for found in self._found]
        if bits != self._bits:
            self._bits = bits
            self._start = torch.tensor([self.lam * b**0.5 for b in bits], dtype=torch.float32, device=self._device)
        return self._start.clone() if self.schedule is None else self._start * self.schedule.tensor(self.step)


def tracked_parameters(model: nn.Module) -> list[Tensor]:
    """The weights of a model whose codes are tracked: those that a scheduler acts on."""
    return [getattr(weight.layer, weight.parameter) for weight in _tracked(model)]


def _tracked(model: nn.Module) -> list[QuantizedWeight]:
    return [weight for weight in quantized_weights(model) if weight.quantizer.tracker is not None]


def _owned(optimizer: Optimizer, model: nn.Module) -> list[QuantizedWeight]:
    """The tracked weights of a model, all of which the optimizer has."""
    found = _tracked(model)
    if not found:
        wanted = "quantized weights that are tracked (QSpec(oscillation=fastqat.Oscillation()))"
        checks.fail(ValueError, "model", wanted, f"{type(model).__name__} without")
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = [weight.name for weight in found if id(getattr(weight.layer, weight.parameter)) not in owned]
    if strangers:
        checks.fail(ValueError, "optimizer", "one that owns all tracked weights", f"one without {', '.join(strangers)}")
    return found
