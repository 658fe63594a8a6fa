"""Less memory for what autograd saves of a prepared network, with the same training bit for bit.

What a quantized layer keeps of its input, for the gradient of its weight, are the packed codes: bits/32 of a float32
tensor. A ReLU keeps one bit of each element. A learned range needs its input for the gradient of the scale: behind
BatchNorm and ReLU it is computed again, from the input that BatchNorm keeps anyway. See docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastqat.nn import coded, layers
from fastqat.nn.masks import keep_as_torch, keep_less
from fastqat.nn.own_forward import OwnForward
from fastqat.nn.selection import CHOICE
from fastqat.nn.twins import is_twin, original_class, torch_layer
from fastqat.ops import checks

_LAYERS = (layers.Linear, layers._Convolution, layers._TransposedConvolution)


@dataclass(frozen=True)
class SavedActivations:
    """What :func:`compress_saved_activations` did.

    Attributes:
        compressed: names of the layers that keep codes.
        masked: names of the ReLU and ReLU6 modules that keep bits.
        left_alone: name of any other layer that could have been meant -> why it keeps what it did.
    """

    model: nn.Module
    compressed: tuple[str, ...]
    masked: tuple[str, ...]
    left_alone: dict[str, str]

    def remove(self) -> nn.Module:
        """Undo it: layers keep their inputs again. :func:`fastqat.remove` does it too.

        Returns:
            The model.
        """
        for module in self.model.modules():
            keep_as_torch(module)
        return self.model


def compress_saved_activations(model: nn.Module, *, activations: bool = True, masks: bool = True) -> SavedActivations:
    """Keep less for the backward pass of a prepared model, in place, with equal gradients bit for bit.

    It holds for eager training: with autocast, activation checkpointing, gradient accumulation and data-parallel. In
    a compiled forward, layers keep codes too, and the rest is left to the compiler. There is no second derivative. NaN
    in the input of a layer is kept as the code of 0. Calling it again changes what is kept to what is asked for.

    Args:
        model: a model that :func:`fastqat.prepare` prepared.
        activations: Linear, Conv1d-3d and ConvTranspose1d-3d with one scale for their input keep its codes.
        masks: ReLU and ReLU6 modules keep one bit of each element, and a learned range computes its input again where
            that is the result of a BatchNorm1d-3d module, or of one of these ReLU behind it.

    Returns:
        What it did; its ``remove()`` undoes it.

    Raises:
        ValueError: the model has no quantized layer, or nothing is asked for.
    """
    if not any(is_twin(module) for module in model.modules()):
        checks.fail(ValueError, "model", "one that fastqat.prepare prepared", f"{type(model).__name__} without layers")
    if not (activations or masks):
        checks.fail(ValueError, "activations, masks", "at least one of them", "neither")
    compressed, masked, left_alone = [], [], {}
    for name, module in model.named_modules():
        keep_as_torch(module)
        if is_twin(module) or torch_layer(original_class(module)) is not None:
            reason = _why_not(module)
            if reason:
                left_alone[name] = reason
            else:
                module.saves_codes = activations  # type: ignore[assignment]  # not a Tensor or Module
                compressed += [name] * activations
        elif masks and keep_less(module):
            masked += [name] * isinstance(module, (nn.ReLU, nn.ReLU6))
    return SavedActivations(model, tuple(compressed), tuple(masked), left_alone)


def _why_not(module: nn.Module) -> str:
    """Why a layer keeps its input as it is, or "" if it need not."""
    layer: Any = module
    if not is_twin(module):
        return getattr(getattr(module, CHOICE, None), "note", "") or "it is not quantized"
    if isinstance(module, nn.Embedding):
        return "its input are indices"
    if isinstance(module, OwnForward):
        return "it has a forward of its own, which saves what autograd saves for it"
    if not isinstance(module, _LAYERS):
        return "one quantizer serves several of its inputs"
    quantizer = layer.activation_fake_quant
    if quantizer is None:
        return "its input is not quantized"
    if layer.activation_on != "input":
        return "its output is quantized, not its input"
    if quantizer.axis is not None:
        return "the quantizer of its input has a scale for each channel"
    if not quantizer.fits_one_pass():
        return f"the quantizer of its input has estimator={quantizer.estimator!r}"
    if not isinstance(module, layers.Linear) and coded.zero_padding(layer) is None:
        return f"padding_mode={layer.padding_mode!r}, padding={layer.padding!r}: torch pads a copy of its input"
    return ""
