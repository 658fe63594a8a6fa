"""What the options of a run say of quantizers, of their oscillations, and of what is done about these."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

import fastqat
from fastqat.nn.selection import choose, names_of_modules
from fastqat.quantizers import (
    cg_pact,
    dorefa_activation,
    dorefa_weight,
    lbt_activation,
    lbt_weight,
    pact,
    trs_activation,
    trs_weight,
)
from fastqat.train.config import Config
from fastqat.train.layer_bits import layer_bits, with_bits


def quantizers(config: Config, steps: int) -> fastqat.QConfig:
    """Return the quantizers of a layer.

    Args:
        config: the options.
        steps: optimizer steps of quantization-aware training: what schedules count.

    Raises:
        TypeError, ValueError: options that do not fit each other; the message names them.
    """
    if config.quantizer == "dorefa":
        everywhere = config.weight_rescale_layers == "all"
        return fastqat.QConfig(dorefa(config, everywhere), activation(config), gradient=gradient(config))
    lsq: dict[str, Any] = {"range": config.range, "learn": "scale"}
    trs = {"learn": config.transition_rate == 0}
    make_weight = {"lbt": lbt_weight, "trs": trs_weight}.get(config.quantizer, fastqat.QSpec)
    weight = make_weight(
        config.bits_weight,
        axis=0 if config.per_channel else None,
        **{"lsq": lsq, "lbt": {}, "trs": trs, "range": {"range": "minmax"}}[config.quantizer],
        estimator=config.estimator,
        estimator_strength=config.estimator_strength,
        seed=config.seed,
        oscillation=oscillation(config, steps),
        dampening=dampening(config, steps),
    )
    return fastqat.QConfig(weight, activation(config), gradient=gradient(config))


def dorefa(config: Config, rescaled: bool) -> fastqat.QSpec:
    """Return the quantizer of a weight with --quantizer dorefa; rescaled as the options say, or not at all."""
    rescale = None if config.weight_rescale == "none" or not rescaled else config.weight_rescale
    return dorefa_weight(config.bits_weight, rescale=rescale)


def activation(config: Config) -> fastqat.QSpec | None:
    """Return the quantizer of a layer's input; None leaves it in float."""
    if not config.bits_activation:
        return None
    bits = config.bits_activation
    others: dict[str, Any] = {"estimator": config.activation_estimator, "seed": config.seed}
    if config.quantizer == "lbt":
        return lbt_activation(bits, **{**others, "signed": None})  # the data say whether it is
    if config.quantizer == "trs":
        return trs_activation(bits, **others)
    if config.quantizer == "dorefa":
        if config.activation_quantizer == "dorefa":
            return dorefa_activation(bits)
        clipped = cg_pact if config.activation_quantizer == "cg_pact" else pact
        return clipped(bits, None, range=config.range, signed=None)  # the data say whether it is
    if config.quantizer == "range":
        others |= {"range": config.activation_range, "momentum": config.range_momentum, "sync_range": True}
        return fastqat.QSpec(bits, symmetric=False, **others)
    # PACT clips: nothing beyond the largest code has a gradient, not even the half step that rounds to it.
    mask = "unrounded" if config.activation_estimator == "pact" else "rounded"
    return fastqat.QSpec(bits, range=config.range, learn="scale", ste_mask=mask, **others)


def gradient(config: Config) -> fastqat.GradientQSpec | None:
    """Return the quantizer of the gradient of a layer's output; None leaves it in float."""
    if not config.bits_gradient:
        return None
    return fastqat.GradientQSpec(
        config.bits_gradient,
        config.gradient_method,
        gamma=config.gradient_gamma,
        alpha=config.gradient_alpha,
        gamma_step=config.gradient_gamma_step,
        momentum=config.range_momentum,
        period=config.gradient_period,
        rounding=config.gradient_rounding,
        seed=config.seed,
    )


def prepare_as(config: Config, model: nn.Module, qconfig: fastqat.QConfig) -> None:
    """Prepare a network as the options say, its first and its last layer too.

    Args:
        config: the options.
        model: prepared in place.
        qconfig: what :func:`quantizers` returns, or something like it.
    """
    edges, fuses = config.first_last_bits or None, config.fuse_activations
    overrides = _of_single_layers(config, model, qconfig)
    # What a run says of its coverage, and accepts, is a matter of its own: fastqat.train.coverage.
    options: dict[str, Any] = {"overrides": overrides, "fuse_activations": fuses, "coverage": None}
    fastqat.prepare(model, qconfig, first_last_bits=edges, **options)


