"""What one training run is made of: the options of ``fastqat train``, which a YAML recipe names the same way."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastqat import ranges
from fastqat.adaqat.bit_width import FREEZE_TO
from fastqat.adaqat.hardware import COSTS
from fastqat.nn.gradient import METHODS, GradientQSpec
from fastqat.nn.spec import FOLLOWING
from fastqat.nn.tracking import AGGREGATES
from fastqat.ops.checks import fail
from fastqat.ops.estimators import ESTIMATORS
from fastqat.train.data import DATASETS
from fastqat.train.extras import import_extra
from fastqat.train.layer_bits import parse as parse_layer_bits
from fastqat.train.options import Option, option, options_of
from fastqat.transition_rate import RULES

TASK, QUANTIZATION, OSCILLATIONS, MACHINE = "what to train", "quantization", "oscillations", "machine"
BIT_WIDTHS, GRADIENTS, TRANSITIONS = "bit-widths", "gradients", "transition rates"
SCHEDULES = ("cosine", "linear", "constant")
LBT = GradientQSpec()  # its defaults


@dataclass(frozen=True)
class Config:
    """One run: FP32 training or a checkpoint, quantization and calibration (PTQ), quantization-aware training (QAT).

    Every field says itself what it is for. The defaults are those for the digits; recipes hold what differs for other
    data.

    Raises:
        ValueError: a value is wrong; the message names the field, what was wanted, and what came.
    """

    data: str = option("digits", "images", choices=tuple(DATASETS), group=TASK)
    root: Path | None = option(None, "folder of the data files; digits need none", group=TASK, movable=True)
    image_size: int | None = option(None, "edge of the images in pixels, for --data folder", low=1, group=TASK)
    model: str = option("digits", "network by its name, or package.module:callable", group=TASK)
    model_options: dict[str, Any] = option({}, "arguments of the network", group=TASK)
    checkpoint: Path | None = option(None, "FP32 weights to start from, instead of FP32 training", group=TASK)
    limit_train: int | None = option(None, "use only so many training images", low=1, group=TASK)
    out: Path | None = option(None, "folder of the run (default: a new one in runs)", group=TASK)

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
        "never",
        "when the quantized network is tested with statistics of BN re-estimated, too, and its weights are saved with "
        "these: after the last epoch, or in every test",
        choices=("never", "end", "always"),
        group=QUANTIZATION,
    )
    bn_batches: int = option(50, "training batches for that", low=1, group=QUANTIZATION)
    estimator: str = option("ste", "of the gradient of rounding weights", choices=tuple(ESTIMATORS), group=QUANTIZATION)
    estimator_strength: float | None = option(
        None, "its parameter: delta of ewgs, a of sigmoid, alpha of dsq, lambda of psg", group=QUANTIZATION
    )
    activation_estimator: str = option(
        "ste", "of the gradient of rounding activations", choices=tuple(ESTIMATORS), group=QUANTIZATION
    )

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

    epochs: int = option(10, "epochs of quantization-aware training", low=0)
    fp32_epochs: int = option(15, "epochs of FP32 training before it", low=0)
    batch_size: int = option(64, "images per step, of all processes together", low=1)
    accumulate: int = option(1, "pieces that a batch is computed in, one after the other, to save memory", low=1)
    optimizer: str = option("sgd", "of the network's weights", choices=("sgd", "adam", "adamw"))
    lr: float = option(0.02, "learning rate of quantization-aware training", low=0)
    fp32_lr: float = option(0.1, "learning rate of FP32 training", low=0)
    quantizer_lr: float = option(1e-5, "learning rate of Adam for the scales", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(1e-4, "weight decay; the scales have none", low=0)
    schedule: str = option("cosine", "of all learning rates", choices=("cosine", "step", "constant"))
    step_at: tuple[float, ...] = option((0.5, 0.75), "parts of a phase after which steps go down", low=0, high=1)
    step_factor: float = option(0.1, "factor of such a step", low=0)
    warmup_epochs: float = option(0.0, "epochs in which the rates rise, of quantization-aware training", low=0)
    fp32_warmup_epochs: float = option(0.0, "the same of FP32 training", low=0)
    label_smoothing: float = option(0.0, "part of each label that is spread over all classes", low=0, high=1)
    clip_norm: float = option(0.0, "largest norm of the gradient of the network's weights; 0 clips none", low=0)
    ema: float = option(0.0, "decay per step of averaged weights, which are tested too; 0 averages none", low=0, high=1)
    seed: int = option(0, "of weights, order and augmentation", low=0, high=2**63 - 1)

    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"), group=MACHINE, movable=True)
    threads: int | None = option(None, "CPU threads (default: torch's choice)", low=1, group=MACHINE, movable=True)
    workers: int = option(0, "processes that read and decode images", low=0, group=MACHINE, movable=True)
    bf16: bool = option(False, "compute in bfloat16 where autocast says so", group=MACHINE)
    compile: bool = option(False, "compile the training step with torch.compile", group=MACHINE)
    save_seconds: float = option(
        300.0, "seconds between checkpoints within an epoch", low=0, group=MACHINE, movable=True
    )
    save_steps: int | None = option(None, "steps between them, besides", low=1, group=MACHINE, movable=True)
    tensorboard: bool = option(False, "write the metrics for TensorBoard too", group=MACHINE, movable=True)

    def __post_init__(self) -> None:
        for name, each in OPTIONS.items():
            try:
                object.__setattr__(self, name, each.accept(getattr(self, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for prefix in ("", "fp32_"):
            warmup, epochs = getattr(self, f"{prefix}warmup_epochs"), getattr(self, f"{prefix}epochs")
            if epochs and warmup > epochs:
                raise ValueError(f"{prefix}warmup_epochs: wanted at most {epochs}, all of the epochs; got {warmup}")
        for pattern, value in self.bits.items():
            parse_layer_bits(pattern, value)
        self._check_dorefa()
        self._check_oscillations()
        self._check_adaqat()
        if self.transition_momentum == 1:
            fail(ValueError, "transition_momentum", "a number below 1", 1.0)
        if 0 < self.transition_bound < 1:
            fail(ValueError, "transition_bound", "0, or a number of at least 1", self.transition_bound)
        if self.gradient_gamma is not None and not self.bits_gradient:
            got = f"gradient_gamma {self.gradient_gamma}, bits_gradient 0"
            fail(ValueError, "gradient_gamma", "bits_gradient beside it", got)

    def _check_dorefa(self) -> None:
        """Check what only weights of DoReFa have, and what they have not."""
        if self.quantizer != "dorefa":
            for name in ("activation_quantizer", "weight_rescale", "weight_rescale_layers"):
                if getattr(self, name) != OPTIONS[name].default:
                    got = f"{name} {getattr(self, name)}, quantizer {self.quantizer}"
                    fail(ValueError, name, "quantizer dorefa beside it", got)
            return
        for name in ("estimator", "activation_estimator", "track_oscillations", "transition_rate", "dampening"):
            if getattr(self, name) != OPTIONS[name].default:
                got = f"{name} {getattr(self, name)}, quantizer dorefa"
                fail(ValueError, name, "another quantizer than dorefa, whose gradients are its own", got)
        if self.bin_regularization:
            got = f"bin_regularization {self.bin_regularization:g}, quantizer dorefa"
            fail(ValueError, "bin_regularization", "another quantizer than dorefa, whose levels are of tanh", got)

    def _check_oscillations(self) -> None:
        """Check what one option alone does not show; the quantizers themselves say what else does not fit."""
        if not 0 < self.oscillation_momentum < 1:
            fail(ValueError, "oscillation_momentum", "a number between 0 and 1, and neither", self.oscillation_momentum)
        for name in ("freeze_begin", "dampening_begin", "bin_regularization_begin"):
            if getattr(self, name) == 1:
                fail(ValueError, name, "a part of QAT below 1", 1.0)
        if self.freeze_threshold and not self.track_oscillations:
            got = f"freeze_threshold {self.freeze_threshold}, track_oscillations false"
            fail(ValueError, "freeze_threshold", "track_oscillations beside it: what oscillates is frozen", got)
        if self.freeze_threshold_start is not None and not self.freeze_threshold:
            got = f"freeze_threshold_start {self.freeze_threshold_start}, freeze_threshold 0"
            fail(ValueError, "freeze_threshold", "the threshold that the cosine ends at", got)
        if self.activation_estimator != "ste" and not self.bits_activation:
            got = f"activation_estimator {self.activation_estimator}, bits_activation 0"
            fail(ValueError, "activation_estimator", "bits_activation beside it", got)

    def _check_adaqat(self) -> None:
        """Check what learns bit-widths beside what else there is."""
        if not self.adaqat:
            return
        for name in ("bits_weight", "bits_activation"):
            bits = getattr(self, name)
            if 0 < bits < self.adaqat_lowest:
                fail(ValueError, name, f"at least adaqat_lowest, {self.adaqat_lowest}, where adaqat starts", bits)
        if self.transition_rate:
            got = f"adaqat {self.adaqat:g}, transition_rate {self.transition_rate:g}"
            fail(ValueError, "adaqat", "no transition_rate beside it, whose target is that of one bit-width", got)

    @property
    def bit_widths(self) -> str:
        """Bits of weights, activations and gradients in short, such as W4A4G4, W3, or W4A4-mixed."""
        others = {"A": self.bits_activation, "G": self.bits_gradient}
        of_all = f"W{self.bits_weight}" + "".join(f"{name}{bits}" for name, bits in others.items() if bits)
        return of_all + ("-mixed" if self.bits else "")

    def plain(self) -> dict[str, Any]:
        """Return the options as YAML and JSON can hold them."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: _plain(value) for key, value in kept.items()}


