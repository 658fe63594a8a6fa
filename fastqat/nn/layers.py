"""Twins of torch's layers that quantize their input and their weight.

A layer becomes its twin in place: the same object, the same Parameters and state_dict keys, hooks and all; the two
quantizers join it as sub-modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastqat.nn.fake_quant import FakeQuant


class QuantizedLayer:
    """Mixin of the twins: ``weight_fake_quant`` and ``activation_fake_quant``, each a FakeQuant or None."""

    weight: Tensor
    weight_fake_quant: FakeQuant | None
    activation_fake_quant: FakeQuant | None

    def quantized_weight(self, device_type: str) -> Tensor:
        """The quantized weight, in the dtype of autocast where that is on."""
        if self.weight_fake_quant is None:
            return self.weight
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        return self.weight_fake_quant(self.weight, autocast)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The quantized input."""
        if self.activation_fake_quant is None:
            return x
        # Its time is that of the weight; a copy of the layer learns here of its own.
        if isinstance(self.weight, nn.Parameter) and not torch.compiler.is_compiling():
            self.activation_fake_quant.follows(self.weight)
        return self.activation_fake_quant(x)


class Linear(QuantizedLayer, nn.Linear):
    """``torch.nn.Linear`` with quantized input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return F.linear(self.quantized_input(x), self.quantized_weight(x.device.type), self.bias)


class Conv2d(QuantizedLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` with quantized input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, in_channels, H, W] -> [N, out_channels, H', W']."""
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(x.device.type), self.bias)


TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
