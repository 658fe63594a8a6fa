"""Reads past a quantizer: functions that take a quantized weight as it is, and modules in float that hold one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import COMPUTED
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import ModuleAwareMode, eagerly, evaluating, nothing_changes, run_inputs, storage_of
from fastqat.nn.selection import names_of_modules
from fastqat.nn.sharded import is_sharded
from fastqat.nn.twins import form_of_weight, original_class

HOLDS = "holds it"  # a module in float, which was not seen to read it
TWO = "has another quantizer for it"


@dataclass(frozen=True)
class PastRead:
    """A reader of a quantized weight that its quantizer does not see.

    Attributes:
        parameter: name of the weight in the model.
        module, kind: name and class of the innermost module that ran, or that holds the weight.
        operation: name of the function; "holds it" for a module in float that has the weight too and was not seen to
            read it; "has another quantizer for it" for a layer whose weight was tied after ``prepare``.
        calls: of the function with the example inputs; 0 where none was seen.
    """

    parameter: str
    module: str
    kind: str
    operation: str
    calls: int


def past_reads(model: nn.Module, example_inputs: Any = None) -> tuple[PastRead, ...]:
    """What reads the quantized weights of a model past their quantizers.

    Args:
        model: any module; one without quantized layers has none.
        example_inputs: as of :func:`fastqat.report`; the model runs once with them, and stays as it is. Without them
            only modules that hold such a weight too are found, and weights that have two quantizers.
    """
    names = names_of_modules(model)
    owners = _owners(names)
    if not owners:
        return ()
    called = {p: name for name, p in model.named_parameters()}
    reads: Counter[tuple[nn.Parameter, nn.Module, str]] = Counter()
    if example_inputs is not None:
        quantizers = [m for m in names if isinstance(m, (FakeQuant, GradientFakeQuant))]
        seen = _Reads(model, owners)
        with evaluating(model), eagerly(), nothing_changes(quantizers), seen:
            run_inputs(model, example_inputs)
        reads = seen.count
    readers = {(p, module) for p, module, _ in reads}
    for p, module, what in _other_holders(names, owners):
        if (p, module) not in readers:
            reads[p, module, what] = 0
    return tuple(
        PastRead(called[p], names[module][0], original_class(module).__name__, operation, calls)
        for (p, module, operation), calls in reads.items()
    )


def _owners(names: dict[nn.Module, list[str]]) -> dict[nn.Parameter, dict[nn.Module, FakeQuant]]:
    """The layers that quantize each Parameter, and their quantizers of it."""
    owners: dict[nn.Parameter, dict[nn.Module, FakeQuant]] = {}
    one_of: dict[object, nn.Parameter] = {}
    for module in names:
        if isinstance(module, QuantizedLayer):
            for name, quantizer in module.weight_quantizers().items():
                weight = module._parameters.get(name)
                if weight is not None:
                    owners.setdefault(one_of.setdefault(memory_of(weight), weight), {})[module] = quantizer
    return owners


def _other_holders(
    names: dict[nn.Module, list[str]], owners: dict[nn.Parameter, dict[nn.Module, FakeQuant]]
) -> Iterator[tuple[nn.Parameter, nn.Module, str]]:
    for weight, layers in owners.items():
        # What a forward computes of a weight has a quantizer of its own by right.
        known = {layer: quantizer for layer, quantizer in layers.items() if form_of_weight(layer) != COMPUTED}
        first = next(iter(known.values()), None)
        yield from ((weight, layer, TWO) for layer, quantizer in known.items() if quantizer is not first)
    one_of = {memory_of(p): p for p in owners}
    for module in names:
        for held in module._parameters.values():
            p = None if held is None or nn.parameter.is_lazy(held) else one_of.get(memory_of(held))
            if p is not None and module not in owners[p]:
                yield p, module, HOLDS


def memory_of(tensor: Tensor) -> object:
    """The same for two Parameters that are one weight, by identity or by their memory."""
    address = 0 if tensor.is_meta or is_sharded(tensor) else tensor.data_ptr()
    return (tensor.device, address, tensor.numel()) if address else id(tensor)


class _Reads(ModuleAwareMode):
    """Counts functions that compute with a quantized Parameter, or a view of it, outside of the layers that own it.

    Views, shapes and writes compute nothing: a read gives a tensor that is no view of the Parameter.
    """

    def __init__(self, model: nn.Module, owners: dict[nn.Parameter, dict[nn.Module, FakeQuant]]) -> None:
        super().__init__(model)
        self.owners = owners
        self.by_storage = {storage_of(p): p for p in owners}
        held = Counter(storage_of(p) for p in model.parameters() if not nn.parameter.is_lazy(p))
        self.alone = {storage for storage, parameters in held.items() if parameters == 1}
        self.count: Counter[tuple[nn.Parameter, nn.Module, str]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one call."""
        y = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if not self.running or name.endswith("_like") or name.startswith("new_"):
            return y
        module = self.running[-1]
        taken = {
            p for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and (p := self._parameter(x)) is not None
        }
        for p in taken:
            made = [x for x in tree_leaves(y) if isinstance(x, Tensor) and x.is_floating_point()]
            computed = any(self._parameter(x) is not p for x in made)
            if computed and module not in self.owners[p] and not isinstance(module, FakeQuant):
                self.count[p, module, name] += 1
        return y

    def _parameter(self, x: Tensor) -> nn.Parameter | None:
        """The quantized Parameter that a tensor is, or is a view of."""
        for known in (x, x._base):
            if isinstance(known, nn.Parameter) and known in self.owners:
                return known
        storage = storage_of(x)  # detach() makes a view without a base; a Parameter in a flat buffer is not alone there
        return self.by_storage.get(storage) if storage in self.alone else None
