"""The options of ``fastqat train`` that are about quantization, in the groups that ``--help`` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastqat import ranges
from fastqat.adaqat.bit_width import FREEZE_TO
from fastqat.adaqat.hardware import COSTS
from fastqat.nn.gradient import METHODS, GradientQSpec
from fastqat.nn.spec import FOLLOWING
from fastqat.nn.tracking import AGGREGATES
from fastqat.ops.estimators import ESTIMATORS
from fastqat.train.options import option
from fastqat.transition_rate import RULES

QUANTIZATION, OSCILLATIONS = "quantization", "oscillations"
BIT_WIDTHS, GRADIENTS, TRANSITIONS = "bit-widths", "gradients", "transition rates"
SCHEDULES = ("cosine", "linear", "constant")
LBT = GradientQSpec()  # its defaults


@dataclass(frozen=True)
class Quantization:
    """Quantizers of weights and activations."""

    bits_weight: int = option(3, "bits of weights, 1..8", low=1, high=8, group=QUANTIZATION)
    bits_activation: int = option(
        3, "bits of activations, 1..8; 0 leaves them in float", low=0, high=8, group=QUANTIZATION
    )
    per_channel: bool = option(True, "weights have a scale per output channel, not per tensor", group=QUANTIZATION)
    first_last_bits: int = option(
        8, "bits of the first and the last layer, 0: as others", low=0, high=8, group=QUANTIZATION
    )
    first_last_float: bool = option(False, "the first and the last layer stay in float", group=QUANTIZATION)
    quantizer: str = option(
        "lsq",
        "of weights and activations: learned scales (lsq), those of LBT (lbt) or TRS (trs; those of weights stay as "
        "they are with --transition-rate), ranges that follow the data (range), or weights of DoReFa (dorefa)",
        choices=("lsq", "lbt", "trs", "range", "dorefa"),
        group=QUANTIZATION,
    )
    activation_quantizer: str = option(
        "cg_pact",
        "of activations with --quantizer dorefa: a learned range with the gradient of SAT (cg_pact) or PACT (pact), or "
        "[0, 1] (dorefa), but for the input of the first layer",
        choices=("cg_pact", "pact", "dorefa"),
        group=QUANTIZATION,
    )
    weight_rescale: str = option(
        "none",
        "of weights with --quantizer dorefa (SAT), to the standard deviation 1 / sqrt(outputs * size of the kernel) "
        "(constant), or to that of the weight in float (std)",
        choices=("none", "constant", "std"),
        group=QUANTIZATION,
    )
    weight_rescale_layers: str = option(
        "linear",
        "which layers are rescaled: convolutions have batch normalization behind them",
        choices=("linear", "all"),
        group=QUANTIZATION,
    )
    bits: dict[str, Any] = option(
        {},
        "of single layers, by name or pattern; the last that matches decides. 4/6 is weight/activation, 4 is both, "
        "float leaves both in float: 'layer1.*=4/6' fc=float",
        group=QUANTIZATION,
    )
    activation_range: str = option(
        "in_hindsight", "range of activations with --quantizer range", choices=FOLLOWING, group=QUANTIZATION
    )
    range_momentum: float = option(
        0.9, "of ranges of activations and gradients that are averages, below 1", low=0, high=1, group=QUANTIZATION
    )
    fuse_activations: bool = option(False, "quantizers compute the ReLU in front of them", group=QUANTIZATION)
    compress_activations: bool = option(
        False,
        "layers keep codes of their inputs for the backward pass, and ReLUs bits: less memory, the same training",
        group=QUANTIZATION,
        movable=True,
    )
    range: str = option("mse", "how the first ranges are chosen", choices=tuple(ranges.ESTIMATORS), group=QUANTIZATION)
    calibration_batches: int = option(8, "training batches that choose the ranges", low=1, group=QUANTIZATION)
    reestimate_bn: str = option(
        "end",
        "when the quantized network is tested with statistics of BN re-estimated, too, and saved with those that are "
        "better on training images: after quantization and after the last epoch, or in every test",
        choices=("never", "end", "always"),
        group=QUANTIZATION,
    )
    coverage: float = option(
        0.95,
        "least share of the multiplications that has to be quantized; 0 trains whatever there is",
        low=0,
        high=1,
        group=QUANTIZATION,
        movable=True,
    )
    bn_batches: int = option(50, "training batches for that", low=1, group=QUANTIZATION)
    estimator: str = option("ste", "of the gradient of rounding weights", choices=tuple(ESTIMATORS), group=QUANTIZATION)
    estimator_strength: float | None = option(
        None, "its parameter: delta of ewgs, a of sigmoid, alpha of dsq, lambda of psg", group=QUANTIZATION
    )
    activation_estimator: str = option(
        "ste", "of the gradient of rounding activations", choices=tuple(ESTIMATORS), group=QUANTIZATION
    )


@dataclass(frozen=True)
class BitWidths:
    """Bit-widths that are learned."""

    adaqat: float = option(
        0.0,
        "lambda: learn bit-widths from those of --bits-* on, with lambda times their cost in the loss (AdaQAT); 0 has "
        "none",
        low=0,
        group=BIT_WIDTHS,
    )
    adaqat_lr_weight: float = option(
        1e-3, "learning rate of the bit-width of weights (unverified)", low=0, group=BIT_WIDTHS
    )
    adaqat_lr_activation: float = option(
        5e-4, "learning rate of the bit-width of activations (unverified)", low=0, group=BIT_WIDTHS
    )
    adaqat_every: int = option(1, "steps from update to update of bit-widths (unverified)", low=1, group=BIT_WIDTHS)
    adaqat_lowest: int = option(2, "fewest bits that are learned, 1..8 (unverified)", low=1, high=8, group=BIT_WIDTHS)
    adaqat_freeze_after: int = option(
        10,
        "oscillations about an integer after which a bit-width is frozen (unverified); 0 freezes none",
        low=0,
        group=BIT_WIDTHS,
    )
    adaqat_freeze: str = option(
        "each",
        "whether each bit-width is frozen by itself, or both once both have oscillated (unverified)",
        choices=("each", "both"),
        group=BIT_WIDTHS,
    )
    adaqat_freeze_to: str = option(
        "ceil", "the bit-width of that moment, or the one of most steps", choices=FREEZE_TO, group=BIT_WIDTHS
    )
    adaqat_cost: str = option(
        "product",
        "of hardware: product of the bits of weights and activations (its factor 1 is unverified), bit operations as a "
        "mean over all multiplications, or mean bits of a weight",
        choices=COSTS,
        group=BIT_WIDTHS,
    )
    adaqat_per_layer: bool = option(
        False, "each layer learns bit-widths of its own (beyond the paper)", group=BIT_WIDTHS
    )


@dataclass(frozen=True)
class Gradients:
    """Gradients of few bits."""

    bits_gradient: int = option(
        0, "bits of the gradients of layers, 2..8; 0 leaves them in float", low=0, high=8, group=GRADIENTS
    )
    gradient_method: str = option("lbt", "how the grid of a gradient follows it", choices=METHODS, group=GRADIENTS)
    gradient_gamma: float | None = option(
        None, "part of the largest gradient that the grid covers: of fixed, or the first one of lbt", group=GRADIENTS
    )
    gradient_alpha: float = option(LBT.alpha, "part of a gradient that is large, of lbt", group=GRADIENTS)
    gradient_gamma_step: float = option(LBT.gamma_step, "by which gamma moves in a step, of lbt", group=GRADIENTS)
    gradient_period: int = option(LBT.period, "steps from search to search, of dsgc", low=1, group=GRADIENTS)
    gradient_rounding: str = option("stochastic", "of gradients", choices=("stochastic", "nearest"), group=GRADIENTS)
    record_quantizers: bool = option(
        False,
        "keep what quantizers of activations and gradients do, for fastqat report: clipped parts, ranges, errors",
        group=GRADIENTS,
        movable=True,
    )


@dataclass(frozen=True)
class Oscillations:
    """What is done about weights that oscillate."""

    track_oscillations: bool = option(
        False, "follow how often the code of each weight is reversed; freezing needs it", group=OSCILLATIONS
    )
    oscillation_momentum: float = option(
        0.01, "of the averages of oscillations and codes, between 0 and 1", low=0, high=1, group=OSCILLATIONS
    )
    freeze_threshold: float = option(
        0.0, "frequency of oscillation above which a weight is frozen; 0 freezes none", low=0, group=OSCILLATIONS
    )
    freeze_threshold_start: float | None = option(
        None,
        "threshold from which a cosine goes to --freeze-threshold; without it that holds from the first step on",
        low=0,
        group=OSCILLATIONS,
    )
    freeze_begin: float = option(
        0.25, "part of QAT before which such a threshold freezes none", low=0, high=1, group=OSCILLATIONS
    )
    freeze_to: str = option(
        "average", "code that a frozen weight gets", choices=("average", "current"), group=OSCILLATIONS
    )
    dampening: float = option(
        0.0, "weight of the pull to the middle of the bins, at the end of QAT; 0 has none", low=0, group=OSCILLATIONS
    )
    dampening_begin: float = option(
        0.25, "part of QAT after which it rises from 0, along a cosine", low=0, high=1, group=OSCILLATIONS
    )
    dampening_aggregate: str = option(
        "kernel_mean", "of the pulls on the weights of a layer", choices=AGGREGATES, group=OSCILLATIONS
    )
    bin_regularization: float = option(
        0.0, "weight of bin regularization in the loss; 0 has none", low=0, group=OSCILLATIONS
    )
    bin_regularization_begin: float = option(
        0.0, "part of QAT before which it has none", low=0, high=1, group=OSCILLATIONS
    )


@dataclass(frozen=True)
class Transitions:
    """The rate at which weights change their codes."""

    transition_rate: float = option(
        0.0,
        "lam: the target of the rate at which weights change their codes begins at lam * sqrt(bits), and their "
        "learning rates follow it; 0 has none",
        low=0,
        group=TRANSITIONS,
    )
    transition_schedule: str = option(
        "cosine", "of the target, to 0 where it is not constant", choices=SCHEDULES, group=TRANSITIONS
    )
    transition_rule: str = option(
        "multiplicative", "by which learning rates follow the target", choices=RULES, group=TRANSITIONS
    )
    transition_momentum: float = option(0.99, "of running rates, below 1", low=0, high=1, group=TRANSITIONS)
    transition_bound: float = option(
        10.0, "largest ratio of target and running rate that a rule sees; 0 has none", low=0, group=TRANSITIONS
    )
