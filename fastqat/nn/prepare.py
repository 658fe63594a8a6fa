"""``prepare`` makes a network a QAT network; ``calibrate`` sets the ranges of its quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import TWINS, QuantizedLayer
from fastqat.nn.spec import QConfig, QSpec
from fastqat.ops import checks


def prepare(model: nn.Module, config: QConfig, *, first_last_bits: int | None = None) -> nn.Module:
    """Quantize weights and inputs of the Linear and Conv2d layers of a model, in place.

    The layers keep their Parameter objects and state_dict keys. Ranges of the weights are set here; those of the
    activations by :func:`calibrate`, or by the first batch. A weight that two layers share has one quantizer.

    Args:
        model: any module; subclasses of Linear and Conv2d are left alone.
        config: the quantizers.
        first_last_bits: bit-width of the first and the last of these layers, weight and input; None treats all alike.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such layer, or is prepared already; bits out of range.
    """
    if any(isinstance(m, QuantizedLayer) for m in model.modules()):
        checks.fail(ValueError, "model", "a model without quantizers", "one that is prepared already")
    layers = [m for m in model.modules() if type(m) in TWINS]
    if not layers:
        checks.fail(ValueError, "model", "a model with Linear or Conv2d layers", f"{type(model).__name__} without any")
    if first_last_bits is not None:
        checks.bit_width(first_last_bits)
    of_weight: dict[nn.Parameter, FakeQuant] = {}
    quantizers = []
    for index, layer in enumerate(layers):
        edge = first_last_bits is not None and index in (0, len(layers) - 1)
        changes = {"bits": first_last_bits} if edge else {}
        quantizers.append(_quantizers_of(layer, config, changes, of_weight))
    # All are made by now: a layer that cannot be quantized leaves the model as it was.
    for layer, (weight_fake_quant, activation_fake_quant) in zip(layers, quantizers, strict=True):
        layer.__class__ = TWINS[type(layer)]
        layer.add_module("weight_fake_quant", weight_fake_quant)
        layer.add_module("activation_fake_quant", activation_fake_quant)
    return model


def _quantizers_of(
    layer: nn.Module, config: QConfig, changes: dict[str, Any], of_weight: dict[nn.Parameter, FakeQuant]
) -> tuple[FakeQuant | None, FakeQuant | None]:
    """Quantizers of a layer's weight and input; that of a weight is made once and kept in of_weight."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    activation_fake_quant: FakeQuant | None = None
    if config.weight is not None and weight not in of_weight:
        of_weight[weight] = _build(replace(config.weight, **changes), weight.device)
        of_weight[weight].right_inverse(weight)
    if config.activation is not None:
        activation_fake_quant = _build(replace(config.activation, **changes), weight.device)
        activation_fake_quant.follows(weight)
    return of_weight.get(weight), activation_fake_quant


def _build(spec: QSpec, device: torch.device) -> FakeQuant:
    return FakeQuant(**asdict(spec), device=device)


def _inputs(batch: Any) -> tuple[Any, ...]:
    """The model's arguments of a batch: a tensor, or the first of (inputs, targets)."""
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Set the ranges of the activation quantizers from some batches, in evaluation mode.

    While it runs, the quantizers being calibrated pass their input through; those of weights quantize as ever.

    Args:
        model: a module that contains quantizers.
        batches: inputs, or (inputs, targets) of which only the inputs are used; moved to the device of the model.

    Returns:
        The model, in the training mode that it had.

    Raises:
        ValueError: there is nothing to calibrate, no batch, or a quantizer that saw no data; the message names it.
    """
    weights = {id(m.weight_fake_quant) for m in model.modules() if isinstance(m, QuantizedLayer)}
    weights |= {id(q) for m in model.modules() if isinstance(m, ParametrizationList) for q in m}
    quantizers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, FakeQuant) and m.range != "fixed" and id(m) not in weights
    }
    if not quantizers:
        checks.fail(ValueError, "model", "a model with quantizers to calibrate", type(model).__name__)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for q in quantizers.values():
            q.begin_calibration()
        count = 0
        for batch in batches:
            model(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in _inputs(batch)))
            count += 1
    finally:
        blind = [name for name, q in quantizers.items() if not q.end_calibration()]
        for m, mode in modes.items():
            m.training = mode
    if blind:
        got = f"{count} batches, in which these saw none: {', '.join(blind)}"
        checks.fail(ValueError, "batches", "data for every quantizer", got)
    return model


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned parameters of all quantizers in a model: the optimizer group that they want for themselves."""
    found: dict[int, nn.Parameter] = {}
    for m in model.modules():
        if isinstance(m, FakeQuant):
            found.update({id(p): p for p in m.parameters(recurse=False) if p.requires_grad})
    return list(found.values())
