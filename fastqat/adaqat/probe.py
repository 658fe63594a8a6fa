"""Forward passes at other bit-widths than those of the model, of which nothing stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.tracking import Tracker

Closure = Callable[[], Tensor]


class Probe:
    """Computes the loss of a batch at other bit-widths.

    A pass leaves no trace: statistics of batch normalization and all other buffers are put back, ranges do not follow
    it, oscillations are not tracked, and the random numbers that come after it are those that would have come without
    it. Where a model has Dropout, a pass drops what the last forward pass in training has dropped. Bit-widths are
    changed in place, as data, so that nothing is compiled anew from pass to pass.

    Args:
        model: the model; what it computes between two steps of its optimizer depends on the bit-widths alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._random: list[Tensor] | None = None  # states of the generators before the last forward pass in training
        self._hook: Any = None
        if any(
            isinstance(module, (_DropoutNd, nn.MultiheadAttention)) and _drops(module) for module in model.modules()
        ):
            self._hook = model.register_forward_pre_hook(self._remember, prepend=True)

    def remove(self) -> None:
        """Leave the model alone from now on."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def loss(self, closure: Closure, bits: Mapping[FakeQuant, int]) -> Tensor:
        """The loss at some bit-widths, each of which keeps the range that its quantizer has.

        Args:
            closure: computes the loss from the batch by a forward pass.
            bits: bit-widths of some quantizers; all others stay as they are.
        """
        with self._nothing_stays(), _changed(bits):
            return closure().detach()

    def _remember(self, model: nn.Module, _: object) -> None:
        if model.training and torch.is_grad_enabled():
            self._random = _random_states(model)

    @contextlib.contextmanager
    def _nothing_stays(self) -> Iterator[None]:
        """Put back buffers and generators, and keep quantizers from observing and tracking."""
        modules = [module for module in self.model.modules() if not isinstance(module, Tracker)]
        buffers = list({id(b): b for module in modules for b in module.buffers(recurse=False)}.values())
        saved = [b.clone() for b in buffers]
        quantizers = [module for module in modules if isinstance(module, FakeQuant)]
        before = [(q, q.observer_enabled, q.tracker) for q in quantizers if q.observer_enabled or q.tracker is not None]
        random = _random_states(self.model)
        try:
            for q, *_ in before:
                q.observer_enabled, q.tracker = False, None
            if self._random is not None:
                _set_random_states(self.model, self._random)
            yield
        finally:
            _set_random_states(self.model, random)
            for q, observes, tracker in before:
                q.observer_enabled, q.tracker = observes, tracker
            for b, value in zip(buffers, saved, strict=True):
                b.copy_(value)


@contextlib.contextmanager
def _changed(bits: Mapping[FakeQuant, int]) -> Iterator[None]:
    """Write the grids of other bit-widths, and those that were there again: bit for bit."""
    own = {q: q.grid_at(q.bits) for q in bits}
    try:
        for q, wanted in bits.items():
            q.write_grid(q.grid_at(wanted))
        yield
    finally:
        for q, grid in own.items():
            q.write_grid(grid)


def _drops(module: Any) -> bool:
    return (module.p if isinstance(module, _DropoutNd) else module.dropout) > 0


def _random_states(model: nn.Module) -> list[Tensor]:
    """States of the generators of the CPU and of the GPUs that a model is on."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _gpus(model))]


def _set_random_states(model: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_gpus(model), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def _gpus(model: nn.Module) -> list[torch.device]:
    return list(dict.fromkeys(p.device for p in model.parameters() if p.device.type == "cuda"))
