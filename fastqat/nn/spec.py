"""``QSpec``: the options of a quantizer. ``QConfig``: which quantizers a layer gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastqat import ranges
from fastqat.autograd import CLIPS
from fastqat.nn.gradient import GradientQSpec
from fastqat.nn.tracking import Dampening, Oscillation
from fastqat.ops import checks
from fastqat.ops.estimators import ESTIMATORS

WEIGHT_OPTIONS = ("oscillation", "dampening")
FOLLOWING = ("minmax", "running_minmax", "in_hindsight")
NORMALIZE = (None, "tanh", "range")
RESCALE = (None, "constant", "std")
LEARN = (None, "scale", "scale+zero_point", "scale+offset")


@dataclass(frozen=True)
class QSpec:
    """Options of a quantizer.

    Args:
        bits: 1 to 8.
        axis: channel dimension with one scale each; None is one scale per tensor.
        group_size: elements that share a scale, counted along all dimensions but axis, flattened.
        signed: codes from -2^(b-1) to 2^(b-1)-1, or from 0 to 2^b-1. None leaves it to the tensors that
            set the range: signed if one has a negative value; an affine grid is unsigned.
        symmetric: no zero point.
        restricted: signed codes from -(2^(b-1)-1), so that the grid is symmetric about 0.
        count_from: "zero"; or "lowest", for a restricted grid: codes from 0 to 2^b-2, which count from its lowest
            value -q s with q = 2^(b-1)-1, so that halves go to even w/s + q instead of even w/s (LBT).
        range: "mse", "minmax", "running_minmax", "percentile", "sqnr", "cross_entropy" (of logits, axis=None),
            "in_hindsight", or "fixed" (the user gives the scale, or fixed_range); where learning begins, on a
            symmetric grid: "std", 3 standard deviations (LBT), "std_open", the same with qmax a step below the end
            (TRS), and "mean_abs", 2 mean|x| / sqrt(qmax) for the scale (LSQ). See :mod:`fastqat.ranges`.
            The two min-max ranges and "in_hindsight" follow the data while training, unless the scale is learned.
            "in_hindsight" is "running_minmax" of the steps before: known before the tensor is, whose extremes the
            quantization itself gathers.
        fixed_range: lowest and highest value for range="fixed", of one scale, which may be learned from there on.
        learn: None, "scale" (LSQ), "scale+zero_point", or "scale+offset" (LSQ+, on the offset grid).
        grad_scale: factor on the gradients of the learned parameters: None, a number, or "lsq".
        ste_mask: "rounded" or "unrounded", see :func:`fastqat.functional.fake_quantize`.
        momentum: of "running_minmax" and "in_hindsight".
        sync_range: a range that follows the data takes in those of all processes (torch.distributed, where it is
            initialized), which then call the quantizer equally often; needs axis=None. Otherwise a range is local, and
            DistributedDataParallel, which sends buffers round, makes it that of the first process.
        percentile: of "percentile".
        eps: floor of the scale.
        estimator: of the gradient of rounding: "ste", "ewgs", "sigmoid", "dsq", "psg", "pact", or "stochastic"
            (stochastic rounding in training); see :mod:`fastqat.ops.estimators`.
        estimator_strength: delta of "ewgs" in steps of the grid (0.2), a of "sigmoid" (1), alpha of "dsq" (0.2),
            lambda of "psg" (1); None is the default in brackets.
        seed: of stochastic rounding.
        oscillation: what to track and freeze; for weights.
        dampening: the pull to the middle of the bins; for weights.
        activation: "relu" or "relu6" of a tensor comes before its quantization, in the same pass; for activations.
        normalize: "tanh": a weight becomes tanh(w) / max|tanh(w)| on 2^bits levels from -1 to 1, which needs
            range="fixed" (DoReFa, see :func:`fastqat.quantizers.dorefa_weight`). "range": the result is in units of
            the range, scale * (qmax + 1): codes divided by qmax + 1 (TRS).
        rescale: of what normalize="tanh" gives, to a standard deviation: "constant" is 1 / sqrt(output channels times
            size of the kernel), "std" that of the weight (SAT).

    Raises:
        TypeError, ValueError: naming the option, what was wanted, and what came.
    """

    bits: int = 8
    axis: int | None = None
    group_size: int | None = None
    signed: bool | None = None
    symmetric: bool = True
    restricted: bool = False
    range: str = "mse"
    learn: str | None = None
    grad_scale: float | str | None = None
    ste_mask: str = "rounded"
    momentum: float = 0.9
    percentile: float = 99.99
    eps: float = 1e-8
    estimator: str = "ste"
    estimator_strength: float | None = None
    seed: int = 0
    oscillation: Oscillation | None = None
    dampening: Dampening | None = None
    activation: str | None = None
    sync_range: bool = False
    count_from: str = "zero"
    fixed_range: tuple[float, float] | None = None
    normalize: str | None = None
    rescale: str | None = None

    def __post_init__(self) -> None:
        checks.bit_width(self.bits, lowest=2 if self.restricted else 1)
        for name, value in (("axis", self.axis), ("group_size", self.group_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                checks.fail(TypeError, name, "None or an int", repr(value))
        checks.choice("range", self.range, (*ranges.ESTIMATORS, *ranges.OF_LOGITS, "in_hindsight", "fixed"))
        checks.choice("learn", self.learn, LEARN)
        checks.choice("ste_mask", self.ste_mask, ("rounded", "unrounded"))
        checks.choice("activation", self.activation, tuple(CLIPS))
        if isinstance(self.grad_scale, str):
            checks.choice("grad_scale", self.grad_scale, ("lsq",))
        if self.restricted and (self.signed is False or not self.symmetric):
            got = f"signed={self.signed}, symmetric={self.symmetric}"
            checks.fail(ValueError, "restricted", "a signed symmetric grid", got)
        checks.choice("count_from", self.count_from, ("zero", "lowest"))
        if self.count_from == "lowest" and (not self.restricted or self.learn == "scale+offset" or self.follows_data):
            got = f"restricted={self.restricted}, range={self.range!r}, learn={self.learn!r}"
            checks.fail(ValueError, "count_from='lowest'", "a restricted grid that does not follow the data", got)
        self._check_fixed_range()
        if self.range in ranges.SYMMETRIC and not self.symmetric:
            checks.fail(ValueError, "range", f"a symmetric grid with {self.range!r}", "symmetric=False")
        if self.symmetric and self.learn == "scale+zero_point":
            checks.fail(ValueError, "learn", "symmetric=False beside 'scale+zero_point'", "symmetric=True")
        if self.range in ranges.OF_LOGITS and self.axis is not None:
            wanted = f"axis=None beside range={self.range!r}, which compares logits with one another"
            checks.fail(ValueError, "axis", wanted, self.axis)
        if self.group_size is not None and self.axis is None:
            checks.fail(ValueError, "group_size", "an axis beside it", f"group_size={self.group_size}, axis=None")
        if self.sync_range and not (self.follows_data and self.axis is None):
            got = f"range={self.range!r}, learn={self.learn!r}, axis={self.axis}"
            checks.fail(ValueError, "sync_range", f"one of {FOLLOWING} that is not learned, and axis=None", got)
        if not 0 <= self.momentum < 1:
            checks.fail(ValueError, "momentum", "0 <= momentum < 1", self.momentum)
        if not 50 < self.percentile <= 100:
            checks.fail(ValueError, "percentile", "50 < percentile <= 100", self.percentile)
        if not self.eps > 0:
            checks.fail(ValueError, "eps", "a positive number", self.eps)
        self._check_estimator()
        self._check_normalization()
        for name, kind in (("oscillation", Oscillation), ("dampening", Dampening)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                checks.fail(TypeError, name, f"fastqat.{kind.__name__}(...) or None", repr(getattr(self, name)))
        if self.estimator == "stochastic" and self.oscillation is not None and self.oscillation.freezes:
            wanted = "another estimator beside a freeze_threshold: codes that are drawn anew in each step oscillate"
            got = f"estimator='stochastic' with freeze_threshold={self.oscillation.freeze_threshold}"
            checks.fail(ValueError, "estimator", wanted, got)

    def _check_fixed_range(self) -> None:
        if self.fixed_range is None:
            return
        if self.range != "fixed" or self.axis is not None:
            got = f"range={self.range!r}, axis={self.axis}"
            checks.fail(ValueError, "fixed_range", "range='fixed' and axis=None beside it", got)
        low, high = self.fixed_range
        if not (-math.inf < low <= 0 <= high < math.inf and low < high):
            checks.fail(ValueError, "fixed_range", "finite bounds, low <= 0 <= high and low < high", self.fixed_range)
        if low < 0 and self.signed is False and self.symmetric:
            checks.fail(ValueError, "fixed_range", "no negative values for signed=False", self.fixed_range)

    def _check_normalization(self) -> None:
        checks.choice("normalize", self.normalize, NORMALIZE)
        checks.choice("rescale", self.rescale, RESCALE)
        if self.rescale is not None and self.normalize != "tanh":
            checks.fail(ValueError, "rescale", "normalize='tanh' beside it", f"normalize={self.normalize!r}")
        if self.normalize == "range" and self.group_size is not None:
            checks.fail(ValueError, "normalize='range'", "no group_size beside it", self.group_size)
        if self.normalize != "tanh":
            return
        if self.fixed_range != (-1.0, 1.0) or self.learn is not None or not self.is_plain or self.activation:
            wanted = "fixed_range=(-1, 1), nothing learned, the straight-through estimator alone, and no activation"
            names = ("fixed_range", "learn", "estimator", "oscillation", "dampening", "activation")
            got = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            checks.fail(ValueError, "normalize='tanh'", wanted, got)
        if self.symmetric or self.signed:
            got = f"symmetric={self.symmetric}, signed={self.signed}"
            checks.fail(ValueError, "normalize='tanh'", "codes that count from 0: symmetric=False, not signed", got)
        checks.bit_width(self.bits, lowest=2)  # with one bit DoReFa's weights are signs, which have another grid

    def _check_estimator(self) -> None:
        checks.choice("estimator", self.estimator, tuple(ESTIMATORS))
        default, strength = ESTIMATORS[self.estimator][1], self.estimator_strength
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            checks.fail(TypeError, "seed", "an int", repr(self.seed))
        if strength is None:
            return
        if default is None:
            checks.fail(ValueError, "estimator_strength", f"none for estimator={self.estimator!r}", strength)
        if isinstance(strength, bool) or not isinstance(strength, (int, float)):
            checks.fail(TypeError, "estimator_strength", "a number", repr(strength))
        high = 1.0 if self.estimator == "dsq" else float("inf")
        low_allowed = self.estimator == "ewgs" and strength == 0
        if not (0 < strength < high or low_allowed):
            wanted = "a number in (0, 1)" if self.estimator == "dsq" else "a positive number"
            checks.fail(ValueError, "estimator_strength", f"{wanted} for estimator={self.estimator!r}", strength)

    @property
    def follows_data(self) -> bool:
        """True if the range goes on following the data while training."""
        return self.range in FOLLOWING and self.learn is None

    @property
    def is_plain(self) -> bool:
        """True for the straight-through estimator alone, which the ops on one tensor compute."""
        return self.estimator == "ste" and self.oscillation is None and self.dampening is None

    @property
    def is_pact(self) -> bool:
        """True for the gradients of PACT alone, which two bits of each element give where codes count from 0."""
        alone = self.oscillation is None and self.dampening is None
        return alone and self.estimator == "pact" and self.grad_scale != "lsq"


def code_range(bits: int, signed: bool, restricted: bool) -> tuple[int, int]:
    """qmin and qmax of an integer grid."""
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + restricted, 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class QConfig:
    """Quantizers of a layer: of its weight, its activation and its gradient; None leaves that tensor in float.

    Args:
        weight: its axis 0 is that of the output channels, whatever the layer; in an embedding that of the rows.
        activation: one quantizer per layer.
        activation_on: "input" or "output" of the layer.
        gradient: of the layer's output, as both products of its backward pass take it; not in an embedding.

    Raises:
        TypeError, ValueError: naming the option, what was wanted, and what came.
    """

    weight: QSpec | None = QSpec(axis=0)
    activation: QSpec | None = QSpec()
    activation_on: str = "input"
    gradient: GradientQSpec | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "activation"):
            if not isinstance(getattr(self, name), (QSpec, type(None))):
                checks.fail(TypeError, name, "a QSpec or None", repr(getattr(self, name)))
        if not isinstance(self.gradient, (GradientQSpec, type(None))):
            checks.fail(TypeError, "gradient", "a GradientQSpec or None", repr(self.gradient))
        if self.weight is not None and self.weight.activation is not None:
            checks.fail(ValueError, "weight", "a QSpec without activation, which is for activations", "one with it")
        for name in WEIGHT_OPTIONS:
            if self.activation is not None and getattr(self.activation, name) is not None:
                checks.fail(ValueError, "activation", f"a QSpec without {name}, which is for weights", "one with it")
        if self.activation is not None and self.activation.normalize == "tanh":
            wanted = "a QSpec without normalize='tanh', which is for weights"
            checks.fail(ValueError, "activation", wanted, "one with it")
        checks.choice("activation_on", self.activation_on, ("input", "output"))
