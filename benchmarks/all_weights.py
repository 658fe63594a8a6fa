"""All 53 weights of a MobileNetV2 that move from step to step, for fastqat and for its peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from peers import TrackingState, tracked_lsq
from torch import Tensor, nn

import fastqat
from fastqat import models

BITS, QMIN, QMAX, MOMENTUM, THRESHOLD = 3, -4, 3, 0.001, 0.1
OSCILLATION = fastqat.Oscillation(MOMENTUM, THRESHOLD)
QuantizeAll = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def pair(weight: Tensor, scale: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A weight, and one that differs from it by a step of the grid in a share of the elements."""
    moved = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.device) < share
    step = scale.view(-1, *[1] * (weight.dim() - 1)) * torch.where(weight > 0, -1.0, 1.0)
    return weight, torch.where(moved, weight + step, weight)


class AllWeights:
    """The weights, each in two versions that take turns, their scales and their gradients.

    Args:
        oscillation: what is tracked, or None.
        device: of everything.
        share: of the codes that differ between the versions.
        width: of the network.
    """

    def __init__(
        self,
        oscillation: fastqat.Oscillation | None,
        device: str = "cpu",
        share: float = 0.0005,
        width: float = 1.0,
    ) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = models.build("mobilenetv2", 10, (3, 32, 32), width=width).to(device)
        spec = fastqat.QSpec(BITS, axis=0, learn="scale", oscillation=oscillation)
        fastqat.prepare(self.model, fastqat.QConfig(spec, None))
        self.buckets = fastqat.quantize_weights_together(self.model)
        members = self.buckets.buckets[0]
        assert len(members) == 53
        self.quantizers = [m.quantizer for m in members]
        self.weights = [m.weight for m in members]
        self.scales = [q.scale for q in self.quantizers]
        pairs = [pair(w.detach(), s.detach(), share) for w, s in zip(self.weights, self.scales, strict=True)]
        self.versions = itertools.cycle([[p[k].clone() for p in pairs] for k in (0, 1)])
        self.g = [torch.randn_like(w) for w in self.weights]

    def move(self) -> None:
        """The other version of each weight, in place."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, next(self.versions))

    def step(self) -> object:
        """Forward and backward pass of fastqat at a new step, which an optimizer would have counted."""
        torch._foreach_add_([q.step for q in self.quantizers], 1)
        self.buckets.before(self.model, ())
        ys = [q.together.value for q in self.quantizers]
        return torch.autograd.grad(ys, self.weights + self.scales, self.g)

    def states(self) -> list[TrackingState]:
        """What the definition of tracking in plain torch begins with."""
        return [TrackingState.of(w.detach(), s, QMIN, QMAX) for w, s in zip(self.weights, self.scales, strict=True)]


def all_tracked(states: list[TrackingState]) -> QuantizeAll:
    """The definition of tracking in plain torch, for all weights."""

    def run(weights: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        three = zip(weights, scales, states, strict=True)
        return [tracked_lsq(w, s, QMIN, QMAX, state, MOMENTUM, THRESHOLD) for w, s, state in three]

    return run
