"""Reads of a quantized weight past its quantizer: functions that compute with it as it is in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import FloatOperations, eagerly, evaluating, nothing_changes, run_inputs
from fastqat.nn.selection import names_of_modules

HOLDS, SECOND_QUANTIZER = "holds it", "a second quantizer"


@dataclass(frozen=True)
class PastRead:
    """A reader of a quantized weight that goes past its quantizer.

    Attributes:
        parameter: name of the weight.
        module, kind: name and class of the module that reads it.
        reads: function that takes it; HOLDS for a module that has it as a Parameter of its own, and no quantizer for
            it; or SECOND_QUANTIZER.
        calls: of the function with the example inputs; 0 where it was not run.
    """

    parameter: str
    module: str
    kind: str
    reads: str
    calls: int


class QuantizedWeight(NamedTuple):
    """A weight of a layer that has a quantizer."""

    layer: Any
    layer_name: str
    name: str
    quantizer: FakeQuant

    @property
    def tensor(self) -> Any:
        """The Parameter."""
        return self.layer._parameters[self.name]

    @property
    def full_name(self) -> str:
        """Its name in the model."""
        return f"{self.layer_name}.{self.name}".lstrip(".")


def past_reads(model: nn.Module, example_inputs: Any = None) -> tuple[PastRead, ...]:
    """Find what reads quantized weights past their quantizers.

    Args:
        model: any module.
        example_inputs: as for :func:`fastqat.report`; without them, modules that hold such a weight are found, and
            functions that take one are not.
    """
    names = {module: found[0] for module, found in names_of_modules(model).items()}
    weights = [
        QuantizedWeight(module, name, weight, quantizer)
        for module, name in names.items()
        if isinstance(module, QuantizedLayer)
        for weight, quantizer in module.weight_quantizers().items()
        if module._parameters.get(weight) is not None  # type: ignore[attr-defined]  # it is a module
    ]
    found = list(_holders(names, weights))
    if example_inputs is not None and weights:
        distinct = {memory_of(w.tensor): w for w in reversed(weights)}
        found += _raw_reads(model, names, list(distinct.values()), lambda: run_inputs(model, example_inputs))
    return tuple(found)


def memory_of(tensor: Tensor) -> object:
    """The same for two Parameters that are one weight, by identity or by their memory."""
    address = 0 if tensor.is_meta or hasattr(tensor, "device_mesh") else tensor.data_ptr()
    return (tensor.device, address) if address else id(tensor)


def _holders(names: dict[nn.Module, str], weights: Iterable[QuantizedWeight]) -> Iterator[PastRead]:
    """Modules that have a quantized Parameter as their own: with another quantizer, or with none."""
    first: dict[object, QuantizedWeight] = {}
    for w in weights:
        known = first.setdefault(memory_of(w.tensor), w)
        if known.quantizer is not w.quantizer:
            yield PastRead(known.full_name, w.layer_name, type(w.layer).__name__, SECOND_QUANTIZER, 0)
    for module, name in names.items():
        own = module.weight_quantizers() if isinstance(module, QuantizedLayer) else {}
        for parameter_name, parameter in module._parameters.items():
            if parameter is None or parameter_name in own or isinstance(parameter, nn.UninitializedParameter):
                continue
            holder = first.get(memory_of(parameter))
            if holder is not None:
                yield PastRead(holder.full_name, name, type(module).__name__, HOLDS, 0)


def _raw_reads(
    model: nn.Module, names: dict[nn.Module, str], weights: list[QuantizedWeight], run: Callable[[], object]
) -> list[PastRead]:
    """Functions that take a quantized weight as it is, in one run of the model that leaves no trace in it.

    Args:
        model: any module.
        names: of its modules.
        weights: that are looked for.
        run: runs the model.
    """
    quantizers = [m for m in names if isinstance(m, (FakeQuant, GradientFakeQuant))]
    reads = _RawReads(model, weights)
    with evaluating(model), eagerly(), nothing_changes(quantizers), reads:
        run()
    return [
        PastRead(w.full_name, names[module], type(module).__name__, function, calls)
        for (w, module, function), calls in reads.calls.items()
    ]


class _RawReads(FloatOperations):
    """Counts calls of functions that compute with a quantized weight as it is, while its ``with`` block runs."""

    def __init__(self, model: nn.Module, weights: list[QuantizedWeight]) -> None:
        super().__init__(model)
        self.calls: dict[tuple[QuantizedWeight, nn.Module, str], int] = {}
        # Addresses, as a view of a weight is the weight.
        self.weights = [(w, w.tensor.data_ptr(), w.tensor.numel() * w.tensor.element_size()) for w in weights]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments and the result of one call."""
        result = func(*args, **(kwargs or {}))
        module = self.running[-1] if self.running else None
        if module is None or isinstance(module, FakeQuant):
            return result
        for w in self._weights_in((*args, *(kwargs or {}).values())):
            # Its own layer hands it to the quantizer; what has its memory is a view of it.
            if not _holds(module, w) and self._computes(result, w):
                key = (w, module, getattr(func, "__name__", str(func)).strip("_"))
                self.calls[key] = self.calls.get(key, 0) + 1
        return result

    def _weights_in(self, values: Any) -> list[QuantizedWeight]:
        found: list[QuantizedWeight] = []
        for value in values:
            if isinstance(value, (tuple, list)):
                found += self._weights_in(value)
            elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and value.numel():
                address = value.data_ptr()
                found += [w for w, start, size in self.weights if start <= address < start + size]
        return found

    def _computes(self, result: Any, w: QuantizedWeight) -> bool:
        results = [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(r, Tensor)]
        return any(w not in self._weights_in((r,)) for r in results)


def _holds(module: nn.Module, w: QuantizedWeight) -> bool:
    """True for a layer that hands the weight to its quantizer."""
    return isinstance(module, QuantizedLayer) and any(q is w.quantizer for q in module.weight_quantizers().values())
