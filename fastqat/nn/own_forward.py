"""Twins of layers with a forward of their own, whose weight is quantized where that hands it to a product.

Such a forward pads, scales, standardizes the weight or computes its product in another way, and then hands the weight,
or what it has computed of it, to one of torch's products: that is the tensor which is quantized, and the class's own
code runs as it is.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastqat.nn.attention import is_active
from fastqat.nn.following_weight import (
    AS_IS,
    CHANGED,
    COMPUTED,
    TRANSPOSED,
    WARNED,
    FollowedWeight,
    Place,
    channels_first,
    is_unchanged,
    tensors_in,
)
from fastqat.nn.layers import QuantizedLayer, _TransposedConvolution
from fastqat.ops import checks


class _QuantizedProducts(FollowedWeight):
    """Quantizes the weight of a layer where its forward hands it to a product."""

    def __init__(self, layer: OwnForward, inputs: list[Tensor]) -> None:
        super().__init__(layer.weight_roots(), inputs, layer.is_table, layer.transposed_sources)
        self.layer = layer

    def handed(self, tensor: Tensor, form: str, place: Place) -> Tensor:
        """The quantized weight, as the product takes it."""
        layer = self.layer
        if form == COMPUTED:
            return layer.quantized_as_computed(tensor, place)
        device_type = tensor.device.type
        weight = layer.quantized_weight(device_type)
        if form == TRANSPOSED:
            weight = weight.reshape(tuple(tensor.shape)[::-1]).t()
        elif weight.shape != tensor.shape:
            weight = weight.reshape(tensor.shape)
        return weight if layer.quantized_dtype(device_type) is not None else weight.to(tensor.dtype)


class OwnForward(QuantizedLayer):
    """Mixin of the twins of layers with a forward of their own; the output channels of the weight are on axis 0.

    The input is the first floating tensor that the forward is given, before anything is done to it; the output is what
    it returns, or the first floating tensor in that.

    Attributes:
        weight_form: "as it is" where products take the weight itself; "computed" where they take what the forward
            computes of it; "changed" where the forward writes into it; None where that is not known yet.
    """

    is_table: ClassVar[bool] = False
    weight_form: str | None
    transposed_sources: tuple[str, ...] | None  # see FollowedWeight
    weight: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, with its arguments and results."""
        if self._is_idle():
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # of the layer
        if self.activation_fake_quant is not None and self.activation_on == "input":
            args, kwargs = self._with_quantized_input(args, kwargs)
        if self.weight_fake_quant is None:
            return self._with_quantized_output(super().forward(*args, **kwargs))  # type: ignore[misc]
        products = _QuantizedProducts(self, tensors_in((*args, *kwargs.values())))
        is_first = self.weight_form is None and not torch.compiler.is_compiling()
        before = self.weight.detach().clone() if is_first else None
        with products:
            y = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not products.taken:
            self._say_that_nothing_was_quantized()
        elif before is not None:
            is_same = is_unchanged(self.weight.detach(), before)
            self.weight_form = COMPUTED if COMPUTED in products.taken else AS_IS if is_same else CHANGED
        return self._with_quantized_output(y)

    def _say_that_nothing_was_quantized(self) -> None:
        """Raise in a compiled forward, which shows less of what it does; warn once in an eager one."""
        name = getattr(self.weight_fake_quant, "layer_name", None) or "?"
        what, wanted = f"layer {name!r}, {type(self).__name__}", "a forward in which a product takes its weight"
        if torch.compiler.is_compiling():
            checks.fail(RuntimeError, f"torch.compile of {what}", wanted, "none that is seen (.t() is, .T may not be)")
        if not self.__dict__.get(WARNED):
            self.__dict__[WARNED] = True
            warnings.warn(f"{what}: wanted {wanted}; got a call without, in which it was not quantized", stacklevel=2)

    def _is_idle(self) -> bool:
        """True if no quantizer does anything, and none is listened to."""
        return not is_active(self) and not any([q._forward_pre_hooks for _, q in self.quantizers()])

    def _with_quantized_input(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for i, x in enumerate(args):
            if isinstance(x, Tensor) and x.is_floating_point():
                return (*args[:i], self.quantized_input(x), *args[i + 1 :]), kwargs
        for name, x in kwargs.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                return args, {**kwargs, name: self.quantized_input(x)}
        return args, kwargs

    def _with_quantized_output(self, y: Any) -> Any:
        if isinstance(y, Tensor):
            return self.quantized_output(y)
        if type(y) in (tuple, list):
            for i, x in enumerate(y):
                if isinstance(x, Tensor) and x.is_floating_point():
                    return type(y)((*y[:i], self.quantized_output(x), *y[i + 1 :]))
        return y

    def weight_roots(self) -> list[tuple[Tensor, str]]:
        """What the weight is made of, each with what it is: itself, or parameters of a parametrization."""
        if self.__dict__["_parameters"].get("weight") is None:
            parametrizations = self.__dict__["_modules"].get("parametrizations")
            if parametrizations is not None and "weight" in parametrizations:
                return [(p, COMPUTED) for p in parametrizations["weight"].parameters()]
        return [(self.weight, AS_IS)]

    def quantized_as_computed(self, weight: Tensor, place: Place) -> Tensor:
        """What the forward has computed of the weight, quantized, in the dtype of autocast where that is on.

        Args:
            weight: as it stands at a place of a product.
            place: which says where its output channels are.
        """
        quantizer = self.weight_fake_quant
        if quantizer is None:
            return weight
        self._share_time(quantizer)
        view = channels_first(weight, place.channels, self._groups)
        quantized = quantizer(view, self.quantized_dtype(weight.device.type))
        return channels_first(quantized, place.channels, self._groups)


class OwnForwardByColumns(OwnForward):
    """Mixin of the twins whose output channels are the columns of the weight."""

    @staticmethod
    def output_channels_first(weight: Tensor, groups: int) -> Tensor:
        """[in, out] <-> [out, in], a view."""
        return weight.t()


class OwnForwardTransposed(OwnForward):
    """Mixin of the twins of transposed convolutions with a forward of their own."""

    output_channels_first = staticmethod(_TransposedConvolution.output_channels_first)


class OwnForwardEmbedding(OwnForward):
    """Mixin of the twins of embeddings with a forward of their own: the table alone is quantized."""

    takes_activation: ClassVar[bool] = False
    is_table: ClassVar[bool] = True

    def quantized_dtype(self, device_type: str) -> torch.dtype | None:
        """Autocast leaves a lookup in the dtype of its table."""
        return None
