"""What options of a run must be like together; what each must be by itself is checked where it is declared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastqat.ops.checks import fail
from fastqat.train.layer_bits import parse as parse_layer_bits

if TYPE_CHECKING:
    from fastqat.train.config import Config


def check(config: Config) -> None:
    """Check options against each other.

    Raises:
        ValueError: two do not fit; the message names one of them.
    """
    for prefix in ("", "fp32_"):
        warmup, epochs = getattr(config, f"{prefix}warmup_epochs"), getattr(config, f"{prefix}epochs")
        if epochs and warmup > epochs:
            raise ValueError(f"{prefix}warmup_epochs: wanted at most {epochs}, all of the epochs; got {warmup}")
    for pattern, value in config.bits.items():
        parse_layer_bits(pattern, value)
    _check_dorefa(config)
    _check_oscillations(config)
    _check_adaqat(config)
    if config.transition_momentum == 1:
        fail(ValueError, "transition_momentum", "a number below 1", 1.0)
    if 0 < config.transition_bound < 1:
        fail(ValueError, "transition_bound", "0, or a number of at least 1", config.transition_bound)
    if config.gradient_gamma is not None and not config.bits_gradient:
        got = f"gradient_gamma {config.gradient_gamma}, bits_gradient 0"
        fail(ValueError, "gradient_gamma", "bits_gradient beside it", got)


def _check_dorefa(config: Config) -> None:
    """Check what only weights of DoReFa have, and what they have not."""
    if config.quantizer != "dorefa":
        for name in ("activation_quantizer", "weight_rescale", "weight_rescale_layers"):
            if getattr(config, name) != _default(config, name):
                got = f"{name} {getattr(config, name)}, quantizer {config.quantizer}"
                fail(ValueError, name, "quantizer dorefa beside it", got)
        return
    for name in ("estimator", "activation_estimator", "track_oscillations", "transition_rate", "dampening"):
        if getattr(config, name) != _default(config, name):
            got = f"{name} {getattr(config, name)}, quantizer dorefa"
            fail(ValueError, name, "another quantizer than dorefa, whose gradients are its own", got)
    if config.bin_regularization:
        got = f"bin_regularization {config.bin_regularization:g}, quantizer dorefa"
        fail(ValueError, "bin_regularization", "another quantizer than dorefa, whose levels are of tanh", got)


def _check_oscillations(config: Config) -> None:
    """Check what one option alone does not show; the quantizers themselves say what else does not fit."""
    if not 0 < config.oscillation_momentum < 1:
        fail(ValueError, "oscillation_momentum", "a number between 0 and 1, and neither", config.oscillation_momentum)
    for name in ("freeze_begin", "dampening_begin", "bin_regularization_begin"):
        if getattr(config, name) == 1:
            fail(ValueError, name, "a part of QAT below 1", 1.0)
    if config.freeze_threshold and not config.track_oscillations:
        got = f"freeze_threshold {config.freeze_threshold}, track_oscillations false"
        fail(ValueError, "freeze_threshold", "track_oscillations beside it: what oscillates is frozen", got)
    if config.freeze_threshold_start is not None and not config.freeze_threshold:
        got = f"freeze_threshold_start {config.freeze_threshold_start}, freeze_threshold 0"
        fail(ValueError, "freeze_threshold", "the threshold that the cosine ends at", got)
    if config.activation_estimator != "ste" and not config.bits_activation:
        got = f"activation_estimator {config.activation_estimator}, bits_activation 0"
        fail(ValueError, "activation_estimator", "bits_activation beside it", got)


def _check_adaqat(config: Config) -> None:
    """Check what learns bit-widths beside what else there is."""
    if not config.adaqat:
        return
    for name in ("bits_weight", "bits_activation"):
        bits = getattr(config, name)
        if 0 < bits < config.adaqat_lowest:
            fail(ValueError, name, f"at least adaqat_lowest, {config.adaqat_lowest}, where adaqat starts", bits)
    if config.transition_rate:
        got = f"adaqat {config.adaqat:g}, transition_rate {config.transition_rate:g}"
        fail(ValueError, "adaqat", "no transition_rate beside it, whose target is that of one bit-width", got)


def _default(config: Config, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default
