"""Exponential moving average of a network: of its weights, and of the parameters of its quantizers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastqat.nn import FakeQuant

WARMUP = 10  # updates: the first averages forget faster, so that they leave the initial weights behind


class AveragedModel:
    """A copy of a network that follows it.

    After update t, average = d * average + (1 - d) * value with d = min(decay, (1 + t) / (10 + t)), for all that is
    floating point: weights, scales, statistics of BN. Whatever counts is copied; so are bit-widths, and a quantizer of
    the average keeps its range then. The state of oscillations is shared: a weight that is frozen is so in the average.

    Args:
        model: the network; it is left alone.
        decay: per update, in 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        for mine, other in zip(_quantizers(self.module), _quantizers(model), strict=True):
            mine.tracker = other.tracker

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take one step after the network.

        Args:
            model: the network.
            updates: number of steps that were taken before.
        """
        self._follow_bits(model)
        decay = min(self.decay, (1 + updates) / (WARMUP + updates))
        mine, others = _tensors(self.module), _tensors(model)
        own = [(kept, others[key]) for key, kept in mine.items() if kept is not others[key]]
        averaged = [(kept, value) for kept, value in own if kept.is_floating_point()]
        for kept, value in own:
            if not kept.is_floating_point():
                kept.copy_(value)
        if averaged:
            kept_list, values = (list(each) for each in zip(*averaged, strict=True))
            torch._foreach_lerp_(kept_list, values, 1 - decay)

    def _follow_bits(self, model: nn.Module) -> None:
        """Give quantizers the bit-widths of the network, and their trackers, which are shared."""
        for mine, other in zip(_quantizers(self.module), _quantizers(model), strict=True):
            if mine.bits != other.bits:
                mine.tracker = None
                mine.change_bits(other.bits)
                mine.tracker = other.tracker


def _quantizers(model: nn.Module) -> list[FakeQuant]:
    return [module for module in model.modules() if isinstance(module, FakeQuant)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