OPTIONS: dict[str, Option] = options_of(Config)


def make_config(given: dict[str, Any]) -> Config:
    """Complete the options that were given by a recipe.

    Args:
        given: fields of :class:`Config`, and "recipe": files, or names of :func:`recipes`, of which the later ones win.
            Where none of them names data, they are laid over the recipe of the data set's name, if there is one.

    Raises:
        ValueError: an option or the recipe is wrong.
        FileNotFoundError: there is no such recipe.
    """
    given = dict(given)
    layers = [read_recipe(str(name)) for name in given.pop("recipe", ())]
    data = str(given.get("data", Config.data))
    if data in recipes() and not any("data" in layer for layer in layers):
        layers.insert(0, read_recipe(data))
    options: dict[str, Any] = {}
    for layer in [*layers, given]:
        options |= layer
    return Config(**options)


def recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("fastqat.train") / "recipes"
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read the options of a YAML file.

    Args:
        name: of a recipe in :func:`recipes`, or the path of a file.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a wrong value; the message names it.
        FileNotFoundError: there is neither.
        ImportError: PyYAML is not installed.
    """
    if name in recipes():
        text = (resources.files("fastqat.train") / "recipes" / f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = read_text(Path(name))
    else:
        raise FileNotFoundError(f"recipe {name}: wanted a file, or one of {', '.join(recipes())}; got neither")
    return parse_options(text, f"recipe {name}")


def parse_options(text: str, source: str) -> dict[str, Any]:
    """Check the options of a YAML text.

    Args:
        text: a mapping of names of options to values.
        source: of the text, for messages.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a wrong value; the message names it.
        ImportError: PyYAML is not installed.
    """
    yaml = import_extra("yaml")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: wanted YAML; got {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source}: wanted options, as in 'lr: 0.01'; got {type(content).__name__}")
    checked = {}
    for key, value in content.items():
        if key not in OPTIONS:
            raise ValueError(f"{source}: {nearest(str(key), OPTIONS)}")
        try:
            checked[key] = OPTIONS[key].accept(value)
        except ValueError as error:
            raise ValueError(f"{source}: {key}: {error}") from None
    return checked


def nearest(key: str, known: Iterable[str]) -> str:
    """Say that an option is unknown, and which known one is nearest."""
    close = difflib.get_close_matches(key.lower(), list(known), n=1, cutoff=0.65)
    return f"unknown option {key!r}; " + (f"did you mean {close[0]!r}?" if close else "all are in fastqat train --help")


def read_text(path: Path) -> str:
    """Read a YAML file.

    Raises:
        ValueError: it is no text.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted YAML in UTF-8; got {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
