"""``FakeQuant``: the quantizer as a module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastqat.autograd import CLIPS, activated
from fastqat.dorefa import dorefa_fake_quantize
from fastqat.nn.calls import NOTHING, Together
from fastqat.nn.coded import Keep
from fastqat.nn.copied import check_copy
from fastqat.nn.items import quantize_alone
from fastqat.nn.one_pass import quantize_in_one_pass, quantize_with_gradients
from fastqat.nn.sized import SizedQuantizer
from fastqat.nn.spec import QSpec
from fastqat.nn.tracking import Dampening
from fastqat.ops import checks
from fastqat.ops.estimators import ESTIMATORS, STOCHASTIC, kernel_strength
from fastqat.schedules import Schedule


class FakeQuant(SizedQuantizer):
    """Quantize-dequantize with a range that is estimated from the data, learned, or given.

    ``y = FakeQuant(bits=4, axis=0)(x)`` has the shape and dtype of x. The first tensor that it sees sets the range. It
    is called in ``forward``, registered as a parametrization of a weight, or made by torch.ao through
    :meth:`with_args`; its parameters stay float32 whatever the dtype of the model.

    Args:
        bits, axis, **options: see :class:`fastqat.QSpec`.
        channels: number of channels, or (channels, groups) with group_size, where it is known; else the first tensor
            says.
        scale, zero_point: float32 values for range="fixed", of shape [1], [C] or [C, groups].
        device: of the parameters; None is torch's default device.
        factory_kwargs: what torch.ao passes on; only its device is used.

    Attributes:
        scale: Parameter, float32; zero_point, offset: Parameter or None.
        qrange: int32 [2], qmin and qmax.
        initialized: True once the range is set.
        fake_quant_enabled: False passes x through unchanged, but for its activation function.
        observer_enabled: False keeps a range that follows the data from doing so.
        tracker: state of oscillation tracking, a :class:`fastqat.nn.tracking.Tracker`; None without it.
        estimator_strength: float32 [1], the parameter of the estimator, which may be changed in place; None for those
            that have none. Of "sigmoid" and "dsq" it is the slope k.
        tensor_id: number of this tensor for stochastic rounding: its place in :func:`fastqat.prepare`.
        layer_name: of the layer whose input or output this is, for messages; None where nobody said.
        is_of_weight: True where ``prepare`` or ``register_parametrization`` made it for a weight.
        growing: True while the range follows a weight, or channels of it, that began at zero.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """

    grad_scale: float | str | None
    ste_mask: str
    estimator: str
    estimator_strength: Any  # Tensor or None
    activation: str | None
    seed: int
    dampening: Dampening | None

    @torch.inference_mode(False)  # what inference makes, training could not change
    def __init__(
        self,
        bits: int = 8,
        axis: int | None = None,
        *,
        channels: int | tuple[int, int] | None = None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        device: torch.device | str | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        device = torch.device(device or (factory_kwargs or {}).get("device") or torch.get_default_device())
        super().__init__(device)
        spec = QSpec(bits, axis, **options)
        # Plain attributes: a compiled forward guards only those that it reads, and it never reads the bit-width.
        for name in (field.name for field in fields(spec) if field.name != "estimator_strength"):
            setattr(self, "_bits" if name == "bits" else name, getattr(spec, name))
        self._is_plain, self.has_pact_gradients = spec.is_plain, spec.is_pact
        self.tensor_id = 0
        self.layer_name: str | None = None
        self.is_of_weight = False
        self.steps_without_owner: int | None = 0  # of a learned scale; None once it is known, see fastqat.nn.scales
        self.together = NOTHING
        self.fake_quant_enabled = True
        self.observer_enabled = True
        self._sign_from_data = self.signed is None and self.symmetric and not self.restricted
        self.register_buffer("qrange", torch.tensor(self.codes, dtype=torch.int32, device=device))
        self._register_parameters(channels, device)
        strength = ESTIMATORS[self.estimator][1] if spec.estimator_strength is None else spec.estimator_strength
        self.register_buffer("estimator_strength", None)
        if strength is not None:
            strength = kernel_strength(self.estimator, strength)
            self.estimator_strength = torch.full((1,), strength, dtype=torch.float32, device=device)
        self.tracker = None
        self._make_tracker()
        if self.range == "fixed":
            self._set_fixed(scale, zero_point)
        elif scale is not None or zero_point is not None:
            wanted = f"none with range={self.range!r} (only range='fixed' takes them)"
            checks.fail(ValueError, "scale, zero_point", wanted, "values")

    @classmethod
    def with_args(cls, **options: Any) -> _Factory:
        """A factory of quantizers with these options, for ``torch.ao.quantization.QConfig``."""
        return _Factory(cls, options)

    def train(self, mode: bool = True) -> FakeQuant:
        """Set the mode; for evaluation, which may be compiled, check what was written from outside."""
        super().train(mode)
        if not mode:
            check_copy(self)
        return self

    def is_idle(self) -> bool:
        """True if a forward would pass its tensor through and look at nothing."""
        return not (self.fake_quant_enabled or self._calibrating or self.is_following or self.activation)

    @property
    def is_following(self) -> bool:
        """True if a forward would move the range with the data."""
        return self.training and self.observer_enabled and self._buffers["range_low"] is not None

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None, keep: Keep | None = None) -> Tensor:
        """Quantize-dequantize x.

        Args:
            x: float32, bfloat16 or float16.
            out_dtype: dtype of the result, from the same pass; None is that of x.
            keep: takes the codes, and saves less for the backward pass, where there is one scale.

        Returns:
            Tensor of the shape of x.
        """
        checks.float_tensor("x", x)
        if isinstance(x, nn.Parameter) and not torch.compiler.is_compiling():
            self.follows(x)
        if not self.training:
            check_copy(self)
        is_counted = self.mark_forward()
        clip = CLIPS[self.activation]
        if self._calibrating:
            x = activated(x, clip)
            self._observe(x)
            return x if out_dtype is None else x.to(out_dtype)
        if not self.initialized:
            self._initialize(activated(x, clip), self.is_of_weight or isinstance(x, nn.Parameter))
        if self.growing and self.training and self.observer_enabled:
            self._grow(x)
        ready = self.initialized and self.fake_quant_enabled
        if ready and self.normalize == "tanh":
            return dorefa_fake_quantize(x, self.qrange[1:], self.rescale, out_dtype)
        y = self._quantized(x, clip, ready, out_dtype, keep)
        if ready and self.normalize == "range":
            y = self.in_units(y)
        if is_counted:
            self.clock.count_forward(self, y)
        return y

    def _quantized(
        self, x: Tensor, clip: float, ready: bool, out_dtype: torch.dtype | None, keep: Keep | None
    ) -> Tensor:
        if ready and self.fits_one_pass() and not torch._C._are_functorch_transforms_active():
            return quantize_in_one_pass(self, x, clip, out_dtype, keep)
        x = activated(x, clip)
        axis, scale, zero_point = self.grid(x) if self.initialized else (None, self.scale, None)
        if not ready:  # switched off, or there was nothing that has a range
            return x if out_dtype is None else x.to(out_dtype)
        if not self._is_plain:
            if torch._C._are_functorch_transforms_active():
                wanted = "no estimator, tracking or dampening under a torch.func transform (use fastqat.functional)"
                checks.fail(NotImplementedError, "FakeQuant", wanted, f"estimator={self.estimator!r}")
            return quantize_alone(self, x, scale, zero_point, axis, out_dtype)
        return quantize_with_gradients(self, x, axis, scale, zero_point, 0.0, out_dtype)

    def in_units(self, y: Tensor) -> Tensor:
        """What was quantized in units of the range, scale * (qmax + 1), where normalize="range"; else as it is."""
        if self.normalize != "range":
            return y
        shape = [1] * y.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        unit = self.scale.clamp(min=self.eps) * (self.qrange[1] + 1)
        return (y / unit.view(shape)).to(y.dtype)

    def fits_one_pass(self) -> bool:
        """True if :mod:`fastqat.one_tensor` may compute it: one scale, and the straight-through estimator or PACT."""
        if self.axis is not None:
            return False
        is_unsigned = self.signed is False or (self.signed is None and not self.symmetric)
        from_zero = is_unsigned and self.zero_point is None and not self.is_on_offset_grid
        return self._is_plain or (self.has_pact_gradients and from_zero)

    def checked_axis(self, x: Tensor) -> int | None:
        """The axis in [0, x.dim()), or None; for a tensor that the scale belongs to."""
        axis = checks.normalized_axis(x, self.axis)
        checks.parameter("FakeQuant.scale", self.scale, x, checks.scale_shape(x, axis, self.group_size))
        return axis

    def grid(self, x: Tensor) -> tuple[int | None, Tensor, Tensor | None]:
        """Axis, scale and zero point for a tensor; a range that follows the data takes it into account."""
        axis = self.checked_axis(x)
        if self.is_following:
            return axis, *self.grid_for(x)
        return axis, self.scale, self.zero_point

    def is_ready(self) -> bool:
        """True if a call would quantize and do nothing else: the range is set, it is switched on, no hook listens."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if not self.training:
            check_copy(self)
        known = self.normalize != "tanh" and not self.growing  # which no op on many tensors computes
        return known and not hooks and self.initialized and self.fake_quant_enabled and not self._calibrating

    def done_together(self, weight: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """The quantized weight, where :func:`quantize_weights_together` has it; else None."""
        together = self.together
        value = together.get(weight, dtype)
        if value is not None and self.mark_forward():
            self.clock.count_forward(self, value)
        if value is not None and value.requires_grad and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            self.keep(together._replace(again=False))
        return value

    def needs_time(self) -> bool:
        """True if it tracks, follows a schedule, draws noise, or moves its range once in a step."""
        scheduled = self.dampening is not None and isinstance(self.dampening.weight, Schedule)
        noisy = ESTIMATORS[self.estimator][0] == STOCHASTIC
        return (self.tracked and self.is_following) or (
            self.fake_quant_enabled and (self.tracker is not None or scheduled or noisy)
        )

    def advanced(self) -> None:
        """Forget what was quantized before the step; keep the range where its parameters are whole in a pass only."""
        self.keep(NOTHING)
        self.write_range_to_shards()
        if self.growing and self.growth is not None:
            self.growing = self.growth.advance(self)

    def keep(self, together: Together) -> None:
        """Keep what was quantized together with others; past nn.Module, whose way to set attributes is a long one."""
        self.__dict__["together"] = together

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "together": NOTHING}

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Called by ``register_parametrization``: sets the range from the weight, which stays as it is."""
        if isinstance(weight, nn.Parameter):
            self.follows(weight)
        self.is_of_weight = True
        if not self.initialized:
            self._initialize(weight.detach(), of_weight=True)
        if self.tracker is not None:
            self.tracker.prepare(weight.detach(), self.codes[0])
        return weight

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and integer zero point (int32), as torch.ao asks for them.

        Raises:
            NotImplementedError: of DoReFa, whose levels lie beside 0, and are multiples of no scale.
        """
        if self.normalize == "tanh":
            wanted = "a grid with a level at 0 (torch.ao knows no other; see fastqat.remove for the values)"
            checks.fail(NotImplementedError, "FakeQuant.calculate_qparams", wanted, self.grid_kind)
        zero_point = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        if self.count_from == "lowest":
            zero_point = zero_point + self.qrange[1] // 2
        return self.scale.detach(), zero_point.detach().round().clamp(*self.codes).to(torch.int32)

    def extra_repr(self) -> str:
        """Bits, codes, grid, granularity and range."""
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        learn = f", learn={self.learn}" if self.learn else ""
        shape = "?" if is_lazy(self.scale) else list(self.scale.shape)
        state = "initialized" if self.initialized else "not initialized"
        activation = f"activation={self.activation}, " if self.activation else ""
        grid = f"bits={self.bits}, codes={self.codes[0]}..{self.codes[1]}, grid={self.grid_kind}"
        if self.normalize == "tanh":
            return grid
        return f"{grid}, axis={self.axis}{group}, {activation}range={self.range}{learn}, scale={shape}, {state}"


class _Factory:
    """FakeQuant with some options given; called like the class, and refined by :meth:`with_args`."""

    def __init__(self, cls: type[FakeQuant], options: dict[str, Any]) -> None:
        self.cls, self.options = cls, options

    def __call__(self, *args: Any, **options: Any) -> FakeQuant:
        return self.cls(*args, **{**self.options, **options})

    def with_args(self, **options: Any) -> _Factory:
        """A factory with more options given."""
        return _Factory(self.cls, {**self.options, **options})
