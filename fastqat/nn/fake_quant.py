"""``FakeQuant``: the quantizer as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from fastqat import functional, ranges
from fastqat.nn.state import QuantizerState
from fastqat.ops import checks

LEARN = (None, "scale", "scale+zero_point", "scale+offset")
FOLLOWING = ("minmax", "running_minmax")  # ranges that go on following the data while training, unless they are learned


class FakeQuant(QuantizerState):
    """Quantize-dequantize with a range that is estimated from the data, learned, or given.

    ``y = FakeQuant(bits=4, axis=0)(x)`` has the shape and dtype of x. The first tensor that it sees sets the range. It is
    called in ``forward``, registered as a parametrization of a weight, or made by torch.ao through
    :meth:`with_args`; parameters stay float32 whatever the dtype of the model.

    Args:
        bits: 1 to 8.
        axis: channel dimension with one scale each; None is one scale per tensor.
        channels: number of channels (or (channels, groups) with group_size), where it is known; else the first tensor says.
        group_size: elements that share a scale, counted along all other dimensions flattened.
        signed: codes from -2^(b-1) to 2^(b-1)-1, or from 0 to 2^b-1. None decides at the first tensor: signed if it has a
            negative value; an affine grid is unsigned.
        symmetric: no zero point.
        restricted: signed codes from -(2^(b-1)-1), so that the grid is symmetric about 0.
        range: "mse", "minmax", "running_minmax", "percentile", or "fixed" (takes ``scale``). The two min-max ranges follow
            the data while training unless the scale is learned.
        learn: None, "scale" (LSQ), "scale+zero_point", or "scale+offset" (LSQ+, on the offset grid).
        grad_scale: factor on the gradients of the learned parameters: None, a number, or "lsq".
        ste_mask: "rounded" or "unrounded", see :func:`fastqat.functional.fake_quantize`.
        momentum: of "running_minmax".
        percentile: of "percentile".
        eps: floor of the scale.
        scale, zero_point: float32 values for range="fixed", of shape [1], [C] or [C, groups].
        device: of the parameters.
        factory_kwargs: what torch.ao passes on; only its device is used.

    Attributes:
        scale: Parameter, float32; zero_point, offset: Parameter or None.
        qrange: int32 [2], qmin and qmax.
        initialized: True once the range is set.
        fake_quant_enabled: False passes x through unchanged.
        observer_enabled: False keeps the two min-max ranges from following the data.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter | None
    offset: nn.Parameter | None
    qrange: Tensor

    def __init__(
        self,
        bits: int = 8,
        axis: int | None = None,
        *,
        channels: int | tuple[int, int] | None = None,
        group_size: int | None = None,
        signed: bool | None = None,
        symmetric: bool = True,
        restricted: bool = False,
        range: str = "mse",
        learn: str | None = None,
        grad_scale: float | str | None = None,
        ste_mask: str = "rounded",
        momentum: float = 0.9,
        percentile: float = 99.99,
        eps: float = 1e-8,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        device: torch.device | str | None = None,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._check_options(bits, signed, symmetric, restricted, range, learn, grad_scale, ste_mask, momentum, percentile, eps)
        device = device or (factory_kwargs or {}).get("device")
        self.axis, self.group_size, self.eps = axis, group_size, float(eps)
        self.signed, self.symmetric, self.restricted = signed, symmetric, restricted
        self.range, self.learn, self.grad_scale, self.ste_mask = range, learn, grad_scale, ste_mask
        self.momentum, self.percentile = momentum, percentile
        self.initialized = False
        self.fake_quant_enabled = True
        self.observer_enabled = True
        self._calibration: Any = None
        self._bits = bits
        self.register_buffer("qrange", torch.tensor(self._codes(), dtype=torch.int32, device=device))
        self.step = self.step.to(device)
        self._make_parameters(channels, device)
        if range == "fixed":
            self._set_fixed(scale, zero_point, device)
        elif scale is not None or zero_point is not None:
            checks.fail(ValueError, "scale, zero_point", f"none with range={range!r} (only range='fixed' takes them)", "values")

    @staticmethod
    def _check_options(
        bits, signed, symmetric, restricted, range_, learn, grad_scale, ste_mask, momentum, percentile, eps
    ) -> None:
        checks.bit_width(bits, lowest=2 if restricted else 1)
        checks.choice("range", range_, (*ranges.ESTIMATORS, "fixed"))
        checks.choice("learn", learn, LEARN)
        checks.choice("ste_mask", ste_mask, ("rounded", "unrounded"))
        if isinstance(grad_scale, str):
            checks.choice("grad_scale", grad_scale, ("lsq",))
        if restricted and (signed is False or not symmetric):
            checks.fail(ValueError, "restricted", "a signed symmetric grid", f"signed={signed}, symmetric={symmetric}")
        if symmetric and learn == "scale+zero_point":
            checks.fail(ValueError, "learn", "symmetric=False beside 'scale+zero_point'", "symmetric=True")
        if not 0 <= momentum < 1:
            checks.fail(ValueError, "momentum", "0 <= momentum < 1", momentum)
        if not 50 < percentile <= 100:
            checks.fail(ValueError, "percentile", "50 < percentile <= 100", percentile)
        if not eps > 0:
            checks.fail(ValueError, "eps", "a positive number", eps)

    # -- the grid ------------------------------------------------------------------------------------------------------

    def _is_signed(self) -> bool:
        return (self.symmetric or self.restricted) if self.signed is None else self.signed

    def _codes(self) -> tuple[int, int]:
        if not self._is_signed():
            return 0, 2**self._bits - 1
        return -(2 ** (self._bits - 1)) + self.restricted, 2 ** (self._bits - 1) - 1

    @property
    def bits(self) -> int:
        """Bit-width. Setting it changes the codes in place and keeps the scale; nothing is compiled anew."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        checks.bit_width(bits, lowest=2 if self.restricted else 1)
        self._bits = bits
        self._write_codes()

    def _write_codes(self) -> None:
        self.qrange.copy_(torch.tensor(self._codes(), dtype=torch.int32))

    def has_given_range(self) -> bool:
        """True for range="fixed"."""
        return self.range == "fixed"

    def restore_codes(self) -> None:
        """Take the bit-width and the sign from the loaded qrange."""
        qmin, qmax = self.qrange.tolist()
        if self.signed is None and self.symmetric and not self.restricted:
            self.signed = qmin < 0
        self._bits = (qmax - qmin + 1).bit_length() - (not self.restricted)

    def _make_parameters(self, channels: int | tuple[int, int] | None, device: Any) -> None:
        """Register scale, zero_point and offset; of unknown shape where the channels are."""
        shape: tuple[int, ...] | None = (1,) if self.axis is None else None
        if channels is not None and self.axis is not None:
            shape = (channels,) if isinstance(channels, int) else tuple(channels)
            if len(shape) != (1 if self.group_size is None else 2):
                checks.fail(ValueError, "channels", "(channels, groups) with group_size, else an int", channels)
        learned = (self.learn or "").split("+")
        has = {
            "scale": True,
            "zero_point": not self.symmetric and self.learn != "scale+offset",
            "offset": self.learn == "scale+offset",
        }
        for name, wanted in has.items():
            if not wanted:
                self.register_parameter(name, None)
                continue
            p = UninitializedParameter(requires_grad=name in learned, device=device, dtype=torch.float32)
            self.register_parameter(name, p)
        for name in ("range_low", "range_high"):  # what "minmax" and "running_minmax" follow
            self.register_buffer(name, None)
        if shape is not None:
            self.materialize(shape, torch.device(device or "cpu"))

    def materialize(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Give the parameters their shape."""
        for name in ("scale", "zero_point", "offset"):
            p = getattr(self, name)
            if p is not None and is_lazy(p):
                p.materialize(shape, device=device, dtype=torch.float32)
                nn.init.constant_(p, 1.0 if name == "scale" else 0.0)
        if self.range in FOLLOWING and self.learn is None and self.range_low is None:
            self.range_low = torch.zeros(shape, dtype=torch.float32, device=device)
            self.range_high = torch.zeros(shape, dtype=torch.float32, device=device)
            self.register_buffer("observed_step", torch.full((1,), -1, dtype=torch.int64, device=device))

    def _set_fixed(self, scale: Tensor | None, zero_point: Tensor | None, device: Any) -> None:
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.dim() < 1:
            checks.fail(ValueError, "scale", "a float32 tensor of shape [1], [C] or [C, groups] for range='fixed'", scale)
        if (zero_point is not None) != (self.zero_point is not None):
            checks.fail(ValueError, "zero_point", "one if and only if the grid is affine", zero_point)
        checks.positive("scale", scale)
        self.materialize(tuple(scale.shape), torch.device(device) if device else scale.device)
        self.set_grid(scale, zero_point)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Set the range by hand.

        Args:
            scale: float32 of the shape of ``self.scale``, positive and finite.
            zero_point: float32 likewise; on the offset grid it sets offset = -scale * zero_point.

        Raises:
            ValueError: wrong shape, or a value that is not positive and finite.
        """
        if is_lazy(self.scale):
            self.materialize(tuple(scale.shape), scale.device)
        if scale.shape != self.scale.shape:
            checks.fail(ValueError, "scale", f"shape {list(self.scale.shape)}", list(scale.shape))
        checks.positive("scale", scale)
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)
        if self.offset is not None and zero_point is not None:
            self.offset.copy_(-scale * zero_point)
        self.initialized = True

    # -- ranges --------------------------------------------------------------------------------------------------------

    def _spec(self) -> ranges.GridSpec:
        qmin, qmax = self._codes()
        return ranges.GridSpec(self.axis, self.group_size, qmin, qmax, self.symmetric)

    def begin_calibration(self) -> None:
        """From now on every forward only observes, until :meth:`end_calibration` sets the range."""
        self._calibration = []

    def end_calibration(self) -> bool:
        """Set the range from what was observed; False if nothing was."""
        state, self._calibration = self._calibration, None
        if not state:
            return False
        self._finish(state[0])
        return True

    def _observe_for_calibration(self, x: Tensor) -> None:
        if not self._calibration:
            self._start(x)
            self._calibration = [
                ranges.estimator(self.range, self._spec(), momentum=self.momentum, percentile=self.percentile)
            ]
        self._calibration[0].observe(x)

    def _start(self, x: Tensor) -> None:
        """Shapes, and the sign of the codes, from the first tensor."""
        axis = checks.normalized_axis(x, self.axis)
        shape = checks.scale_shape(x, axis, self.group_size)
        if is_lazy(self.scale) or (self.range in FOLLOWING and self.range_low is None):
            self.materialize(shape, x.device)
        if self.signed is None and self.symmetric and not self.restricted:
            self.signed = bool((functional.minmax(x)[0] < 0).item())
            self._write_codes()

    @torch.no_grad()
    def _finish(self, estimator: Any) -> None:
        self.set_grid(*estimator.grid())
        if self.range_low is not None and isinstance(estimator, ranges.MinMax):
            self.range_low.copy_(estimator.low)
            self.range_high.copy_(estimator.high)
            self.observed_step.copy_(self.step)

    def _initialize(self, x: Tensor) -> None:
        """Set the range from the first tensor."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "FakeQuant: wanted an initialized range before compilation; got the first tensor inside a compiled "
                "forward. Call the module once eagerly, or fastqat.calibrate(model, batches)."
            )
        self.begin_calibration()
        self._observe_for_calibration(x)
        self.end_calibration()

    def _follow(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Grid of the data so far, for the ranges that follow it: device operations only.

        Time is an optimizer step: a quantizer that follows a weight takes the first tensor of a step, so that a forward
        that is computed again sees the same range. Returns new tensors; what the last forward saved stays as it was.
        """
        with torch.no_grad():
            low, high = functional.minmax(x.detach(), axis=self.axis, group_size=self.group_size)
            if self.range == "running_minmax":
                low = self.momentum * self.range_low + (1 - self.momentum) * low
                high = self.momentum * self.range_high + (1 - self.momentum) * high
            if self.tracked:
                fresh = self.step > self.observed_step
                low, high = torch.where(fresh, low, self.range_low), torch.where(fresh, high, self.range_high)
            qmin, qmax = self.qrange.unbind()
            scale, zero_point = ranges.grid_from_range(low, high, qmin, qmax, self.symmetric)
            self.range_low.copy_(low)
            self.range_high.copy_(high)
            self.observed_step.copy_(self.step)
            self.scale.copy_(scale)
            if self.zero_point is None:
                return scale, None
            self.zero_point.copy_(zero_point)
            return scale, zero_point

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Quantize-dequantize x.

        Args:
            x: float32, bfloat16 or float16.
            out_dtype: dtype of the result, from the same pass; None is that of x.

        Returns:
            Tensor of the shape of x.
        """
        checks.float_tensor("x", x)
        if isinstance(x, nn.Parameter) and not torch.compiler.is_compiling():
            self.follows(x)
        if self._calibration is not None:
            self._observe_for_calibration(x)
            return x if out_dtype is None else x.to(out_dtype)
        if not self.initialized:
            self._initialize(x)
        scale, zero_point = self.scale, self.zero_point
        axis = checks.normalized_axis(x, self.axis)
        checks.parameter("FakeQuant.scale", scale, x, checks.scale_shape(x, axis, self.group_size))
        if self.range_low is not None and self.observer_enabled and self.training:
            scale, zero_point = self._follow(x)
        if not self.fake_quant_enabled:
            return x if out_dtype is None else x.to(out_dtype)
        return functional.apply_fake_quantize(
            x,
            scale,
            zero_point,
            self.offset,
            self.qrange,
            axis=axis,
            group_size=self.group_size,
            eps=self.eps,
            ste_mask=self.ste_mask,
            grad_scale=self.grad_scale,
            out_dtype=out_dtype,
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Called by ``register_parametrization``: sets the range from the weight, which stays as it is."""
        if isinstance(weight, nn.Parameter):
            self.follows(weight)
        if not self.initialized:
            self._initialize(weight.detach())
        return weight

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and integer zero point (int32), as torch.ao asks for them."""
        zero_point = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        qmin, qmax = self._codes()
        return self.scale.detach(), zero_point.detach().round().clamp(qmin, qmax).to(torch.int32)

    @classmethod
    def with_args(cls, **options: Any) -> _Factory:
        """A factory of quantizers with these options, for ``torch.ao.quantization.QConfig``."""
        return _Factory(cls, options)

    def extra_repr(self) -> str:
        """Bits, codes, grid, granularity and range."""
        qmin, qmax = self._codes()
        grid = "offset" if self.offset is not None else "symmetric" if self.symmetric else "affine"
        parts = [f"bits={self.bits}", f"codes={qmin}..{qmax}", f"grid={grid}", f"axis={self.axis}"]
        if self.group_size is not None:
            parts.append(f"group_size={self.group_size}")
        parts.append(f"range={self.range}")
        if self.learn:
            parts.append(f"learn={self.learn}")
        shape = "?" if is_lazy(self.scale) else list(self.scale.shape)
        parts += [f"scale={shape}", "initialized" if self.initialized else "not initialized"]
        return ", ".join(parts)


class _Factory:
    """FakeQuant with some options given; called like the class, and refined by :meth:`with_args`."""

    def __init__(self, cls: type[FakeQuant], options: dict[str, Any]) -> None:
        self.cls, self.options = cls, options

    def __call__(self, *args: Any, **options: Any) -> FakeQuant:
        return self.cls(*args, **{**self.options, **options})

    def with_args(self, **options: Any) -> _Factory:
        """A factory with more options given."""
        return _Factory(self.cls, {**self.options, **options})
