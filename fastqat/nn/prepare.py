"""``prepare`` makes a network a QAT network, ``remove`` undoes it, ``fake_quant_enabled`` switches it off and on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from fastqat.multi_tensor import STATE
from fastqat.nn.clock import ANCHOR, Anchor, ModelClock
from fastqat.nn.coverage import check_coverage, least_share
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import COMPUTED
from fastqat.nn.fuse import KINDS, NOTE, FusedActivation, fuse, fusions, unfuse
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.masks import keep_as_torch
from fastqat.nn.quantized_values import write_quantized_weights
from fastqat.nn.selection import CHOICE, Choice, Override, choose, names_of_modules
from fastqat.nn.sharded import is_sharded
from fastqat.nn.spec import QConfig, QSpec
from fastqat.nn.together import BUCKETS
from fastqat.nn.tracking import Tracker
from fastqat.nn.twins import (
    changed_since,
    form_of_weight,
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

Quantizer = FakeQuant | GradientFakeQuant


def prepare(
    model: nn.Module,
    config: QConfig,
    *,
    first_last_bits: int | None = None,
    overrides: Mapping[str, Override] | None = None,
    fuse_activations: bool = False,
    coverage: str | float | None = "warn",
    example_inputs: Any = None,
) -> nn.Module:
    """Quantize weights and activations of the layers of a model, in place.

    Linear, Conv1d-3d, ConvTranspose1d-3d, Embedding (its table only) and MultiheadAttention (its projections) become
    twins that keep their Parameter objects and state_dict keys; so do their subclasses, with what their own forwards
    hand to a product, and Conv1D of transformers. Ranges of the weights are set here (that of a weight of zeros grows
    with it); those of the activations by :func:`calibrate`, or by the first batch. A weight that two layers share
    has one quantizer, and so has the activation of a layer that is called several times. Everything else stays in
    float: :func:`report` says what, and why. Preparing again with the same arguments changes nothing.

    Args:
        model: any module.
        config: the quantizers of every layer.
        first_last_bits: bit-width of the first and the last layer in order of registration, and of layers that share
            their weights; one that stays in float passes them on to no other layer. None treats all alike.
        overrides: layer name or pattern (``fnmatch``) -> QConfig for the layers that it matches, options of QSpec that
            change both quantizers, or None, which leaves them in float. The last pattern that matches a layer decides.
        fuse_activations: a ReLU or ReLU6 module whose output goes into one quantized layer and nowhere else becomes an
            identity, and the quantizer of that layer's input computes it in the same pass: the same values and
            gradients, with one pass over memory less. Hooks added to the module later see what comes before it.
        coverage: "warn" warns where less than 95 % of the multiplications, or of the parameters of two dimensions or
            more, are quantized; a number in (0, 1] is the least share instead; "error" raises; None is silent. Layers
            that overrides leave in float are not held against it.
        example_inputs: as of :func:`report`; the model runs once with them, and its multiplications are counted.
            Without them the parameters alone are looked at.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model has no such layer, is prepared otherwise already, or is data-parallel; a
            pattern matches no layer; an option is wrong, or does not fit a layer; two layers want different quantizers
            for one weight; coverage="error", and less is quantized. The message names it, and the model is as it was.

    Warns:
        UserWarning: too little is quantized (the message names the share, and the largest kinds left in float), or the
            first or the last layer, which first_last_bits are meant for, stays in float.
    """
    least, raises = least_share(coverage), coverage == "error"
    chosen = choose(model, config, first_last_bits, overrides)
    names = {module: found[0] for module, found in names_of_modules(model).items()}
    if any(is_twin(module) for module in model.modules()):
        _check_prepared_alike(chosen, names)
        _check_fused_alike(names, fuse_activations)
        if raises:  # a warning was given
            check_coverage(model, example_inputs, least, raises)
        return model
    _check_not_parallel(names)
    configs = {layer: choice.config for layer, choice in chosen.items()}
    found = fusions(model, configs) if fuse_activations else {}
    configs.update({fusion.layer: fusion.config for fusion in found.values() if fusion.layer is not None})
    made: dict[object, FakeQuant] = {}
    clock = ModelClock(model)
    quantizers = {layer: _quantizers_of(layer, names[layer], config, made, clock) for layer, config in configs.items()}
    for number, quantizer in enumerate(_distinct(quantizers)):
        quantizer.tensor_id = number
    for layer, of_layer in quantizers.items():
        for tensor, made_here in of_layer.items():
            if isinstance(made_here, FakeQuant):
                made_here.layer_name = made_here.layer_name or names[layer]
                made_here.is_of_weight = tensor != "activation"
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
        check_coverage(model, example_inputs, least, raises)
    except BaseException:  # a class that cannot be changed, an attribute in the way, too little that is quantized
        remove(model)
        raise
    setattr(model, ANCHOR, Anchor(clock))
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
    """What shares gradients, or shards parameters, does so with those that it finds when it is applied."""
    for module, name in names.items():
        sharded = next((p for p, value in module.named_parameters(name, recurse=False) if is_sharded(value)), None)
        if sharded is not None:
            wanted = "a model to shard after it is prepared"
            checks.fail(ValueError, "model", wanted, f"the parameter {sharded!r} sharded already")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            got = f"DistributedDataParallel at {name!r}" if name else "DistributedDataParallel"
            checks.fail(ValueError, "model", "one to wrap after it is prepared", got)


def _distinct(quantizers: Mapping[nn.Module, Mapping[str, Quantizer | None]]) -> list[Quantizer]:
    """Every quantizer once, in the order of the layers; those of gradients last, as they change no other's number."""
    found = dict.fromkeys(q for of_layer in quantizers.values() for q in of_layer.values() if q is not None)
    return sorted(found, key=lambda q: isinstance(q, GradientFakeQuant))


