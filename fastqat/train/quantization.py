"""What the options of a run say of quantizers, of their oscillations, and of what is done about these."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from typing import Any

from torch import nn

import fastqat
from fastqat.nn.selection import candidates, names_of_modules
from fastqat.quantizers import lbt_activation, lbt_weight
from fastqat.train.config import Config


def quantizers(config: Config, steps: int) -> fastqat.QConfig:
    """Return the quantizers of a layer.

    Args:
        config: the options.
        steps: optimizer steps of quantization-aware training: what schedules count.

    Raises:
        TypeError, ValueError: options that do not fit each other; the message names them.
    """
    lsq: dict[str, Any] = {"range": config.range, "learn": "scale"}
    make_weight = lbt_weight if config.quantizer == "lbt" else fastqat.QSpec
    weight = make_weight(
        config.bits_weight,
        axis=0 if config.per_channel else None,
        **{"lsq": lsq, "lbt": {}, "range": {"range": "minmax"}}[config.quantizer],
        estimator=config.estimator,
        estimator_strength=config.estimator_strength,
        seed=config.seed,
        oscillation=oscillation(config, steps),
        dampening=dampening(config, steps),
    )
    return fastqat.QConfig(weight, activation(config), gradient=gradient(config))


def activation(config: Config) -> fastqat.QSpec | None:
    """Return the quantizer of a layer's input; None leaves it in float."""
    if not config.bits_activation:
        return None
    bits = config.bits_activation
    others: dict[str, Any] = {"estimator": config.activation_estimator, "seed": config.seed}
    if config.quantizer == "lbt":
        return lbt_activation(bits, **{**others, "signed": None})  # the data say whether it is
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
    overrides: dict[str, Any] = {}
    if config.first_last_float and (layers := candidates(model)[0]):
        names = names_of_modules(model)
        overrides = {glob.escape(names[layer][0]): None for layer in (layers[0], layers[-1])}
    bits = config.first_last_bits or None
    fuses = config.fuse_activations
    fastqat.prepare(model, qconfig, first_last_bits=bits, overrides=overrides, fuse_activations=fuses)


def oscillation(config: Config, steps: int) -> fastqat.Oscillation | None:
    """Return what is tracked and frozen; arguments as in :func:`quantizers`."""
    if not config.track_oscillations:
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
