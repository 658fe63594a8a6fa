"""Weights that become what their quantizers make of them, where that is what was evaluated; else nothing changes.

A weight may leave its quantizer behind only if every reader of it went through that: any other would read new values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import AS_IS
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import FloatOperations, eagerly, evaluating, nothing_changes, run_inputs
from fastqat.nn.selection import names_of_modules
from fastqat.nn.twins import form_of_weight, original_class, quantized_view
from fastqat.ops import checks

WHAT = "keep='quantized', "
HOW_ELSE = "keep='float' leaves all weights as they are"
CURES = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
}


class _Weight(NamedTuple):
    """A weight of a layer that has a quantizer."""

    layer: Any
    layer_name: str
    name: str
    quantizer: FakeQuant

    @property
    def tensor(self) -> Any:
        return self.layer._parameters[self.name]

    @property
    def full_name(self) -> str:
        return f"{self.layer_name}.{self.name}".lstrip(".")

    def value(self) -> Tensor:
        """What its quantizer gives, of its shape."""
        weight = self.tensor
        max_norm = getattr(self.layer, "max_norm", None)
        if max_norm is not None:  # a lookup bounds its rows first
            weight = _bounded(weight, max_norm, self.layer.norm_type)
        # The view may be a copy: the move of the channels is its own inverse.
        value = quantized_view(self.layer, self.quantizer(quantized_view(self.layer, weight)))
        if max_norm is not None and not torch.equal(_bounded(value, max_norm, self.layer.norm_type), value):
            wanted = f"quantized rows within its max_norm of {max_norm} (set max_norm to None first, or {HOW_ELSE})"
            checks.fail(ValueError, f"{WHAT}layer {self.layer_name!r}", wanted, "a longer one, which it would shorten")
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
    distinct = {_memory(w.tensor): w for w in reversed(weights)}
    for w in weights:
        first = distinct[_memory(w.tensor)]
        if first.quantizer is not w.quantizer:
            wanted = f"one quantizer for a weight that layers share (tie them before prepare, or {HOW_ELSE})"
            checks.fail(ValueError, f"{WHAT}layers {first.layer_name!r}, {w.layer_name!r}", wanted, "two")
    _check_other_holders(names, distinct)
    if example_inputs is not None:
        _check_readers(model, names, list(distinct.values()), example_inputs)
    with evaluating(model):  # ranges stay where they are
        for w in distinct.values():  # each can be computed, or none is written
            w.value()
        for w in distinct.values():
            w.tensor.copy_(w.value())


def _weights(names: dict[nn.Module, str]) -> Iterator[_Weight]:
    for module, name in names.items():
        if isinstance(module, QuantizedLayer):
            for weight_name, quantizer in module.weight_quantizers().items():
                if module._parameters.get(weight_name) is None:  # type: ignore[attr-defined]  # it is a module
                    _refuse_computed(module, name, weight_name)
                if form_of_weight(module) != AS_IS:  # type: ignore[arg-type]
                    got = f"a {original_class(module).__name__}, whose forward hands another tensor to its product"  # type: ignore[arg-type]
                    wanted = f"a layer whose weight is quantized as it is ({HOW_ELSE})"
                    checks.fail(ValueError, f"{WHAT}layer {name!r}", wanted, got)
                yield _Weight(module, name, weight_name, quantizer)


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


def _memory(tensor: Tensor) -> object:
    """The same for two Parameters that are one weight, by identity or by their memory."""
    address = 0 if tensor.is_meta or hasattr(tensor, "device_mesh") else tensor.data_ptr()
    return (tensor.device, address) if address else id(tensor)


def _check_other_holders(names: dict[nn.Module, str], quantized: dict[object, _Weight]) -> None:
    """A module that holds a quantized Parameter, and has no quantizer for it, computes with what is not quantized."""
    for module, name in names.items():
        own = module.weight_quantizers() if isinstance(module, QuantizedLayer) else {}
        for parameter_name, parameter in module._parameters.items():
            w = None if parameter is None or parameter_name in own else quantized.get(_memory(parameter))
            if w is not None:
                wanted = (
                    f"a quantizer in each module that holds {w.full_name} (quantize it there too, give it a copy of "
                    f"the weight, or {HOW_ELSE})"
                )
                got = f"{type(module).__name__} {name!r}, which reads it in float"
                checks.fail(ValueError, WHAT.rstrip(", "), wanted, got)


def _check_readers(model: nn.Module, names: dict[nn.Module, str], weights: list[_Weight], example_inputs: Any) -> None:
    quantizers = [m for m in names if isinstance(m, FakeQuant)]
    reads = _RawReads(model, weights)
    with evaluating(model), eagerly(), nothing_changes(quantizers), reads:
        run_inputs(model, example_inputs)
    if reads.found:
        w, module, function = reads.found[0]
        wanted = f"weights that are read through their quantizers alone ({HOW_ELSE})"
        where = f"{type(module).__name__} {names[module]!r}" if names[module] else type(module).__name__
        got = f"{w.full_name}, which {where} hands to {function} as it is"
        checks.fail(ValueError, WHAT.rstrip(", "), wanted, got)


class _RawReads(FloatOperations):
    """Finds functions that compute with a quantized weight as it is, while its ``with`` block runs."""

    def __init__(self, model: nn.Module, weights: list[_Weight]) -> None:
        super().__init__(model)
        self.found: list[tuple[_Weight, nn.Module, str]] = []
        # Addresses, as a view of a weight is the weight.
        self.weights = [(w, w.tensor.data_ptr(), w.tensor.numel() * w.tensor.element_size()) for w in weights]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments and the result of one call."""
        result = func(*args, **(kwargs or {}))
        module = self.running[-1] if self.running else None
        if module is not None and not isinstance(module, FakeQuant):
            for w in self._weights_in((*args, *(kwargs or {}).values())):
                # Its own layer hands it to the quantizer; what has its memory is a view of it.
                if w.layer is not module and not self._holds(module, w) and self._computes(result, w):
                    self.found.append((w, module, getattr(func, "__name__", str(func)).strip("_")))
        return result

    @staticmethod
    def _holds(module: nn.Module, w: _Weight) -> bool:
        return isinstance(module, QuantizedLayer) and any(q is w.quantizer for q in module.weight_quantizers().values())

    def _weights_in(self, values: Any) -> list[_Weight]:
        found: list[_Weight] = []
        for value in values:
            if isinstance(value, (tuple, list)):
                found += self._weights_in(value)
            elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and value.numel():
                address = value.data_ptr()
                found += [w for w, start, size in self.weights if start <= address < start + size]
        return found

    def _computes(self, result: Any, w: _Weight) -> bool:
        results = [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(r, Tensor)]
        return any(w not in self._weights_in((r,)) for r in results)
