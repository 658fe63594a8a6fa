"""Twins of torch's layers that quantize their weight, their input or their output, and the gradient of their output.

A layer becomes its twin in place (see :func:`fastqat.prepare`): the same object, the same Parameters and state_dict
keys, hooks and all; its quantizers join it as sub-modules. Axis 0 of a weight's quantizer is that of the output
channels in every twin; in an embedding it is that of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastqat.nn import coded
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import GROUPED, channels_first
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.sharded import is_sharded
from fastqat.ops import checks


class QuantizedLayer:
    """Mixin of the twins.

    Attributes:
        original: the class that the layer had before.
        weight_names: Parameters that may have a quantizer, called ``<name>_fake_quant``: a FakeQuant or None.
        activation_fake_quant: FakeQuant or None; what a layer computes on more than one tensor shares it.
        activation_on: "input" or "output": what activation_fake_quant quantizes.
        gradient_fake_quant: GradientFakeQuant or None, of the gradient of what a layer computes, before both products.
        saves_codes: True keeps the codes of the input for the backward pass, not the input; False keeps the input, and
            less for its quantizer; None is the way of autograd. See :func:`fastqat.compress_saved_activations`.
    """

    original: ClassVar[type[nn.Module]]
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    takes_activation: ClassVar[bool] = True
    weight_fake_quant: FakeQuant | None
    activation_fake_quant: FakeQuant | None
    gradient_fake_quant: GradientFakeQuant | None
    activation_on: str
    saves_codes: bool | None = None

    def weight_quantizers(self) -> dict[str, FakeQuant]:
        """The quantizers of its weights, by the weight's name."""
        found = {name: getattr(self, f"{name}_fake_quant") for name in self.weight_names}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def quantized_parameters(self) -> list[Tensor]:
        """The weights that have a quantizer."""
        return [getattr(self, name) for name in self.weight_quantizers()]

    def quantizers(self) -> Iterator[tuple[str, FakeQuant | GradientFakeQuant]]:
        """What is quantized ("weight", "input", "output", ...) and by which quantizer."""
        yield from self.weight_quantizers().items()
        if self.activation_fake_quant is not None:
            yield self.activation_on, self.activation_fake_quant
        if self.gradient_fake_quant is not None:
            yield "gradient", self.gradient_fake_quant

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.weight_names and isinstance(value, nn.Parameter):
            self._check_assigned(name, value)
        super().__setattr__(name, value)

    def _check_assigned(self, name: str, value: nn.Parameter) -> None:
        """Refuse another Parameter in the place of a weight whose range is set: that range says nothing of it.

        A checkpoint brings the range with it. FSDP2 puts a part (a DTensor) and the whole of one weight in turn.
        """
        old: nn.Parameter | None = self.__dict__["_parameters"].get(name)
        quantizer: FakeQuant | None = self.__dict__["_modules"].get(f"{name}_fake_quant")
        if old is None or old is value or quantizer is None or not quantizer.initialized:
            return
        if self.__dict__.get("_is_loading") or is_sharded(old) or is_sharded(value):
            return
        wanted = (
            "the Parameter whose range its quantizer has (write other values with copy_; tie weights before "
            "fastqat.prepare; call fastqat.remove(model, keep='quantized') before layers are fused)"
        )
        checks.fail(ValueError, f"{name} of layer {quantizer.layer_name or '?'!r}", wanted, "another Parameter")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # of the layer
        self._follow_weights()  # here: a forward that is compiled cannot

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        came = {name: prefix + name in state_dict for name in self.weight_names}
        for name, quantizer in self.weight_quantizers().items():
            quantizer.expect_range(came.get(name, False))
        for other in (self.activation_fake_quant, self.gradient_fake_quant):
            if other is not None:
                other.expect_range(any(came.values()))
        self.__dict__["_is_loading"] = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *arguments)  # type: ignore[misc]
        finally:
            self.__dict__.pop("_is_loading")
        self._follow_weights()  # load_state_dict(assign=True) makes other Parameters

    def _follow_weights(self) -> None:
        """Advance the time of the quantizers with the Parameters that there are now, where no model's clock does."""
        parameters: dict[str, nn.Parameter | None] = self._parameters  # type: ignore[attr-defined]
        weights = {name: weight for name in self.weight_names if (weight := parameters.get(name)) is not None}
        for name, quantizer in self.weight_quantizers().items():
            if name in weights:
                quantizer.follows(weights[name])
        for other in (self.activation_fake_quant, self.gradient_fake_quant):
            if other is not None and weights:
                other.follows(next(iter(weights.values())))

    @staticmethod
    def output_channels_first(weight: Tensor, groups: int) -> Tensor:
        """The weight as its quantizer sees it: [output channels, ...]. It is its own inverse."""
        return weight

    def quantized_weight(self, device_type: str, name: str = "weight") -> Tensor:
        """A quantized weight, in the dtype of autocast where that is on.

        Args:
            device_type: of the input.
            name: one of ``weight_names``.
        """
        weight: Tensor = getattr(self, name)
        quantizer: FakeQuant | None = getattr(self, f"{name}_fake_quant")
        if quantizer is None:
            return weight
        dtype = self.quantized_dtype(device_type)
        quantized = quantizer.done_together(weight, dtype)
        if quantized is None:
            quantized = quantizer(self.quantized_view(weight, quantizer), dtype)
        else:
            quantized = quantizer.in_units(quantized)
        return self.output_channels_first(quantized, self._groups)

    def quantized_view(self, weight: Tensor, quantizer: FakeQuant) -> Tensor:
        """The weight as its quantizer sees it, which follows it even where that is a view."""
        view = self.output_channels_first(weight, self._groups)
        if isinstance(weight, nn.Parameter) and not torch.compiler.is_compiling():
            quantizer.follows(weight)
        return view

    def quantized_dtype(self, device_type: str) -> torch.dtype | None:
        """The dtype that autocast wants of the weight, None where it is off or leaves the weight alone."""
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None

    @property
    def _groups(self) -> int:
        return self.__dict__.get("groups", 1)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input, quantized where it is the input that has the quantizer."""
        return self._quantized_activation(x) if self.activation_on == "input" else x

    def coded_input(self, x: Tensor) -> tuple[Tensor, coded.Codes | None]:
        """The input, quantized as by :meth:`quantized_input`; its codes, where they are what is kept of it."""
        if self.saves_codes is None or self.activation_fake_quant is None or not torch.is_grad_enabled():
            return self.quantized_input(x), None
        if self.activation_fake_quant.normalize is not None:  # its values are not those of the codes
            return self.quantized_input(x), None
        keep = coded.Keep(self.activation_fake_quant.bits if self.saves_codes else 0)
        y = self._quantized_activation(x, keep=keep)
        return y, keep.codes_of(y)

    def quantized_output(self, y: Tensor) -> Tensor:
        """The output, quantized where it is the output that has the quantizer, and with a quantized gradient."""
        if self.gradient_fake_quant is not None:
            self._share_time(self.gradient_fake_quant)
            y = self.gradient_fake_quant(y)
        return self._quantized_activation(y) if self.activation_on == "output" else y

    def _quantized_activation(self, x: Tensor, **options: Any) -> Tensor:
        if self.activation_fake_quant is None:
            return x
        self._share_time(self.activation_fake_quant)
        return self.activation_fake_quant(x, **options)

    def _share_time(self, quantizer: FakeQuant | GradientFakeQuant) -> None:
        """Let its time be that of the weight, where no model's clock says it: a copied layer learns here of its own."""
        weight = next((w for name in self.weight_names if (w := getattr(self, name)) is not None), None)
        if isinstance(weight, nn.Parameter) and not torch.compiler.is_compiling():
            quantizer.follows(weight)


