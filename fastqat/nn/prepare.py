"""``prepare`` makes a network a QAT network, ``remove`` undoes it, ``fake_quant_enabled`` switches it off and on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from fastqat.multi_tensor import STATE
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.fuse import KINDS, NOTE, FusedActivation, fuse, fusions, unfuse
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.masks import keep_as_torch
from fastqat.nn.selection import Choice, Override, choose, names_of_modules
from fastqat.nn.spec import QConfig, QSpec
from fastqat.nn.together import BUCKETS
from fastqat.nn.tracking import Tracker
from fastqat.nn.twins import (
    changed_since,
    guard_fused_kernels,
    is_twin,
    quantized_view,
    to_original,
    to_twin,
    twin_type,
    weight_names,
)
from fastqat.ops import checks

IGNORED = "_ddp_params_and_buffers_to_ignore"  # attribute that DistributedDataParallel looks for
CHOICE = "fake_quant_choice"  # attribute of every layer that prepare decided on

Quantizer = FakeQuant | GradientFakeQuant


def prepare(
    model: nn.Module,
    config: QConfig,
    *,
    first_last_bits: int | None = None,
    overrides: Mapping[str, Override] | None = None,
    fuse_activations: bool = False,
) -> nn.Module:
    """Quantize weights and activations of the layers of a model, in place.

    Linear, Conv1d-3d, ConvTranspose1d-3d, Embedding (its table only) and MultiheadAttention (its projections) become
    twins that keep their Parameter objects and state_dict keys; so do subclasses that compute as these do. Ranges of
    the weights are set here (that of a weight of zeros once it has changed); those of the activations by
    :func:`calibrate`, or by the first batch. A weight that two layers share has one quantizer, and so has the
    activation of a layer that is called several times. Everything else stays in float: :func:`report` says what, and
    why. Preparing again with the same arguments changes nothing.

    Args:
        model: any module.
        config: the quantizers of every layer.
        first_last_bits: bit-width of the first and the last of these layers in order of registration, and of layers
            that share their weights; None treats all alike.
        overrides: layer name or pattern (``fnmatch``) -> QConfig for the layers that it matches, options of QSpec that
            change both quantizers, or None, which leaves them in float. The last pattern that matches a layer decides.
        fuse_activations: a ReLU or ReLU6 module whose output goes into one quantized layer and nowhere else becomes an
            identity, and the quantizer of that layer's input computes it in the same pass: the same values and
            gradients, with one pass over memory less. Hooks added to the module later see what comes before it.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model has no such layer, is prepared otherwise already, or is data-parallel; a
            pattern matches no layer; an option is wrong, or does not fit a layer; two layers want different quantizers
            for one weight. The message names it, and the model is as it was.
    """
    chosen = choose(model, config, first_last_bits, overrides)
    names = {module: found[0] for module, found in names_of_modules(model).items()}
    if any(is_twin(module) for module in model.modules()):
        _check_prepared_alike(chosen, names)
        _check_fused_alike(names, fuse_activations)
        return model
    _check_not_parallel(names)
    configs = {layer: choice.config for layer, choice in chosen.items()}
    found = fusions(model, configs) if fuse_activations else {}
    configs.update({fusion.layer: fusion.config for fusion in found.values() if fusion.layer is not None})
    made: dict[nn.Parameter, FakeQuant] = {}
    quantizers = {layer: _quantizers_of(layer, names[layer], config, made) for layer, config in configs.items()}
    for number, quantizer in enumerate(_distinct(quantizers)):
        quantizer.tensor_id = number
    # All are made by now: a layer that cannot be quantized leaves the model as it was.
    try:
        for layer, choice in chosen.items():
            setattr(layer, CHOICE, choice)
            if choice.config is not None:
                _add(layer, choice.config, quantizers[layer])
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) and is_twin(module.out_proj) and not is_twin(module):
                _add(module, QConfig(None, None), {})  # its own forward would go past its projection
            guard_fused_kernels(module)
        fuse(found, names)
    except BaseException:  # a class that cannot be changed, an attribute in the way
        remove(model)
        raise
    _set_ignored(model, [*_ignored(model), *_tracked_buffers(model)])
    return model


def _tracked_buffers(model: nn.Module) -> list[str]:
    """Names of the state of tracking, which is equal in all processes of a data-parallel training by itself."""
    trackers = [name for name, module in model.named_modules() if isinstance(module, Tracker)]
    return [f"{name}.{state}" for name in trackers for state in STATE]


def _ignored(model: nn.Module) -> list[str]:
    return list(getattr(model, IGNORED, ()))


def _set_ignored(model: nn.Module, names: list[str]) -> None:
    """Say which buffers DistributedDataParallel need not send round in every forward."""
    if names:
        setattr(model, IGNORED, names)
    else:
        model.__dict__.pop(IGNORED, None)


def _check_prepared_alike(chosen: dict[nn.Module, Choice], names: dict[nn.Module, str]) -> None:
    for layer, choice in chosen.items():
        found: Choice | None = getattr(layer, CHOICE, None)
        if found is None or found.config != choice.config:
            got = "not prepared" if found is None else "left in float" if found.config is None else f"{found.config}"
            wanted = f"{choice.config or 'float'} (call fastqat.remove(model) before another configuration)"
            checks.fail(ValueError, f"layer {names[layer]!r} of a prepared model", wanted, got)


def _check_fused_alike(names: dict[nn.Module, str], wanted: bool) -> None:
    asked = {hasattr(module, NOTE) for module in names if type(module) in (*KINDS, FusedActivation)}
    if asked and asked != {wanted}:
        checks.fail(ValueError, "fuse_activations", f"{not wanted}, as the model was prepared", wanted)


def _check_not_parallel(names: dict[nn.Module, str]) -> None:
    """DistributedDataParallel shares the gradients of the parameters that it finds when it wraps a module."""
    for module, name in names.items():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            got = f"DistributedDataParallel at {name!r}" if name else "DistributedDataParallel"
            checks.fail(ValueError, "model", "one to wrap after it is prepared", got)


def _distinct(quantizers: Mapping[nn.Module, Mapping[str, Quantizer | None]]) -> list[Quantizer]:
    """Every quantizer once, in the order of the layers; those of gradients last, as they change no other's number."""
    found = dict.fromkeys(q for of_layer in quantizers.values() for q in of_layer.values() if q is not None)
    return sorted(found, key=lambda q: isinstance(q, GradientFakeQuant))