def _quantizers_of(
    layer: nn.Module, name: str, config: QConfig | None, made: dict[object, FakeQuant], clock: ModelClock
) -> dict[str, Quantizer | None]:
    """Quantizers of a layer by the name of what they quantize; those of weights are made once and kept in made."""
    if config is None:
        return {}
    weights = {weight_name: getattr(layer, weight_name) for weight_name in weight_names(layer)}
    first = next(iter(weights.values()))
    # What a forward computes of a weight is a tensor of that layer alone.
    keys: dict[str, object] = {n: (layer, w) if form_of_weight(layer) == COMPUTED else w for n, w in weights.items()}
    try:
        for weight_name, weight in weights.items():
            if config.weight is not None and keys[weight_name] not in made:
                made[keys[weight_name]] = _of_weight(layer, weight, config.weight, clock)
                made[keys[weight_name]].layer_name = name
        activation = None if config.activation is None else _build(config.activation, first.device)
        gradient = None if config.gradient is None else GradientFakeQuant(config.gradient, name, first.device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None
    if activation is not None:
        activation.layer_name = name
    for other in (activation, gradient):
        if other is not None:
            other.join(clock)
    quantized = {n: made[key] if config.weight is not None else None for n, key in keys.items()}
    return {**quantized, "activation": activation, "gradient": gradient}


def _of_weight(layer: nn.Module, weight: nn.Parameter, spec: QSpec, clock: ModelClock) -> FakeQuant:
    quantizer = _build(spec, weight.device)
    quantizer.join(clock)  # first: else it would follow the weight
    if form_of_weight(layer) is not None:  # else its first forward says what is quantized
        quantizer.right_inverse(quantized_view(layer, weight))
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
def remove(model: nn.Module, *, keep: str = "float", example_inputs: Any = None) -> nn.Module:
    """Undo :func:`prepare`, in place: the layers get their classes back, and lose their quantizers.

    A model without quantized layers stays as it is, and so does a FakeQuant that ``prepare`` did not make.

    Args:
        model: any module.
        keep: "float" leaves the weights as they are; "quantized" writes into each the value that its quantizer gives in
            evaluation, where that is what all that read the weight were given.
        example_inputs: as of :func:`report`, for keep="quantized": the model runs once, and a function that reads a
            quantized weight past its quantizer, like ``F.linear(h, emb.weight)``, is found. Without them it is not.

    Returns:
        The model.

    Raises:
        ValueError: keep is something else, or a layer was parametrized after it was prepared. With keep="quantized"
            also: a hook computes the weight of a layer (pruning, weight norm, spectral norm); two quantizers share a
            weight that was tied after ``prepare``; a module that is left in float holds a quantized weight too, or a
            function reads it. The message names it, and the model is as it was.
    """
    checks.choice("keep", keep, ("float", "quantized"))
    twins = {module: name for name, module in model.named_modules() if is_twin(module)}
    for twin, name in twins.items():
        if changed_since(twin):
            checks.fail(ValueError, f"layer {name!r}", "the class that prepare gave it", type(twin).__name__)
    if keep == "quantized":
        write_quantized_weights(model, example_inputs)
    tracked = set(_tracked_buffers(model))
    _set_ignored(model, [name for name in _ignored(model) if name not in tracked])
    for module in list(model.modules()):
        module.__dict__.pop(CHOICE, None)
        module.__dict__.pop(ANCHOR, None)
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
