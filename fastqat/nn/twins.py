"""The twin of a layer, or why it has none; and the change of class that makes a layer its twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastqat.nn import attention, layers
from fastqat.nn.following_weight import AS_IS, COMPUTED, FORM, SOURCES, WARNED
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.own_forward import (
    OwnForward,
    OwnForwardByColumns,
    OwnForwardEmbedding,
    OwnForwardTransposed,
)
from fastqat.nn.weight_use import WeightUse, computed_weight, use_of_weight
from fastqat.ops import checks

TWINS: dict[type[nn.Module], type[Any]] = {
    twin.original: twin
    for twin in (
        layers.Linear,
        layers.Conv1d,
        layers.Conv2d,
        layers.Conv3d,
        layers.ConvTranspose1d,
        layers.ConvTranspose2d,
        layers.ConvTranspose3d,
        layers.Embedding,
        attention.MultiheadAttention,
    )
}
_GUARDED: dict[type[nn.Module], type[Any]] = {
    guarded.original: guarded for guarded in (attention.TransformerEncoderLayer, attention.TransformerEncoder)
}
# Layers of other packages that descend from none of torch's, by module and name: one weight, and one floating input.
_KNOWN = {("transformers.pytorch_utils", "Conv1D")}
# What a twin takes over or calls: a subclass that has one of its own may compute anything.
_METHODS = ("forward", "_conv_forward", "_output_padding")


def is_twin(module: nn.Module) -> bool:
    """True for a layer that ``prepare`` has made its twin."""
    return isinstance(module, QuantizedLayer)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it became a twin."""
    cls: Any = type(module)
    return cls.original if isinstance(module, (QuantizedLayer, *_GUARDED.values())) else cls


def torch_layer(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch's own that this one is or descends from, if that has a twin; or a known one of others."""
    return next((base for base in cls.__mro__ if base in TWINS or (base.__module__, base.__name__) in _KNOWN), None)


def has_own_forward(cls: type[nn.Module]) -> bool:
    """True if a class with a :func:`torch_layer` computes in a way of its own."""
    base = torch_layer(cls)
    return base not in TWINS or any(getattr(cls, name, None) is not getattr(base, name, None) for name in _METHODS)


def twin_type(layer: nn.Module) -> type[QuantizedLayer]:
    """The twin that this layer is or can become."""
    if is_twin(layer):
        return next(cls for cls in type(layer).__mro__ if cls in _DECLARED)
    cls = type(layer)
    base = torch_layer(cls)
    assert base is not None
    if base is nn.MultiheadAttention or not has_own_forward(cls):
        return TWINS[base]
    if issubclass(base, nn.Embedding):
        return OwnForwardEmbedding
    if issubclass(base, nn.modules.conv._ConvTransposeNd):
        return OwnForwardTransposed
    return OwnForwardByColumns if _use(layer).channels == 1 else OwnForward


_DECLARED = {*TWINS.values(), OwnForward, OwnForwardByColumns, OwnForwardEmbedding, OwnForwardTransposed}


def _use(layer: nn.Module) -> WeightUse:
    return use_of_weight(layer, original_class(layer))


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a layer that has a twin."""
    twin = TWINS.get(torch_layer(original_class(layer)), QuantizedLayer)  # type: ignore[arg-type]  # None has none
    return tuple(name for name in twin.weight_names if getattr(layer, name, None) is not None)


def form_of_weight(layer: nn.Module) -> str | None:
    """What the products of a layer take: its weight "as it is", or what was "computed" of it; None: not known.

    "changed" is a weight into which the forward of its layer writes.
    """
    if isinstance(layer, OwnForward):
        return layer.weight_form
    cls = original_class(layer)
    own = torch_layer(cls) is not nn.MultiheadAttention and has_own_forward(cls)
    return _use(layer).form if own else AS_IS


def quantized_view(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight of a layer that has a twin as its quantizer sees it: [output channels, ...].

    Where the forward of the layer computes it first, that is done here, too, with its history where the weight given
    requires a gradient.
    """
    if form_of_weight(layer) == COMPUTED:
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight.requires_grad):
            return computed_weight(layer, original_class(layer))
    return twin_type(layer).output_channels_first(weight, getattr(layer, "groups", 1))


