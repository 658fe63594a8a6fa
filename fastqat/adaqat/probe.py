"""Forward passes at other bit-widths than those of the model, of which nothing stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastqat.adaqat.grids import at_bits
from fastqat.adaqat.weights import BothWidths
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.tracking import Tracker

Closure = Callable[[], Tensor]


class Probe:
    """Computes the loss of a batch at other bit-widths.

    A pass leaves no trace: statistics of batch normalization and all other buffers are put back, ranges do not follow
    it, oscillations are not tracked, and the random numbers that come after it are those that would have come without
    it. It draws those that the last forward pass in training has drawn, so that Dropout drops the same. Bit-widths are
    changed in place, as data, so that nothing is compiled anew from pass to pass.

    A weight that oscillations have frozen has its frozen code at its own bit-width alone; at another one it is rounded
    as any other.

    Args:
        model: the model; what it computes between two steps of its optimizer depends on the bit-widths alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._random: list[Tensor] | None = None  # states of the generators before the last forward pass in training
        self._both: BothWidths | None = None  # of the passes that run
        self._layers_run = False  # in the last forward pass in training: not compiled, and without autocast
        self._hook: Any = None
        self.attach()

    def attach(self) -> None:
        """Take note, before each forward pass in training, of where the random numbers are."""
        if self._hook is None:
            self._hook = self.model.register_forward_pre_hook(self._begin)

    def remove(self) -> None:
        """Leave the model alone from now on."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._random = None

    @torch.no_grad()
    def losses(self, closure: Closure, settings: Sequence[Mapping[FakeQuant, int]]) -> list[Tensor]:
        """The losses at some bit-widths, each of which keeps the range that its quantizer has.

        Args:
            closure: computes the loss from the batch by a forward pass.
            settings: for each pass, bit-widths of some quantizers; all others stay as they are.
        """
        modules = list(self.model.modules())
        buffers, quantizers = _buffers(modules), [module for module in modules if isinstance(module, FakeQuant)]
        saved = [torch.empty_like(b) for b in buffers]
        _copy(saved, buffers)
        random, found = _random_states(self.model), []
        self._both = both = BothWidths(modules if self._layers_run else modules[:0], settings)
        try:
            for k, bits in enumerate(settings):
                if self._random is not None:
                    _set_random_states(self.model, self._random)
                with _unobserved(quantizers, bits), at_bits(bits), both.handed_out(k):
                    found.append(closure().detach())
                _copy(buffers, saved)
        finally:
            self._both = None
            _set_random_states(self.model, random)
            _copy(buffers, saved)
        return found

    def _begin(self, model: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling():
            self._layers_run = False
        elif self._both is not None:
            self._both.hand_out()
        elif model.training and torch.is_grad_enabled():
            self._random = _random_states(model)
            self._layers_run = not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _buffers(modules: list[nn.Module]) -> list[Tensor]:
    """What a pass could change: not what quantizers have, which neither observe nor track in it."""
    others = [module for module in modules if not isinstance(module, (FakeQuant, Tracker))]
    return list({id(b): b for module in others for b in module._buffers.values() if b is not None}.values())


@contextlib.contextmanager
def _unobserved(quantizers: list[FakeQuant], bits: Mapping[FakeQuant, int]) -> Iterator[None]:
    """Keep ranges from following what quantizers see, and those of other bit-widths from tracking it.

    One that keeps its bit-width goes on tracking: it sees the weights of this step again, which is no event.
    """
    observing = [q for q in quantizers if q.observer_enabled and q.range_low is not None]
    tracking = [(q, q.tracker) for q in bits if q.tracker is not None]
    try:
        for q in observing:
            q.observer_enabled = False
        for q, _ in tracking:
            q.tracker = None
        yield
    finally:
        for q in observing:
            q.observer_enabled = True
        for q, tracker in tracking:
            q.tracker = tracker


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors by a few operations: one for those of a dtype."""
    for dtype in {t.dtype for t in targets}:
        pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.dtype == dtype]
        torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])


def _random_states(model: nn.Module) -> list[Tensor]:
    """States of the generators of the CPU and of the GPUs that a model is on."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _gpus(model))]


def _set_random_states(model: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_gpus(model), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def _gpus(model: nn.Module) -> list[torch.device]:
    if not torch.cuda.is_initialized():
        return []
    return list(dict.fromkeys(p.device for p in model.parameters() if p.device.type == "cuda"))