class Linear(QuantizedLayer, nn.Linear):
    """``torch.nn.Linear``, quantized."""

    original = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        weight = self.quantized_weight(x.device.type)
        x, codes = self.coded_input(x)
        return self.quantized_output(coded.linear(x, codes, weight, self.bias))


class Embedding(QuantizedLayer, nn.Embedding):
    """``torch.nn.Embedding`` with a quantized table, whose rows are its channels; what is looked up is on its grid."""

    original = nn.Embedding
    takes_activation = False

    def forward(self, x: Tensor) -> Tensor:
        """x: indices [...] -> [..., embedding_dim]; max_norm bounds the rows of the table before they are quantized."""
        if self.max_norm is not None:
            torch.embedding_renorm_(self.weight.detach(), x.contiguous(), self.max_norm, self.norm_type)
        weight = self.quantized_weight(x.device.type)
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def quantized_dtype(self, device_type: str) -> torch.dtype | None:
        """Autocast leaves a lookup in the dtype of its table."""
        return None


class _Convolution(QuantizedLayer):
    _conv_forward: Any
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, in_channels, *size] or [in_channels, *size] -> [N, out_channels, *size'] or [out_channels, *size']."""
        weight = self.quantized_weight(x.device.type)
        x, codes = self.coded_input(x)
        if codes is None:
            return self.quantized_output(self._conv_forward(x, weight, self.bias))
        return self.quantized_output(coded.convolution(self, x, codes, weight))


class Conv1d(_Convolution, nn.Conv1d):
    """``torch.nn.Conv1d``, quantized."""

    original = nn.Conv1d


class Conv2d(_Convolution, nn.Conv2d):
    """``torch.nn.Conv2d``, quantized."""

    original = nn.Conv2d


class Conv3d(_Convolution, nn.Conv3d):
    """``torch.nn.Conv3d``, quantized."""

    original = nn.Conv3d


class _TransposedConvolution(QuantizedLayer):
    convolve: ClassVar[Any]
    weight: Any
    bias: Any
    stride: Any
    padding: Any
    kernel_size: Any
    dilation: Any
    groups: Any
    _output_padding: Any

    @staticmethod
    def output_channels_first(weight: Tensor, groups: int) -> Tensor:
        """[in_channels, out_channels/groups, *kernel] <-> [out_channels, in_channels/groups, *kernel].

        A view where groups is 1, or where the length that the groups split is groups.
        """
        return channels_first(weight, GROUPED, groups)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x: [N, in_channels, *size] or [in_channels, *size] -> [N, out_channels, *size'] or [out_channels, *size'].

        Args:
            x: the input.
            output_size: as in torch's layer.
        """
        dimensions = len(self.kernel_size)
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        )
        weight = self.quantized_weight(x.device.type)
        x, codes = self.coded_input(x)
        if codes is not None:
            return self.quantized_output(coded.convolution(self, x, codes, weight, tuple(output_padding)))
        # torch's function, kept on the class: a staticmethod, so that it takes no self
        y = self.convolve(
            x,
            weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return self.quantized_output(y)


class ConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d``, quantized."""

    original = nn.ConvTranspose1d
    convolve = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``, quantized."""

    original = nn.ConvTranspose2d
    convolve = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d``, quantized."""

    original = nn.ConvTranspose3d
    convolve = staticmethod(F.conv_transpose3d)
