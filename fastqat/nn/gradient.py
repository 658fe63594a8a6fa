"""Gradients as quantized tensors: ``GradientQSpec``, their options, and ``GradientFakeQuant``, which a layer calls."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fastqat import gradients
from fastqat.gradients import Interval, Range, Rule, Time
from fastqat.nn.state import QuantizerState
from fastqat.one_tensor import Options
from fastqat.ops import checks

IN_INTERVAL = ("lbt", "minmax", "fixed", "dsgc")
IN_RANGE = ("in_hindsight", "running_minmax")
METHODS = (*IN_INTERVAL, *IN_RANGE)


@dataclass(frozen=True)
class GradientQSpec:
    """Options of the quantizer of a layer's output gradient, which both products of its backward pass then share.

    Of the methods, "lbt", "minmax", "fixed" and "dsgc" have a symmetric grid of 2^b - 1 levels over [-c, c] with
    c = gamma * max|g|; "in_hindsight" and "running_minmax" an affine one of 2^b levels over a moving average.

    Args:
        bits: 2 to 8.
        method: "lbt" moves gamma once per optimizer step, towards a fraction alpha / (2^b - 1) of the gradient beyond c
            (Kim et al., ECCV 2024); "minmax" has gamma 1; "fixed" the given one; "dsgc" the one that keeps the
            direction best, found anew every ``period`` steps (Zhu et al., CVPR 2020). "in_hindsight" averages the
            extremes of the steps before (Fournarakis and Nagel, 2021), "running_minmax" takes in the current ones; with
            momentum 0 these are all that counts.
        gamma: of "fixed"; of "lbt" the first one, None takes it from the quantile of the first gradient.
        alpha: fraction of the gradient that is large, of "lbt".
        gamma_step: by which gamma moves.
        gamma_min: below which it does not.
        momentum: of the moving averages.
        period, candidates: steps from search to search, and values of gamma in one, of "dsgc".
        rounding: "stochastic" (noise of Philox) or "nearest".
        seed: of the noise; None draws one from torch's generator.
        eps: floor of the scale.

    Raises:
        TypeError, ValueError: naming the option, what was wanted, and what came.
    """

    bits: int = 4
    method: str = "lbt"
    gamma: float | None = None
    alpha: float = 1e-3
    gamma_step: float = 1e-3
    gamma_min: float = 1e-3
    momentum: float = 0.9
    period: int = 100
    candidates: int = 32
    rounding: str = "stochastic"
    seed: int | None = 0
    eps: float = gradients.SMALLEST_SCALE

    def __post_init__(self) -> None:
        checks.bit_width(self.bits, lowest=2)
        checks.choice("method", self.method, METHODS)
        checks.choice("rounding", self.rounding, ("stochastic", "nearest"))
        if self.gamma is not None and self.method not in ("lbt", "fixed"):
            checks.fail(ValueError, "gamma", f"none with method={self.method!r}", self.gamma)
        if self.gamma is None and self.method == "fixed":
            checks.fail(ValueError, "gamma", "a number in (0, 1] with method='fixed'", None)
        for name in ("gamma", "alpha", "gamma_step", "gamma_min"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                checks.fail(TypeError, name, "a number", repr(value))
            if not 0 < value <= 1:
                checks.fail(ValueError, name, "a number in (0, 1]", value)
        if not 0 <= self.momentum < 1:
            checks.fail(ValueError, "momentum", "0 <= momentum < 1", self.momentum)
        if not self.eps > 0:
            checks.fail(ValueError, "eps", "a positive number", self.eps)
        for name in ("period", "candidates", "seed"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                checks.fail(TypeError, name, "an int", repr(value))
            if name != "seed" and value < 1:
                checks.fail(ValueError, name, "at least 1", value)
        self.check_deterministic()

    def check_deterministic(self) -> None:
        """Raise a ValueError where noise without a seed is to be deterministic."""
        if self.seed is None and self.rounding == "stochastic" and torch.are_deterministic_algorithms_enabled():
            wanted = "a number for stochastic rounding under torch.use_deterministic_algorithms"
            checks.fail(ValueError, "seed", wanted, None)


class GradientFakeQuant(QuantizerState):
    """Pass a layer's output through, and quantize its gradient in training.

    :func:`fastqat.prepare` makes one for each layer whose QConfig has a ``gradient``. Time is an optimizer step: the
    grid moves in the first backward pass of a step; two passes of one step (micro-batches, layers that are called
    twice) draw the same noise. In evaluation, without a graph and where it is switched off, nothing happens.

    In data-parallel training each process has a grid of its own gradients, unless DistributedDataParallel sends round
    the buffers of the first process, as it does by default.

    Args:
        spec: the options.
        layer_name: for messages.
        device: of the state; None is torch's default device.

    Attributes:
        fake_quant_enabled: False leaves gradients as they are.
        initialized: False until a first gradient has set what "lbt" and "in_hindsight" start from.
        gamma, beyond, seen, limit, scale: see :class:`fastqat.gradients.Interval`.
        range_low, range_high, new_low, new_high, zero_point: see :class:`fastqat.gradients.Range`.
        tensor_id: number of this gradient for stochastic rounding.
        watched: float32 [3] while :meth:`watch` is on, else None.
    """

    # What a report on quantizers asks for.
    axis = group_size = learn = offset = activation = None
    signed, restricted = True, False
    gamma: Tensor
    qrange: Tensor

    @torch.inference_mode(False)
    def __init__(self, spec: GradientQSpec, layer_name: str = "", device: torch.device | str | None = None) -> None:
        device = torch.device(device or torch.get_default_device())
        super().__init__(device)
        self.spec, self.layer_name, self.eps, self.tensor_id = spec, layer_name, spec.eps, 0
        self._bits = spec.bits
        self.fake_quant_enabled = True
        self.symmetric = spec.method in IN_INTERVAL
        self.grid_kind = "symmetric" if self.symmetric else "affine"
        self.initialized = self.has_given_range()
        first_scale = 1.0 if self.initialized else torch.nan
        self.watched: Tensor | None = None
        self._warned = False
        self._age, self.searches = 0, spec.method == "dsgc"
        self.rule = Rule(spec.alpha, spec.gamma_step if spec.method == "lbt" else 0.0, spec.gamma_min)
        values: dict[str, float] = {"gamma": spec.gamma or 1.0, "limit": 0.0, "scale": first_scale}
        counts = {"beyond": 0, "seen": 0, "observed_step": -1}
        if not self.symmetric:
            values = {"range_low": torch.inf, "range_high": -torch.inf, "new_low": torch.inf, "new_high": -torch.inf}
            values |= {"scale": first_scale, "zero_point": 0.0}
            counts = {"observed_step": -1}
        for name, value in values.items():
            self.register_buffer(name, torch.full((1,), value, dtype=torch.float32, device=device))
        for name, count in counts.items():
            self.register_buffer(name, torch.full((1,), count, dtype=torch.int64, device=device))
        self.register_buffer("qrange", torch.tensor(self.codes, dtype=torch.int32, device=device))
        self.note_placeholder()
        self.seed = 0 if spec.seed is None else spec.seed
        if spec.seed is None:  # kept with the state: a run that is resumed draws the same noise
            self.seed = int(torch.randint(2**62, (1,)))
            self.register_buffer("drawn_seed", torch.tensor([self.seed], dtype=torch.int64, device=device))

    @property
    def range(self) -> str:
        """The method, as a report calls it."""
        return self.spec.method

    @property
    def bits(self) -> int:
        """Bit-width; setting it changes the codes in place."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        checks.bit_width(bits, lowest=2)
        self._bits = bits
        self.qrange.copy_(torch.tensor(self.codes, dtype=torch.int32, device=self.qrange.device))

    @property
    def codes(self) -> tuple[int, int]:
        """qmin and qmax."""
        qmax = 2 ** (self._bits - 1) - 1
        return (-qmax, qmax) if self.symmetric else (0, 2**self._bits - 1)

    def has_given_range(self) -> bool:
        """True where nothing is to be set by a first gradient."""
        return not (self.spec.method == "in_hindsight" or (self.spec.method == "lbt" and self.spec.gamma is None))

    def restore_codes(self) -> None:
        """Take bit-width, drawn seed and age from the loaded state; ValueError where it is of another grid."""
        qmin, qmax = self.qrange.tolist()
        before, self._bits = self._bits, (qmax - qmin + 1).bit_length() - (not self.symmetric)
        if self.codes != (qmin, qmax):
            self._bits = before
            checks.fail(ValueError, "qrange", f"codes of method={self.spec.method!r}", f"{qmin} to {qmax}")
        given = {"minmax": 1.0, "fixed": self.spec.gamma}.get(self.spec.method)
        if given is not None and not torch.equal(self.gamma, torch.full_like(self.gamma, given)):
            self._bits = before
            checks.fail(ValueError, "gamma", f"{given} of method={self.spec.method!r}", float(self.gamma))
        if self.spec.seed is None:
            self.seed = int(self.get_buffer("drawn_seed"))
        self._set_age(int(self.step))

    def is_idle(self) -> bool:
        """True if it leaves gradients alone."""
        return not self.fake_quant_enabled

    def forward(self, y: Tensor) -> Tensor:
        """Return y, whose gradient will be quantized.

        Args:
            y: output of the layer.
        """
        if not (self.fake_quant_enabled and self.training and torch.is_grad_enabled()):
            return y
        if torch._C._are_functorch_transforms_active():
            wanted = "no gradient quantizer under a torch.func transform"
            checks.fail(NotImplementedError, f"layer {self.layer_name!r}", wanted, f"method={self.spec.method!r}")
        is_counted = self.mark_forward()
        if torch.compiler.is_compiling():
            self._check_compilable()
        else:
            self._check(y)
        if y.requires_grad:
            y = gradients.with_quantized_gradient(y, self.quantize)
        if is_counted:
            self.clock.count_forward(self, y)
        return y

    def _check_compilable(self) -> None:
        if not self.initialized:
            raise RuntimeError(
                f"layer {self.layer_name!r}: wanted a gradient quantizer that has seen a gradient before compilation; "
                "got none yet. Run the model once eagerly, forward and backward."
            )

    def _check(self, y: Tensor) -> None:
        if self.spec.seed is None:
            try:
                self.spec.check_deterministic()
            except ValueError as error:
                raise ValueError(f"layer {self.layer_name!r}: {error}") from None
        if not y.requires_grad and not self._warned:
            self._warned = True
            warnings.warn(
                f"layer {self.layer_name!r}: wanted an output that needs a gradient, for the gradient quantizer; got "
                "one that needs none: neither the weight nor the input is trained. Nothing is quantized there.",
                stacklevel=2,
            )

    def quantize(self, g: Tensor) -> Tensor:
        """Quantize a gradient, without a graph; the state moves on the device.

        Args:
            g: float32, bfloat16 or float16; it stays as it is.

        Returns:
            like g.
        """
        if not g.numel():
            return g
        if not self.initialized:
            self._initialize(g)
            if not self.initialized:  # zeros say nothing of what follows
                return g
        spec, time = self.spec, Time(self.step, not self.tracked)
        noisy = spec.rounding == "stochastic"
        options = Options(self.eps, seed=self.seed, tensor_id=self.tensor_id if noisy else -1)
        if self.symmetric:
            if self.searches:
                self.gamma.copy_(gradients.most_similar_gamma(g, self.qrange, spec.candidates))
            y = gradients.quantize_in_interval(g, self._interval(), self.qrange, time, self.rule, options)
        else:
            if spec.method == "running_minmax" and spec.momentum == 0:
                time = Time(self.step, True)  # the range of this very gradient
            hindsight = spec.method == "in_hindsight"
            y = gradients.quantize_in_range(g, self._range(), self.qrange, time, spec.momentum, hindsight, options)
        if self.watched is not None:
            self._watch(g, y)
        return y

    def _interval(self) -> Interval:
        return Interval(*(self.get_buffer(name) for name in Interval._fields))

    def _range(self) -> Range:
        names = ("range_low", "range_high", *Range._fields[2:])
        return Range(*(self.get_buffer(name) for name in names))

    def _initialize(self, g: Tensor) -> None:
        """Set what the method starts from; the first gradient alone is waited for."""
        low, high = torch.ops.fastqat.minmax(g, None)
        extremes = torch.stack([low, high])
        if not (extremes.isfinite() & (extremes != 0)).any():
            return
        if self.symmetric:
            self.gamma.copy_(gradients.initial_gamma(g, self.rule, self.codes[1]))
        else:
            self.get_buffer("new_low").copy_(low)
            self.get_buffer("new_high").copy_(high)
        self.initialized = True

    def needs_time(self) -> bool:
        """True if it draws noise, or its grid moves once in a step."""
        return self.fake_quant_enabled and (
            self.spec.rounding == "stochastic" or self.spec.method not in ("minmax", "fixed")
        )

    def advanced(self) -> None:
        """Count a step of the optimizer."""
        self._set_age(self._age + 1)

    def _set_age(self, age: int) -> None:
        self._age = age
        self.searches = self.spec.method == "dsgc" and age % self.spec.period == 0

    def watch(self, on: bool = True) -> None:
        """From now on every backward pass measures what it does, or no longer does.

        ``watched`` is then the share beyond the grid, E(G_L) (:func:`fastqat.gradients.large_error`), and max|g|.
        """
        self.watched = torch.full((3,), torch.nan, dtype=torch.float32, device=self.qrange.device) if on else None

    def _watch(self, g: Tensor, y: Tensor) -> None:
        assert self.watched is not None
        largest = g.float().abs().amax().view(1)
        if self.symmetric:
            beyond = g.float().abs() > self.get_buffer("limit")
        else:
            beyond = (g.float() < self.get_buffer("range_low")) | (g.float() > self.get_buffer("range_high"))
        error = gradients.large_error(g, y, self.spec.alpha)
        self.watched.copy_(torch.cat([beyond.float().mean().view(1), error, largest]))

    def extra_repr(self) -> str:
        """Bits, codes, method and rounding."""
        low, high = self.codes
        return f"bits={self.bits}, codes={low}..{high}, method={self.spec.method}, rounding={self.spec.rounding}"
