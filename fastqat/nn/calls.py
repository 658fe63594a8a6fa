"""Calls of the multi-tensor ops for the weights of many layers, which are kept from step to step."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastqat.multi_tensor import Plan, apply_multi_tensor
from fastqat.nn.following_weight import AS_IS, FORM
from fastqat.nn.items import StepValues, constants_of, dampening_of, threshold_of
from fastqat.nn.sharded import is_sharded
from fastqat.nn.spec import QSpec

if TYPE_CHECKING:
    from fastqat.nn.fake_quant import FakeQuant
    from fastqat.nn.layers import QuantizedLayer


class Member(NamedTuple):
    """A weight that is quantized with others."""

    layer: QuantizedLayer
    name: str
    quantizer: FakeQuant

    @property
    def weight(self) -> Tensor:
        """The weight as its layer has it."""
        return getattr(self.layer, self.name)

    def is_ready(self) -> bool:
        """True if the layer would quantize its weight as it is now.

        Not where it is computed (parametrized, pruned, standardized) or sharded until the layer runs, where a hook of
        the layer, its forward or its max_norm may change it first, or where the layer has lost the quantizer.
        """
        layer: dict[str, Any] = self.layer.__dict__  # past nn.Module, whose way to look for attributes is a long one
        return (
            layer["_parameters"].get(self.name) is not None
            and layer["_modules"].get(self.name + "_fake_quant") is self.quantizer
            and not layer["_forward_pre_hooks"]
            and layer.get("max_norm") is None
            and layer.get(FORM, AS_IS) == AS_IS
            and self.quantizer.is_ready()
            and not is_sharded(layer["_parameters"][self.name])
            and not is_sharded(self.quantizer._parameters["scale"])
        )

    def is_differentiable(self) -> bool:
        """True if the own weight of the layer or its range gets a gradient."""
        if self.layer.__dict__["_parameters"][self.name].requires_grad:
            return True
        return any([p is not None and p.requires_grad for p in self.quantizer._parameters.values()])


class Together(NamedTuple):
    """What a quantizer has of its weight.

    Args:
        weight: that was quantized; None: there is nothing.
        dtype: of the result, as it was asked for.
        value: quantized.
        forward: the forward pass of the model that it was quantized for. After that only its backward pass may come
            back for it, to compute a part of it again: whoever calls a layer by itself may have changed its weight.
        again: that may be so. Reentrant checkpointing, which runs the forward pass without gradients and a backward
            pass of its own for each part, has the weight quantized again: there is one graph for all values.
    """

    weight: Tensor | None = None
    dtype: torch.dtype | None = None
    value: Tensor | None = None
    forward: Forward | None = None
    again: bool = True

    def get(self, weight: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """The quantized weight, if it is there and may be used."""
        if self.weight is not weight or self.dtype != dtype:
            return None
        running = self.forward is not None and self.forward.running
        return self.value if running or (self.again and torch._C._current_graph_task_id() != -1) else None


NOTHING = Together()


class Forward:
    """A forward pass of a model: ``running`` until its end."""

    def __init__(self) -> None:
        self.running = True
        self.without_graph: list[Member] = []  # to whose values no backward pass can come back

    def end(self) -> None:
        """Leave the values to the backward pass alone."""
        self.running = False
        for m in self.without_graph:
            m.quantizer.keep(NOTHING)


class Call:
    """One call for the weights of layers: made once, and run in each step as long as nothing changes.

    Args:
        members: the layers, which are ready, with weights on one device.
        training: of their quantizers.
    """

    def __init__(self, members: Sequence[Member], training: bool) -> None:
        self.members, quantizers = members, [m.quantizer for m in members]
        self.weights = [m.weight for m in members]
        device = self.weights[0].device
        self.dtypes = [m.layer.quantized_dtype(device.type) for m in members]
        views = [m.layer.quantized_view(w, m.quantizer) for m, w in zip(members, self.weights, strict=True)]
        constants = [
            constants_of(q, x, q.checked_axis(x), dtype)
            for q, x, dtype in zip(quantizers, views, self.dtypes, strict=True)
        ]
        self.plan = plan = Plan(constants, device, training)
        self.scales: list[Tensor] = [q.scale for q in quantizers]
        self.shifts: list[Tensor | None] = [q.zero_point if q.offset is None else q.offset for q in quantizers]
        # Tensors that are new ones in each step: views of weights, ranges that follow the data, computed offsets.
        several = enumerate(zip(quantizers, views, self.weights, strict=True))
        self.new = [i for i, (q, x, weight) in several if x is not weight or q.is_following or q.count_from == "lowest"]
        steps = [c.step for c in constants]
        thresholds = [threshold_of(q, c) for q, c in zip(quantizers, constants, strict=True)]
        self.thresholds = StepValues(thresholds, steps, plan.none)
        pulls = [dampening_of(q, x) for q, x in zip(quantizers, views, strict=True)]
        self.dampenings = StepValues([p for p, _ in pulls], steps, plan.none, [factor for _, factor in pulls])

    def run(self, forward: Forward) -> None:
        """Quantize the weights as they are now, and leave them to their quantizers."""
        xs, scales, shifts = self.weights, self.scales, self.shifts
        if self.new:
            xs, scales, shifts = list(xs), list(scales), list(shifts)
        for i in self.new:
            layer, _, quantizer = self.members[i]
            xs[i] = layer.quantized_view(self.weights[i], quantizer)
            if quantizer.is_following:
                _, scales[i], shifts[i] = quantizer.grid(xs[i])
            elif quantizer.count_from == "lowest":
                shifts[i] = quantizer.grid_offset()
        values = apply_multi_tensor(self.plan, xs, scales, shifts, self.thresholds.now(), self.dampenings.now())
        for m, weight, dtype, value in zip(self.members, self.weights, self.dtypes, values, strict=True):
            m.quantizer.keep(Together(weight, dtype, value, forward))
        if not values[0].requires_grad:
            forward.without_graph += self.members


# What a quantizer's part in a call depends on, beside its tensors.
_options = operator.itemgetter(
    *("_bits" if f.name == "bits" else f.name for f in fields(QSpec) if f.name != "estimator_strength"),
    "training",
    "observer_enabled",
    "tensor_id",
)


class Facts(NamedTuple):
    """What calls were made from.

    Args:
        objects: must be the very same ones, and may have other contents.
        values: must be equal.
    """

    objects: list[Any]
    values: list[Any]

    @classmethod
    def of(cls, members: Sequence[Member], device_types: Sequence[str]) -> Facts:
        """Facts of now, which are asked for in each step: past nn.Module's way to look for attributes.

        Args:
            members: whose weights are quantized.
            device_types: of these weights, as they were.
        """
        objects: list[Any] = []
        values: list[Any] = [torch.is_autocast_enabled(t) and torch.get_autocast_dtype(t) for t in device_types]
        for m in members:
            ready = m.is_ready()
            values.append(ready)
            if not ready:
                continue
            quantizer = m.quantizer.__dict__
            parameters, tracker = quantizer["_parameters"], quantizer["_modules"].get("tracker")
            w, scale = m.layer.__dict__["_parameters"][m.name], parameters["scale"]
            # The same Parameter may have another memory (.data = ...), of another form.
            values += (w.shape, w.stride(), w.device, scale.shape, scale.dtype, scale.device)
            values += (m.is_differentiable(), _options(quantizer))
            objects += (w, quantizer["clock"], *parameters.values(), *quantizer["_buffers"].values())
            if tracker is not None:
                objects += tracker._buffers.values()
                values += (tracker.options, tracker.momentum)
        return cls(objects, values)

    def hold(self, now: Facts) -> bool:
        """True if these are still the facts."""
        # Their lengths differ with the values: whether a weight is ready, and whether it has a tracker.
        return self.values == now.values and all(map(operator.is_, self.objects, now.objects))


class Bucket:
    """Weights that are quantized in as few calls as they can be.

    Args:
        members: the weights.
    """

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.forget()

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        # The tensors of a copy are others.
        return {"members": self.members, "_calls": [], "_device_types": (), "_facts": None}

    def forget(self) -> None:
        """Keep no call."""
        self._calls: list[Call] = []
        self._device_types: tuple[str, ...] = ()
        self._facts: Facts | None = None

    def calls(self) -> list[Call]:
        """The calls for the weights as they are now: those of the step before, where the facts are the same."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # fake or traced tensors must not be kept
            return self._new_calls()
        if self._facts is not None and self._facts.hold(Facts.of(self.members, self._device_types)):
            return self._calls
        self.forget()
        calls = self._new_calls()
        device_types = tuple({call.plan.device.type for call in calls})
        facts = Facts.of(self.members, device_types)
        # What has a graph (torch.func.functional_call) is not kept alive.
        if not any(isinstance(t, Tensor) and t.grad_fn is not None for t in facts.objects):
            self._calls, self._device_types, self._facts = calls, device_types, facts
        return calls

    def _new_calls(self) -> list[Call]:
        # A layer may be in evaluation, or without gradients, while others train, or on a device of its own.
        alike: dict[tuple[bool, bool, torch.device], list[Member]] = {}
        for m in self.members:
            if m.is_ready():
                alike.setdefault((m.quantizer.training, m.is_differentiable(), m.weight.device), []).append(m)
        return [Call(members, training) for (training, *_), members in alike.items()]
