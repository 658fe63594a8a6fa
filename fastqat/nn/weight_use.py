"""How a forward that nobody here wrote uses the weight of its layer: found by running a copy of the layer once."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import (
    AS_IS,
    CHANGED,
    COMPUTED,
    TRANSPOSED,
    FollowedWeight,
    Place,
    channels_first,
    is_unchanged,
    tensors_in,
)
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.ops import checks

# Products that would take the weight past its quantizer, by name; of sums and scalings a forward is free.
_UNKNOWN_PRODUCTS = {"bmm", "baddbmm", "addbmm", "einsum", "tensordot", "inner", "bilinear", "dot", "addmv", "kron"}
_UNKNOWN_PRODUCTS |= {"matmul", "scaled_dot_product_attention", "multi_head_attention_forward", "embedding_bag"}


@dataclass(frozen=True)
class WeightUse:
    """How a forward uses the weight of its layer.

    Attributes:
        form: "as it is", "computed" or "changed", see :class:`fastqat.nn.own_forward.OwnForward`; None: not known.
        channels: the dimension of the weight that counts the output channels of its product.
        sources: see :class:`fastqat.nn.following_weight.FollowedWeight`.
        reason: why it cannot be quantized, or "".
    """

    form: str | None = None
    channels: int = 0
    sources: tuple[str, ...] | None = None
    reason: str = ""


class _Recorded(FollowedWeight):
    """Records what a forward hands to products."""

    def __init__(self, weight: Tensor, inputs: list[Tensor], looked_up: bool) -> None:
        super().__init__([(weight, AS_IS)], inputs, looked_up)
        self.uses: list[tuple[Tensor, str, Place]] = []
        self.others: list[str] = []
        self.attributes: set[str] = set()

    def handed(self, tensor: Tensor, form: str, place: Place) -> Tensor:
        """The tensor, noted."""
        self.uses.append((tensor, form, place))
        return tensor

    def met(self, function: Callable[..., Any]) -> None:
        """Note the function."""
        self.others.append(getattr(function, "__name__", str(function)).strip("_"))

    def took_attribute(self, of: str) -> None:
        """Note whose it is."""
        self.attributes.add(of)


_found: weakref.WeakKeyDictionary[nn.Module, tuple[type[nn.Module], WeightUse]] = weakref.WeakKeyDictionary()


def use_of_weight(layer: nn.Module, cls: type[nn.Module]) -> WeightUse:
    """How the forward of a class uses the weight of a layer of it; found once.

    Args:
        layer: one with a weight; it stays as it is.
        cls: its class, or the one that it had before it became a twin.
    """
    known = _found.get(layer)
    if known is not None and known[0] is cls:
        return known[1]
    weight = layer._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.is_meta or not weight.is_floating_point():
        return WeightUse()
    uses = [use for training in (False, True) if (use := _judged(layer, cls, training)) is not None]
    use = next((each for each in uses if each.reason), uses[0] if uses else WeightUse())
    if not use.reason:  # what one mode alone makes of the weight is what counts
        use = next((each for form in (COMPUTED, CHANGED) for each in uses if each.form == form), use)
        if uses:
            sources = {of for each in uses for of in each.sources or ()}
            use = replace(use, sources=tuple(sorted(sources)))
    _found[layer] = (cls, use)
    return use


@torch.no_grad()
def _judged(layer: nn.Module, cls: type[nn.Module], training: bool) -> WeightUse | None:
    """How a copy of a layer uses its weight in one mode; None where it does not run on an example."""
    for example in _examples(layer):
        try:
            twin = _copied(layer, cls, {})
            recorded = _run(twin, example, training)
        except Exception:  # anything that a forward may want of its arguments
            continue
        weight, own = twin._parameters["weight"], layer._parameters["weight"]
        assert weight is not None and own is not None
        return _use(recorded, cls, changed=not is_unchanged(weight, own))
    return None


def _use(recorded: _Recorded, cls: type[nn.Module], changed: bool) -> WeightUse:
    """What was recorded, in short."""
    others = list(dict.fromkeys(recorded.others))
    unknown = others if not recorded.uses else [name for name in others if name in _UNKNOWN_PRODUCTS]
    if unknown:
        to = ", ".join(unknown)
        return WeightUse(reason=f"its forward hands its weight to {to}, not to a product that is known")
    if not recorded.uses:
        return WeightUse(reason=f"the forward of {cls.__name__} hands its weight to no product that can be seen")
    tensors = {id(t): form for t, form, _ in recorded.uses if form == COMPUTED}
    if len(tensors) + any(form != COMPUTED for _, form, _ in recorded.uses) > 1:
        return WeightUse(reason="its forward makes several tensors of its weight for products")
    tensor, form, place = recorded.uses[0]
    if tensor.dtype not in checks.FLOAT_DTYPES:
        return WeightUse(reason=f"its forward hands its weight to a product as {tensor.dtype}")
    sources = tuple(sorted(recorded.attributes))
    if form == COMPUTED:
        return WeightUse(COMPUTED, sources=sources)
    channels = 1 - place.channels if form == TRANSPOSED and place.channels >= 0 else place.channels
    return WeightUse(CHANGED if changed else AS_IS, channels, sources)


def computed_weight(layer: nn.Module, cls: type[nn.Module]) -> Tensor:
    """What the forward of a layer computes of its weight for a product, as its quantizer sees it, with its history.

    Args:
        layer: one whose use of the weight is "computed"; it stays as it is.
        cls: its class, or the one that it had before it became a twin.

    Raises:
        RuntimeError: the layer does not run on an example; the message says what it wanted.
    """
    kept: dict[int, Any] = {id(p): p for p in layer.parameters()}
    error: Exception | None = None
    for example in _examples(layer):
        try:
            recorded = _run(_copied(layer, cls, dict(kept)), example, layer.training)
        except Exception as raised:
            error = raised
            continue
        if recorded.uses:
            tensor, _, place = recorded.uses[0]
            return channels_first(tensor, place.channels, getattr(layer, "groups", 1))
    got = "none" if error is None else repr(error)
    raise RuntimeError(f"{cls.__name__}: wanted a product that takes its weight, with one small input; got {got}")


def _run(layer: nn.Module, example: Any, training: bool) -> _Recorded:
    """Run a copy of a layer, and record what it does with its weight."""
    weight = layer._parameters["weight"]
    assert weight is not None
    layer.train(training)
    recorded = _Recorded(weight, tensors_in([example]), looked_up=isinstance(layer, nn.Embedding))
    devices = [weight.device] if weight.is_cuda else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
        warnings.simplefilter("ignore")
        with recorded:
            layer(example)
    return recorded


def _copied(layer: nn.Module, cls: type[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """A copy of a layer as it was before it became a twin, without hooks; its forward may change anything of it."""
    for module in layer.modules():
        memo.update({id(value): OrderedDict() for name, value in vars(module).items() if name.endswith("_hooks")})
        if isinstance(module, (FakeQuant, GradientFakeQuant)):
            memo[id(module)] = None
    copied = copy.deepcopy(layer, memo)
    copied.__class__ = cls
    return copied


def _examples(layer: nn.Module) -> Iterator[Any]:
    """Small inputs, one of which a layer of its kind takes; batches of two, for a norm in it.

    Of embeddings some take the shape of their indices; of convolutions some take the channels last.
    """
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]  # it has one
    if isinstance(layer, nn.Embedding):
        index = torch.zeros(2, 1, dtype=torch.int64, device=weight.device)
        yield from (index, index[0], index.shape)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        for factor in (1, 4):
            yield weight.new_ones([2, layer.in_channels, *(factor * r for r in reach)])
        yield weight.new_ones([2, *reach, layer.in_channels])
    else:
        for length in weight.shape[::-1] if isinstance(layer, nn.Linear) else weight.shape:
            yield from (weight.new_ones(2, length), weight.new_ones(2, 1, length))
