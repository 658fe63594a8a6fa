"""Weights that become what their quantizers make of them, where that is what was evaluated; else nothing changes.

A weight may leave its quantizer behind only if every reader of it went through that: any other would read new values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import AS_IS
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import evaluating
from fastqat.nn.past import HOLDS, TWO, PastRead, memory_of, past_reads
from fastqat.nn.selection import names_of_modules
from fastqat.nn.twins import form_of_weight, original_class, quantized_view
from fastqat.ops import checks

WHAT = "keep='quantized', "
HOW_ELSE = "keep='float' leaves all weights as they are"
CURES = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
}


class QuantizedWeight(NamedTuple):
    """A weight of a layer that has a quantizer."""

    layer: Any
    layer_name: str
    name: str
    quantizer: FakeQuant

    @property
    def tensor(self) -> Any:
        return self.layer._parameters[self.name]


def _value_of(w: QuantizedWeight) -> Tensor:
    """What its quantizer gives, of its shape."""
    weight = w.tensor
    max_norm = getattr(w.layer, "max_norm", None)
    if max_norm is not None:  # a lookup bounds its rows first
        weight = _bounded(weight, max_norm, w.layer.norm_type)
    # The view may be a copy: the move of the channels is its own inverse.
    value = quantized_view(w.layer, w.quantizer(quantized_view(w.layer, weight)))
    if max_norm is not None and not torch.equal(_bounded(value, max_norm, w.layer.norm_type), value):
        wanted = f"quantized rows within its max_norm of {max_norm} (set max_norm to None first, or {HOW_ELSE})"
        checks.fail(ValueError, f"{WHAT}layer {w.layer_name!r}", wanted, "a longer one, which it would shorten")
    return value


def _bounded(table: Tensor, max_norm: float, norm_type: float) -> Tensor:
    rows = torch.arange(len(table), device=table.device)
    return torch.embedding_renorm_(table.detach().clone(), rows, max_norm, norm_type)


@torch.no_grad()
def write_quantized_weights(model: nn.Module, example_inputs: Any = None) -> None:
    """Replace each quantized weight of a prepared model by its value, one that layers share once.

    Args:
        model: whose layers are quantized.
        example_inputs: find functions that read a weight past its quantizer; see :func:`fastqat.remove`.

    Raises:
        ValueError: a weight is computed, has two quantizers, or has a reader that goes past its quantizer; the message
            names it, and the model is as it was.
    """
    names = {module: found[0] for module, found in names_of_modules(model).items()}
    weights = list(_weights(names))
    for read in past_reads(model, example_inputs):
        _refuse_reader(read)
    distinct = {memory_of(w.tensor): w for w in weights}
    with evaluating(model):  # ranges stay where they are
        values = [(w, _value_of(w)) for w in distinct.values()]  # each can be computed, or none is written
        for w, value in values:
            w.tensor.copy_(value)


def _refuse_reader(read: PastRead) -> None:
    reader = f"{read.kind} {read.module!r}" if read.module else read.kind
    if read.operation == TWO:
        wanted = f"one quantizer for {read.parameter} (tie weights before prepare, or {HOW_ELSE})"
        checks.fail(ValueError, WHAT.rstrip(", "), wanted, f"a second one in {reader}")
    if read.operation == HOLDS:
        wanted = (
            f"a quantizer in each module that holds {read.parameter} (quantize it there too, give it a copy of the "
            f"weight, or {HOW_ELSE})"
        )
        checks.fail(ValueError, WHAT.rstrip(", "), wanted, f"{reader}, which reads it in float")
    wanted = f"weights that are read through their quantizers alone ({HOW_ELSE})"
    got = f"{read.parameter}, which {reader} hands to {read.operation} as it is"
    checks.fail(ValueError, WHAT.rstrip(", "), wanted, got)


def _weights(names: dict[nn.Module, str]) -> Iterator[QuantizedWeight]:
    for module, name in names.items():
        if isinstance(module, QuantizedLayer):
            for weight_name, quantizer in module.weight_quantizers().items():
                if module._parameters.get(weight_name) is None:  # type: ignore[attr-defined]  # it is a module
                    _refuse_computed(module, name, weight_name)
                if form_of_weight(module) != AS_IS:  # type: ignore[arg-type]
                    got = f"a {original_class(module).__name__}, whose forward hands another tensor to its product"  # type: ignore[arg-type]
                    wanted = f"a layer whose weight is quantized as it is ({HOW_ELSE})"
                    checks.fail(ValueError, f"{WHAT}layer {name!r}", wanted, got)
                yield QuantizedWeight(module, name, weight_name, quantizer)


def _refuse_computed(layer: Any, layer_name: str, name: str) -> None:
    by, cure = "something", "make it a Parameter of its own first"
    for hook in layer._forward_pre_hooks.values():
        kind = type(hook).__name__
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            by, cure = f"{kind} of torch.nn.utils.prune", f"call torch.nn.utils.prune.remove(layer, {name!r}) first"
        elif getattr(hook, "name", None) == name:
            by, cure = f"{kind} in a hook", f"call {CURES.get(kind, 'what removes the hook')} first"
    wanted = f"a {name} that is a Parameter ({cure}, or {HOW_ELSE})"
    checks.fail(ValueError, f"{WHAT}layer {layer_name!r}", wanted, f"one that {by} computes before each forward")
