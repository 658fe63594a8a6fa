"""Weights of DoReFa in the passes of a step: at both of their bit-widths from one read of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastqat.adaqat.grids import codes_tensor
from fastqat.dorefa import quantized
from fastqat.nn.calls import NOTHING, Forward, Together
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import AS_IS, FORM
from fastqat.nn.layers import QuantizedLayer

_ops = torch.ops.fastqat


class BothWidths:
    """What layers find done in passes that want a weight at its own bit-width and at another one.

    Those of DoReFa alone, which take a tanh for each element: weights on other grids were no faster this way than one
    by one, and many of them are quantized in one call anyway. What is computed (parametrized, pruned), or may be
    changed first by a hook, is left to its layer.

    Args:
        modules: of the model.
        settings: bit-widths of the quantizers in each pass that has others.
    """

    def __init__(self, modules: Sequence[nn.Module], settings: Sequence[Mapping[FakeQuant, int]]) -> None:
        self._settings = settings
        self._now: list[tuple[FakeQuant, Together]] = []  # of the pass that runs
        self._values: dict[FakeQuant, tuple[Tensor, dict[int, Tensor]]] = {}
        for layer in modules:
            if not isinstance(layer, QuantizedLayer):
                continue
            for name, q in layer.weight_quantizers().items():
                others = {bits.get(q, q.bits) for bits in settings} - {q.bits}
                wants_own = any(q not in bits for bits in settings)
                if len(others) == 1 and wants_own and q not in self._values and _fits(layer, name, q):
                    weight: Tensor = getattr(layer, name)
                    self._values[q] = weight, _at_both(q, weight, others.pop())

    @contextlib.contextmanager
    def handed_out(self, k: int) -> Iterator[None]:
        """Let layers find them in pass k, once it has begun."""
        forward = Forward()
        self._now = [
            (q, Together(weight, None, values[self._settings[k].get(q, q.bits)], forward))
            for q, (weight, values) in self._values.items()
        ]
        try:
            yield
        finally:
            for q, _ in self._now:
                q.keep(NOTHING)
            self._now = []

    def hand_out(self) -> None:
        """Give the quantizers what the pass that runs wants: after those who forget at its beginning."""
        for q, together in self._now:
            q.keep(together)


def _fits(layer: Any, name: str, q: FakeQuant) -> bool:
    """True if the layer would quantize its weight, as that is, by DoReFa, and nothing else would happen."""
    weight = layer._parameters.get(name)
    hooks = q._forward_hooks or q._forward_pre_hooks or layer._forward_pre_hooks
    return (
        q.normalize == "tanh"
        and weight is not None
        and layer._modules.get(f"{name}_fake_quant") is q
        and not hooks
        and getattr(layer, "max_norm", None) is None
        and q.initialized
        and q.fake_quant_enabled
        and not q._calibrating
        and getattr(layer, FORM, AS_IS) == AS_IS
        and layer.output_channels_first(weight, layer._groups) is weight
    )


def _at_both(q: FakeQuant, weight: Tensor, bits: int) -> dict[int, Tensor]:
    """The quantized weight by bit-width."""
    qmax = torch.cat([q.qrange[1:], codes_tensor(*q.codes_at(bits), q.qrange.device)[1:]])
    low, high = _ops.minmax(weight, None)
    own, other = quantized(weight, low, high, qmax, q.rescale)
    return {q.bits: own.value, bits: other.value}
