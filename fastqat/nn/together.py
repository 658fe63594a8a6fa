"""All weights of a model in one call: each is quantized before the forward pass, and its layer finds it done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastqat.multi_tensor import Item, apply_multi_tensor
from fastqat.nn.tracking import value_at
from fastqat.ops import checks
from fastqat.schedules import Schedule

if TYPE_CHECKING:
    from fastqat.nn.fake_quant import FakeQuant
    from fastqat.nn.layers import QuantizedLayer


class Together(NamedTuple):
    """What a quantizer has of its weight.

    Args:
        weight: that was quantized; None: there is nothing.
        dtype: of the result, as it was asked for.
        value: quantized.
        running: the forward pass of the model runs. Afterwards only its backward pass may come back for it, to compute
            a part of it again: whoever calls a layer by itself may have changed its weight.
        again: that may be so. Reentrant checkpointing, which runs the forward pass without gradients and a backward
            pass of its own for each part, has the weight quantized again: there is one graph for all values.
    """

    weight: Tensor | None = None
    dtype: torch.dtype | None = None
    value: Tensor | None = None
    running: bool = False
    again: bool = True

    def get(self, weight: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """The quantized weight, if it is there and may be used."""
        if self.weight is not weight or self.dtype != dtype:
            return None
        return self.value if self.running or (self.again and torch._C._current_graph_task_id() != -1) else None


NOTHING = Together()


class _Member(NamedTuple):
    layer: QuantizedLayer
    name: str
    quantizer: FakeQuant

    @property
    def weight(self) -> Tensor:
        return getattr(self.layer, self.name)

    def is_ready(self) -> bool:
        """True if the layer would quantize its weight as it is now.

        Not where it is computed (parametrized, pruned), where a hook of the layer or its max_norm may change it first,
        or where the layer has lost the quantizer.
        """
        # Past nn.Module, whose way to look for attributes is a long one.
        layer: dict[str, Any] = self.layer.__dict__
        is_own = layer["_parameters"].get(self.name) is not None
        kept = layer["_modules"].get(f"{self.name}_fake_quant") is self.quantizer
        may_change = layer["_forward_pre_hooks"] or layer.get("max_norm") is not None
        return is_own and kept and not may_change and self.quantizer.is_ready()

    def is_differentiable(self) -> bool:
        """True if the own weight of the layer or its range gets a gradient."""
        if self.layer.__dict__["_parameters"][self.name].requires_grad:
            return True
        return any(p is not None and p.requires_grad for p in self.quantizer._parameters.values())


class WeightBuckets:
    """The hooks of :func:`quantize_weights_together`; ``remove()`` takes them off."""

    def __init__(self, model: nn.Module, buckets: list[list[_Member]]) -> None:
        self.buckets = buckets  # and not the model, which holds this: it goes when its last user does
        # Before the hooks of others; and after them even where the forward pass fails.
        self._handles = [
            model.register_forward_pre_hook(self.before, prepend=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off: each layer quantizes its own weight again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    @property
    def is_active(self) -> bool:
        """False once it was removed."""
        return bool(self._handles)

    def before(self, model: nn.Module, inputs: object) -> None:
        """Quantize the weights that can be."""
        self._forget()
        if torch._C._are_functorch_transforms_active():
            return
        for bucket in self.buckets:
            # A layer may be in evaluation, or without gradients, while others train, or on a device of its own.
            alike: dict[tuple[bool, bool, torch.device], list[_Member]] = {}
            for m in bucket:
                if m.is_ready():
                    key = (m.quantizer.training, m.is_differentiable(), m.weight.device)
                    alike.setdefault(key, []).append(m)
            for (training, *_), members in alike.items():
                self._quantize(members, training)

    def _forget(self) -> None:
        for bucket in self.buckets:
            for m in bucket:
                m.quantizer.keep(NOTHING)

    def _quantize(self, members: list[_Member], training: bool) -> None:
        weights = [m.weight for m in members]
        dtypes = [m.layer.quantized_dtype(w.device.type) for m, w in zip(members, weights, strict=True)]
        values = _Values(members)
        items = [_item(m, w, dtype, values) for m, w, dtype in zip(members, weights, dtypes, strict=True)]
        results = apply_multi_tensor(items, training)
        for m, weight, dtype, value in zip(members, weights, dtypes, results, strict=True):
            m.quantizer.keep(Together(weight, dtype, value, running=True))

    def after(self, *_: object) -> None:
        """Leave the weights to the backward pass alone."""
        for bucket in self.buckets:
            for m in bucket:
                done = m.quantizer.together
                comes_back = done.value is not None and done.value.requires_grad and not torch.compiler.is_compiling()
                m.quantizer.keep(done._replace(running=False) if comes_back else NOTHING)


class _Values:
    """Numbers and schedules at the steps of the members: one computation for all that share a schedule."""

    def __init__(self, members: list[_Member]) -> None:
        self.steps = [m.quantizer.step for m in members]
        self.known: dict[Schedule, dict[int, Tensor]] = {}

    def __call__(self, value: float | Schedule, step: Tensor) -> Tensor:
        if not isinstance(value, Schedule):
            return value_at(value, step)
        if value not in self.known:
            at = value.tensor(torch.cat(self.steps)).split(1)
            self.known[value] = {id(s): v for s, v in zip(self.steps, at, strict=True)}
        return self.known[value][id(step)]


def _item(member: _Member, weight: Tensor, dtype: torch.dtype | None, values: _Values) -> Item:
    return member.quantizer.item(member.layer.quantized_view(weight, member.quantizer), dtype, values)


def quantize_weights_together(model: nn.Module, bucket_bytes: int | None = None) -> WeightBuckets:
    """Quantize all weights of a prepared model in one call before each of its forward passes, and backward in one too.

    The results are those of quantizing them one by one, bit for bit. Weights whose range is not set yet, or is being
    calibrated, are left to their layers, and so are those that a layer computes (parametrized, pruned) or may change
    first (hooks before its forward pass, max_norm); so are all of them where a layer is called by itself. The weights
    of a call have one graph: outputs that are taken backward one after the other need retain_graph=True.

    Args:
        model: a model that :func:`fastqat.prepare` has prepared; it is the one whose calls count.
        bucket_bytes: None is one call for all. In data-parallel training, whose communication begins with the gradients
            that are there first: a call for about so many bytes of weights each, from the last layer to the first.

    Returns:
        What takes it back: ``.remove()``. :func:`fastqat.remove` does it, too.

    Raises:
        ValueError: the model has no quantized weight, or has been given this already; bucket_bytes is not positive.
    """
    if bucket_bytes is not None and (isinstance(bucket_bytes, bool) or bucket_bytes < 1):
        checks.fail(ValueError, "bucket_bytes", "None or a positive number", bucket_bytes)
    if getattr(model, BUCKETS, None) is not None and getattr(model, BUCKETS).is_active:
        checks.fail(ValueError, "model", "one without weights that are quantized together", "one that has them")
    members: dict[int, _Member] = {}
    for layer in model.modules():
        for name, quantizer in getattr(layer, "weight_quantizers", dict)().items():
            members.setdefault(id(quantizer), _Member(layer, name, quantizer))  # type: ignore[arg-type]  # it is a twin
    if not members:
        checks.fail(ValueError, "model", "a prepared model with quantized weights", f"{type(model).__name__} without")
    buckets: list[list[_Member]] = [[]]
    size = 0
    for member in reversed(members.values()) if bucket_bytes else members.values():
        if bucket_bytes and buckets[-1] and size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(member)
        size += member.weight.numel() * member.weight.element_size()
    handle: Any = WeightBuckets(model, buckets)
    setattr(model, BUCKETS, handle)
    return handle


BUCKETS = "weight_buckets"  # attribute of a model whose weights are quantized together
