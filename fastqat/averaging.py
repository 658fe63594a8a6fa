"""``AveragedModel``: a moving average of a network in training that is itself a right quantized network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import swa_utils

from fastqat.nn.copied import versions
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.tracking import Tracker
from fastqat.ops import checks

WARMUP = 10  # updates: the first averages forget faster, so that they leave the initial weights behind
RANGES = ("range_low", "range_high")
STATISTICS = ("running_mean", "running_var")

Pairs = list[tuple[Tensor, Tensor]]  # of the average and of the network


class AveragedModel(swa_utils.AveragedModel):
    """A copy of a network that follows it: an exponential moving average.

    After update t, from 0 on, average = d * average + (1 - d) * value with d = min(decay, (1 + t) / (10 + t)). Weights,
    the parameters of quantizers, ranges that follow the data, and statistics of batch normalization are averaged.
    All else is copied: integers, the state of oscillations with the codes of frozen weights, other buffers, bit-widths,
    signs, and whether a range is known. Where one has become known, or has another bit-width, it begins anew from that
    of the network. So the copy may be made at any time, before the first batch, too. Use::

        average = fastqat.AveragedModel(model, decay=0.999)
        for images, labels in batches:
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        accuracy = evaluate(average.eval())

    Args:
        model: the network, which is left alone; what wraps it for data-parallel training or compilation is taken off.
        decay: per update, in 0..1.
        device: of the copy; None is that of the network.
        warmup: False takes ``decay`` from the second update on, and the first one copies.

    Attributes:
        module: the averaged network.
        n_averaged: int64, number of updates.

    Raises:
        ValueError: the decay is outside 0..1.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        device: int | torch.device | str | None = None,
        *,
        warmup: bool = True,
    ) -> None:
        if isinstance(decay, bool) or not 0 <= decay <= 1:
            checks.fail(ValueError, "decay", "a number in 0..1", decay)
        super().__init__(_unwrapped(model), device=device, use_buffers=True)  # type: ignore[arg-type]  # takes a name
        for parameter in self.module.parameters():
            parameter.requires_grad = False  # the method refuses a scale whose channels are not known yet
        self.decay, self.warmup = decay, warmup
        self._updates: int | None = 0  # n_averaged, which is on a device; None where that was loaded

    @property
    def updates(self) -> int:
        """Number of updates so far; setting it says how much the next one forgets."""
        if self._updates is None:
            self._updates = int(self.n_averaged)
        return self._updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count
        self.n_averaged.fill_(count)

    def decay_at(self, update: int) -> float:
        """The part of the average that stays at an update, counted from 0."""
        if not self.warmup:
            return self.decay if update else 0.0
        return min(self.decay, (1 + update) / (WARMUP + update))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one step after the network.

        Args:
            model: the network.

        Raises:
            ValueError: it has other modules than the copy; the message names the first.
        """
        averaged, copied = _matched(self.module, _unwrapped(model))
        updates = self.updates
        if averaged:
            mine, values = (list(each) for each in zip(*averaged, strict=True))
            torch._foreach_lerp_(mine, values, 1 - self.decay_at(updates))
        for kept, value in copied:
            kept.copy_(value)
        for module in self.module.modules():
            if isinstance(module, FakeQuant):  # what was written here is right
                module.note_placeholder()
                module.note_checked(versions(module))
        self.updates = updates + 1

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._updates = None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without what compiles it or trains it in parallel."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, parallel) else model._orig_mod  # type: ignore[assignment]
    return model


def _matched(average: nn.Module, model: nn.Module) -> tuple[Pairs, Pairs]:
    """Tensors that are averaged and that are copied; what no tensor says is taken over at once."""
    averaged: Pairs = []
    copied: Pairs = []
    others = dict(model.named_modules())
    for name, mine in average.named_modules():
        other = others.get(name)
        if other is None or type(mine) is not type(other):
            got = "none" if other is None else type(other).__name__
            raise ValueError(f"module {name!r}: wanted {type(mine).__name__}, as in the copy; got {got}")
        in_line = _follow(mine, other) if isinstance(mine, FakeQuant) and isinstance(other, FakeQuant) else True
        for key, value in {**other._parameters, **other._buffers}.items():
            if value is None or is_lazy(value):
                continue
            kept = _kept(mine, key, value, name)
            pair = (kept, value.detach().to(kept.device))
            averages = in_line and value.is_floating_point() and _is_averaged(mine, key)
            (averaged if averages else copied).append(pair)
    return list(_once(averaged)), list(_once(copied))


def _once(pairs: Pairs) -> Pairs:
    """Without what modules share, but for the first of it."""
    return list({id(kept): (kept, value) for kept, value in pairs}.values())


def _is_averaged(module: nn.Module, key: str) -> bool:
    if isinstance(module, (Tracker, GradientFakeQuant)):
        return False
    return key in module._parameters or key in (RANGES if isinstance(module, FakeQuant) else STATISTICS)


def _kept(mine: nn.Module, key: str, value: Tensor, name: str) -> Tensor:
    """The tensor of the copy; that of a buffer which has come, or has another form, is made anew."""
    kept = {**mine._parameters, **mine._buffers}.get(key)
    if kept is not None and kept.shape == value.shape and kept.dtype == value.dtype:
        return kept
    if key in mine._parameters:
        got = "none" if kept is None else f"{list(kept.shape)}, {kept.dtype}"
        checks.fail(ValueError, f"{name}.{key}", f"{got}, as in the copy", f"{list(value.shape)}, {value.dtype}")
    sibling = next((t for t in mine._buffers.values() if t is not None), None)
    device = sibling.device if sibling is not None else getattr(mine, "_device", value.device)
    mine._buffers[key] = made = value.detach().to(device, copy=True)
    return made


def _follow(mine: FakeQuant, other: FakeQuant) -> bool:
    """Take over what a quantizer knows in Python; True if both have a range of the same codes."""
    in_line = mine.initialized and other.initialized and mine.codes == other.codes
    if is_lazy(mine.scale) and not is_lazy(other.scale):
        mine.materialize(tuple(other.scale.shape), mine.qrange.device)
    mine.follow(other)
    return in_line