def layout(layer: nn.Module) -> object:
    """Where a layer keeps its output channels; layers that share a quantizer along an axis must agree."""
    move = twin_type(layer).output_channels_first
    return None if move is QuantizedLayer.output_channels_first else (move, getattr(layer, "groups", 1))


def why_without_twin(layer: nn.Module) -> str | None:
    """Why a layer cannot become a twin, or None if it can."""
    cls = original_class(layer)
    base = torch_layer(cls)
    if base is None:
        return f"{cls.__name__} has no quantized twin"
    for name in ("__call__", *_METHODS):
        if name in layer.__dict__:
            return f"this {cls.__name__} had its {name} replaced"
    own = has_own_forward(cls)
    if cls.__call__ is not nn.Module.__call__:
        return f"{cls.__name__} has a __call__ of its own"
    if own and base is nn.MultiheadAttention:
        return f"{cls.__name__} has a forward of its own"
    names = weight_names(layer)
    for name in names:
        weight = layer._parameters.get(name)
        if weight is None:
            return f"its {name} is computed, not a Parameter of its own"
        if weight.dtype not in checks.FLOAT_DTYPES:
            return f"its {name} is {weight.dtype}"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return "its gradient is sparse"
    if not names:
        return "it has no weight"
    return _why_not_by_its_own_forward(layer) if own and not is_twin(layer) else None


def _why_not_by_its_own_forward(layer: nn.Module) -> str | None:
    taken = [name for name in ("weight", "activation", "gradient") if hasattr(layer, f"{name}_fake_quant")]
    if taken:
        return f"it has a {taken[0]}_fake_quant of its own"
    if getattr(layer, "max_norm", None) is not None:
        return f"{type(layer).__name__} has a forward of its own, and max_norm"
    return _use(layer).reason or None


def without_values(layer: nn.Module) -> str | None:
    """The first weight of a layer that has no values yet (lazy, or on the meta device), or None."""
    for name in weight_names(layer):
        weight = layer._parameters[name]
        if weight is not None and (is_lazy(weight) or weight.is_meta):
            return name
    return None


def to_twin(layer: nn.Module) -> None:
    """Make a layer its twin, in place."""
    twin = twin_type(layer)
    if issubclass(twin, OwnForward) and not is_twin(layer):
        use = _use(layer)
        setattr(layer, FORM, use.form)
        setattr(layer, SOURCES, use.sources)
    layer.__class__ = _twin_class(twin, type(layer))


def guard_fused_kernels(module: nn.Module) -> None:
    """Make an encoder that would go past the quantizers of its layers one that does not, in place."""
    for cls, guarded in _GUARDED.items():
        if isinstance(module, cls) and not isinstance(module, guarded):
            module.__class__ = _twin_class(guarded, type(module))


def to_original(module: nn.Module) -> None:
    """Give a module the class back that it had before, in place."""
    module.__class__ = original_class(module)
    for name in (FORM, SOURCES, WARNED):
        module.__dict__.pop(name, None)


def changed_since(module: nn.Module) -> bool:
    """True for a twin whose class is another one than it was given, as a parametrization of its weight makes it."""
    return is_twin(module) and type(module) is not _twin_class(twin_type(module), original_class(module))


_subclasses: dict[tuple[Any, Any], type[Any]] = {}


def _twin_class(twin: type[Any], cls: type[nn.Module]) -> type[Any]:
    """The twin of a class: ``twin``, or for another class than that of torch one that is still an instance of it."""
    if getattr(twin, "original", None) is cls:
        return twin
    if (twin, cls) not in _subclasses:
        body = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce__": _reduce}
        _subclasses[twin, cls] = type(cls.__name__, (twin, cls), {**body, "original": cls, "twin": twin})
    return _subclasses[twin, cls]


def _reduce(self: Any) -> tuple[Any, ...]:
    """Copy and pickle by the two classes that have a name to be found under."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # no such method before Python 3.11
    return _new, (type(self).twin, type(self).original), state


def _new(twin: type[Any], cls: type[nn.Module]) -> Any:
    return nn.Module.__new__(_twin_class(twin, cls))
