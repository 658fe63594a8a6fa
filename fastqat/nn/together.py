"""All weights of a model in one call: each is quantized before the forward pass, and its layer finds it done."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastqat.nn.calls import NOTHING, Bucket, Forward, Member
from fastqat.ops import checks


class WeightBuckets:
    """The hooks of :func:`quantize_weights_together`; ``remove()`` takes them off."""

    def __init__(self, model: nn.Module, buckets: list[Bucket]) -> None:
        self.buckets = buckets  # and not the model, which holds this: it goes when its last user does
        self._forward: Forward | None = None  # that runs
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
        for bucket in self.buckets:
            bucket.forget()

    @property
    def is_active(self) -> bool:
        """False once it was removed."""
        return bool(self._handles)

    def before(self, model: nn.Module, inputs: object) -> None:
        """Quantize the weights that can be."""
        self._forget()
        if torch._C._are_functorch_transforms_active():
            return
        self._forward = Forward()
        for bucket in self.buckets:
            for call in bucket.calls():
                call.run(self._forward)

    def _forget(self) -> None:
        for bucket in self.buckets:
            for m in bucket:
                m.quantizer.keep(NOTHING)

    def after(self, *_: object) -> None:
        """Leave the weights to the backward pass alone."""
        if torch.compiler.is_compiling():
            self._forget()
        elif self._forward is not None:
            self._forward.end()
        self._forward = None


def quantize_weights_together(model: nn.Module, bucket_bytes: int | None = None) -> WeightBuckets:
    """Quantize all weights of a prepared model in one call before each of its forward passes, and backward in one too.

    The results are those of quantizing them one by one, bit for bit. Weights whose range is not set yet, or is being
    calibrated, are left to their layers, and so are those that a layer computes (parametrized, pruned), that are whole
    only while it runs (fully_shard), or that it may change first (hooks before its forward pass, max_norm); so are all
    of them where a layer is called by itself. The weights of a call have one graph: outputs that are taken backward
    one after the other need retain_graph=True.

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
    members: dict[int, Member] = {}
    for layer in model.modules():
        for name, quantizer in getattr(layer, "weight_quantizers", dict)().items():
            members.setdefault(id(quantizer), Member(layer, name, quantizer))  # type: ignore[arg-type]  # it is a twin
    if not members:
        checks.fail(ValueError, "model", "a prepared model with quantized weights", f"{type(model).__name__} without")
    parts: list[list[Member]] = [[]]
    size = 0
    for member in reversed(members.values()) if bucket_bytes else members.values():
        if bucket_bytes and parts[-1] and size >= bucket_bytes:
            parts.append([])
            size = 0
        parts[-1].append(member)
        size += member.weight.numel() * member.weight.element_size()
    handle: Any = WeightBuckets(model, [Bucket(part) for part in parts])
    setattr(model, BUCKETS, handle)
    return handle


BUCKETS = "weight_buckets"  # attribute of a model whose weights are quantized together