def _quantizers_of(
    layer: nn.Module, name: str, config: QConfig | None, made: dict[nn.Parameter, FakeQuant]
) -> dict[str, Quantizer | None]:
    """Quantizers of a layer by the name of what they quantize; those of weights are made once and kept in made."""
    if config is None:
        return {}
    weights = {weight_name: getattr(layer, weight_name) for weight_name in weight_names(layer)}
    first = next(iter(weights.values()))
    try:
        for weight in weights.values():
            if config.weight is not None and weight not in made:
                made[weight] = _of_weight(layer, weight, config.weight)
                made[weight].layer_name = name
        activation = None if config.activation is None else _build(config.activation, first.device)
        gradient = None if config.gradient is None else GradientFakeQuant(config.gradient, name, first.device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None
    if activation is not None:
        activation.layer_name = name
    for other in (activation, gradient):
        if other is not None:
            other.follows(first)
    quantized = {name: made[w] if config.weight is not None else None for name, w in weights.items()}
    return {**quantized, "activation": activation, "gradient": gradient}


def _of_weight(layer: nn.Module, weight: nn.Parameter, spec: QSpec) -> FakeQuant:
    quantizer = _build(spec, weight.device)
    quantizer.right_inverse(quantized_view(layer, weight))
    quantizer.follows(weight)
    return quantizer


def _build(spec: QSpec, device: torch.device) -> FakeQuant:
    return FakeQuant(**{field.name: getattr(spec, field.name) for field in fields(spec)}, device=device)


def _add(layer: nn.Module, config: QConfig, quantizers: Mapping[str, Quantizer | None]) -> None:
    """Make a layer its twin, with these quantizers."""
    to_twin(layer)
    for name in _quantizer_names(layer):
        quantizer = quantizers.get(name.removesuffix("_fake_quant"))
        layer.add_module(name, None if quantizer is None else quantizer.train(layer.training))
    layer.activation_on = config.activation_on  # type: ignore[assignment]  # not a Tensor or Module


def _quantizer_names(layer: nn.Module) -> list[str]:
    return [f"{name}_fake_quant" for name in (*twin_type(layer).weight_names, "activation", "gradient")]


@torch.no_grad()
def remove(model: nn.Module, *, keep: str = "float") -> nn.Module:
    """Undo :func:`prepare`, in place: the layers get their classes back, and lose their quantizers.

    A model without quantized layers stays as it is, and so does a FakeQuant that ``prepare`` did not make.

    Args:
        model: any module.
        keep: "float" leaves the weights as they are; "quantized" writes into each the value that its quantizer gives.
            A layer that was left in float and shares a quantized weight gets that value too.

    Returns:
        The model.

    Raises:
        ValueError: keep is something else, or a layer was parametrized after it was prepared; the message names it,
            and the model is as it was.
    """
    checks.choice("keep", keep, ("float", "quantized"))
    twins = {module: name for name, module in model.named_modules() if is_twin(module)}
    for twin, name in twins.items():
        if changed_since(twin):
            checks.fail(ValueError, f"layer {name!r}", "the class that prepare gave it", type(twin).__name__)
    if keep == "quantized":
        _write_quantized_weights(twins)
    tracked = set(_tracked_buffers(model))
    _set_ignored(model, [name for name in _ignored(model) if name not in tracked])
    for module in list(model.modules()):
        module.__dict__.pop(CHOICE, None)
        unfuse(module)
        keep_as_torch(module)
        buckets = module.__dict__.pop(BUCKETS, None)
        if buckets is not None:
            buckets.remove()
        if is_twin(module):
            for name in _quantizer_names(module):
                module._modules.pop(name, None)
            module.__dict__.pop("activation_on", None)
        to_original(module)
    return model


def _write_quantized_weights(twins: Iterable[Any]) -> None:
    """Replace each quantized weight by its value, one that layers share once: not all quantizers leave it as it is."""
    written: set[int] = set()
    for twin in twins:
        for name, quantizer in twin.weight_quantizers().items():
            weight = getattr(twin, name)
            if id(weight) in written:
                continue
            written.add(id(weight))
            quantizer.eval()  # the range stays where it is
            # The view may be a copy: the move of the channels is its own inverse.
            weight.copy_(quantized_view(twin, quantizer(quantized_view(twin, weight))))


class fake_quant_enabled:  # a function to its users, who may write `with` before it
    """Switch all quantizers of a model on or off: ``fake_quant_enabled(model, False)``, or for a while with ``with``.

    Where they are off, outputs and gradients are those of the float model, bit for bit.

    Args:
        model: a module that contains quantizers.
        enabled: False passes every tensor through unchanged.

    Raises:
        ValueError: the model contains none.
    """

    def __init__(self, model: nn.Module, enabled: bool = True) -> None:
        self.previous = {m: m.fake_quant_enabled for m in model.modules() if isinstance(m, Quantizer)}
        if not self.previous:
            checks.fail(ValueError, "model", "a model with quantizers", f"{type(model).__name__} without any")
        for quantizer in self.previous:
            quantizer.fake_quant_enabled = enabled

    def __enter__(self) -> fake_quant_enabled:
        return self

    def __exit__(self, *_: object) -> None:
        for quantizer, enabled in self.previous.items():
            quantizer.fake_quant_enabled = enabled


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned parameters of all quantizers in a model: the optimizer group that they want for themselves."""
    found: dict[int, nn.Parameter] = {}
    for m in model.modules():
        if isinstance(m, FakeQuant):
            found.update({id(p): p for p in m.parameters(recurse=False) if p.requires_grad})
    return list(found.values())
