"""What the options of a run say of quantizers, of their oscillations, and of what is done about these."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

import fastqat
from fastqat.train.config import Config


def quantizers(config: Config, steps: int) -> fastqat.QConfig:
    """Return the quantizers of a layer, which learn their scales.

    Args:
        config: the options.
        steps: optimizer steps of quantization-aware training: what schedules count.

    Raises:
        TypeError, ValueError: options that do not fit each other; the message names them.
    """
    weight = fastqat.QSpec(
        bits=config.bits_weight,
        axis=0 if config.per_channel else None,
        range=config.range,
        learn="scale",
        estimator=config.estimator,
        estimator_strength=config.estimator_strength,
        seed=config.seed,
        oscillation=oscillation(config, steps),
        dampening=dampening(config, steps),
    )
    if not config.bits_activation:
        return fastqat.QConfig(weight, None)
    activation = fastqat.QSpec(
        bits=config.bits_activation,
        range=config.range,
        learn="scale",
        estimator=config.activation_estimator,
        # PACT clips: nothing beyond the largest code has a gradient, not even the half step that rounds to it.
        ste_mask="unrounded" if config.activation_estimator == "pact" else "rounded",
        seed=config.seed,
    )
    return fastqat.QConfig(weight, activation)


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