def _of_single_layers(config: Config, model: nn.Module, qconfig: fastqat.QConfig) -> dict[str, Any]:
    """What layers get that is not what all get, by name."""
    names, edges = names_of_modules(model), config.first_last_bits or None
    chosen = {layer: choice.config for layer, choice in choose(model, qconfig, edges, None).items()}
    given = layer_bits(config.bits, {layer: names[layer] for layer in chosen})
    complete = replace(qconfig, activation=qconfig.activation or activation(replace(config, bits_activation=8)))
    overrides = {}
    for place, (layer, usual) in enumerate(chosen.items()):
        name, wanted = names[layer][0], usual and _of_kind(config, layer, place == 0, usual)
        if config.first_last_float and place in (0, len(chosen) - 1):
            wanted = None
        if layer in given:
            try:
                wanted = with_bits(wanted, _of_kind(config, layer, place == 0, complete), given[layer])
            except ValueError as error:
                raise ValueError(f"bits of layer {name!r}: {error}") from None
        if wanted != usual:
            overrides[glob.escape(name)] = wanted
    return overrides


def _of_kind(config: Config, layer: nn.Module, first: bool, qconfig: fastqat.QConfig) -> fastqat.QConfig:
    """What a kind of layers gets with --quantizer dorefa that others do not: the rescaling, and a sign of its input."""
    if config.quantizer != "dorefa":
        return qconfig
    if qconfig.weight is not None and isinstance(layer, (nn.Linear, nn.MultiheadAttention)):
        qconfig = replace(qconfig, weight=replace(dorefa(config, True), bits=qconfig.weight.bits))
    if first and qconfig.activation is not None and config.activation_quantizer == "dorefa":
        given = cg_pact(qconfig.activation.bits, None, range=config.range, signed=None)
        qconfig = replace(qconfig, activation=given)
    return qconfig


def oscillation(config: Config, steps: int) -> fastqat.Oscillation | None:
    """Return what is tracked and frozen; arguments as in :func:`quantizers`."""
    if not (config.track_oscillations or config.transition_rate):  # which tracking counts
        return None
    threshold: float | fastqat.Schedule | None = config.freeze_threshold or None
    if config.freeze_threshold_start is not None:
        start, end = config.freeze_threshold_start, config.freeze_threshold
        threshold = fastqat.Schedule("cosine", start, end, max(steps, 1), config.freeze_begin, off_before=True)
    return fastqat.Oscillation(
        momentum=config.oscillation_momentum,
        freeze_threshold=threshold,
        use_average=config.freeze_to == "average",
        max_bits=max(config.bits_weight, fastqat.Oscillation.max_bits),  # whoever tracks 8 bits wants to
    )


def dampening(config: Config, steps: int) -> fastqat.Dampening | None:
    """Return the pull to the middle of the bins; arguments as in :func:`quantizers`."""
    if not config.dampening:
        return None
    weight = fastqat.Schedule("cosine", 0.0, config.dampening, max(steps, 1), config.dampening_begin)
    return fastqat.Dampening(weight, config.dampening_aggregate)


def transition_rates(
    config: Config, optimizer: Optimizer, model: nn.Module, steps: int
) -> fastqat.TransitionRateScheduler:
    """Make what scales the updates of quantized weights.

    Args:
        config: the options.
        optimizer: of these weights.
        model: prepared.
        steps: as in :func:`quantizers`.
    """
    schedule = None
    if config.transition_schedule != "constant":
        schedule = fastqat.Schedule(config.transition_schedule, 1.0, 0.0, max(steps, 1), begin=0.0)
    return fastqat.TransitionRateScheduler(
        optimizer,
        model,
        lam=config.transition_rate,
        schedule=schedule,
        momentum=config.transition_momentum,
        rule=config.transition_rule,
        bounds=(0.0, config.transition_bound) if config.transition_bound else None,
    )


@contextlib.contextmanager
def undampened(model: nn.Module) -> Iterator[None]:
    """Leave dampening out of the backward passes inside: it counts once per step, however many passes there are.

    Args:
        model: a network, with quantizers or without.
    """
    dampened = {m: m.dampening for m in model.modules() if isinstance(m, fastqat.FakeQuant) and m.dampening}
    try:
        for quantizer in dampened:
            quantizer.dampening = None
        yield
    finally:
        for quantizer, options in dampened.items():
            quantizer.dampening = options
