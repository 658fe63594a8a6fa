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
    """

    weight: Tensor | None = None
    dtype: torch.dtype | None = None
    value: Tensor | None = None
    running: bool = False

    def get(self, weight: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """The quantized weight, if it is there and may be used."""
        if self.weight is not weight or self.dtype != dtype:
            return None
        return self.value if self.running or torch._C._current_graph_task_id() != -1 else None


class _Member(NamedTuple):
    layer: QuantizedLayer
    name: str

    @property
    def quantizer(self) -> FakeQuant:
        return getattr(self.layer, f"{self.name}_fake_quant")

    @property
    def weight(self) -> Tensor:
        return getattr(self.layer, self.name)


class WeightBuckets:
    """The hooks of :func:`quantize_weights_together`; ``remove()`` takes them off."""

    def __init__(self, model: nn.Module, buckets: list[list[_Member]]) -> None:
        self.model, self.buckets = model, buckets
        # Before the hooks of others; and after them even where the forward pass fails.
        self._handles = [
            model.register_forward_pre_hook(self.before, prepend=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off: each layer quantizes its own weight again."""
        for handle in self._handles:
            handle.remove()
        self.model.__dict__.pop(BUCKETS, None)

    def before(self, model: nn.Module, inputs: object) -> None:
        """Quantize the weights that can be."""
        if torch._C._are_functorch_transforms_active():
            return
        for bucket in self.buckets:
            ready = [m for m in bucket if m.quantizer.is_ready()]
            # A layer may be in evaluation while others train.
            for training in (True, False):
                self._quantize([m for m in ready if m.quantizer.training is training], training)

    def _quantize(self, members: list[_Member], training: bool) -> None:
        if members:
            dtypes = [m.layer.quantized_dtype(m.weight.device.type) for m in members]
            values = _Values(members)
            items = [_item(m, dtype, values) for m, dtype in zip(members, dtypes, strict=True)]
            results = apply_multi_tensor(items, training)
            for m, dtype, value in zip(members, dtypes, results, strict=True):
                m.quantizer.together = Together(m.weight, dtype, value, running=True)

    def after(self, *_: object) -> None:
        """Leave the weights to the backward pass alone."""
        for bucket in self.buckets:
            for m in bucket:
                compiling = torch.compiler.is_compiling()
                done = m.quantizer.together
                m.quantizer.together = Together() if compiling else done._replace(running=False)


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


def _item(member: _Member, dtype: torch.dtype | None, values: _Values) -> Item:
    weight = member.layer.quantized_view(member.weight, member.quantizer)
    return member.quantizer.item(weight, dtype, values)


def quantize_weights_together(model: nn.Module, bucket_bytes: int | None = None) -> WeightBuckets:
    """Quantize all weights of a prepared model in one call before each of its forward passes, and backward in one too.

    The results are those of quantizing them one by one, bit for bit. Weights whose range is not set yet, or is being
    calibrated, are left to their layers; so are all of them where a layer is called by itself.

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
    if hasattr(model, BUCKETS):
        checks.fail(ValueError, "model", "one without weights that are quantized together", "one that has them")
    members: dict[int, _Member] = {}
    for layer in model.modules():
        for name, quantizer in getattr(layer, "weight_quantizers", dict)().items():
            members.setdefault(id(quantizer), _Member(layer, name))  # type: ignore[arg-type]  # it is a twin
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
