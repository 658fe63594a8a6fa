"""How a quantizer comes to its range: given, estimated from tensors that it sees, or following them while training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from fastqat import functional, ranges
from fastqat.nn.spec import code_range
from fastqat.nn.state import QuantizerState
from fastqat.ops import checks

FOLLOWING = ("minmax", "running_minmax")  # ranges that go on following the data while training, unless learned


class RangedQuantizer(QuantizerState):
    """Base of :class:`fastqat.FakeQuant`: the parameters of its grid, and what sets them."""

    scale: nn.Parameter
    zero_point: nn.Parameter | None
    offset: nn.Parameter | None
    qrange: Tensor
    range_low: Any  # Tensor, or None where the range does not follow the data
    range_high: Any
    observed_step: Any
    _bits: int
    axis: int | None
    group_size: int | None
    signed: bool | None
    symmetric: bool
    restricted: bool
    range: str
    learn: str | None
    momentum: float
    _sign_from_data: bool
    percentile: float

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.initialized = False
        self._estimators: dict[bool, ranges.Estimator] = {}  # signed -> of its codes, while calibrating
        self._calibrating = False

    @property
    def codes(self) -> tuple[int, int]:
        """qmin and qmax."""
        signed = (self.symmetric or self.restricted) if self.signed is None else self.signed
        return code_range(self._bits, signed, self.restricted)

    def _write_codes(self) -> None:
        self.qrange.copy_(torch.tensor(self.codes, dtype=torch.int32, device=self.qrange.device))

    def _register_parameters(self, channels: int | tuple[int, int] | None, device: torch.device) -> None:
        """Register scale, zero_point and offset, of unknown shape where the channels are."""
        learned = (self.learn or "").split("+")
        offset_grid = self.learn == "scale+offset"
        has = {"scale": True, "zero_point": not self.symmetric and not offset_grid, "offset": offset_grid}
        for name, wanted in has.items():
            options: Any = {"requires_grad": name in learned, "device": device, "dtype": torch.float32}
            lazy: Any = UninitializedParameter(**options) if wanted else None
            self.register_parameter(name, lazy)
        for name in ("range_low", "range_high", "observed_step"):
            self.register_buffer(name, None)
        if self.axis is None and channels is not None:
            checks.fail(ValueError, "channels", "none with axis=None (one scale per tensor)", channels)
        elif self.axis is None:
            self.materialize((1,), device)
        elif channels is not None:
            shape = (channels,) if isinstance(channels, int) else tuple(channels)
            if len(shape) != (1 if self.group_size is None else 2):
                checks.fail(ValueError, "channels", "(channels, groups) with group_size, else an int", channels)
            self.materialize(shape, device)

    @torch.inference_mode(False)
    def materialize(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Give the parameters, and the range that follows the data, their shape."""
        for name, p in self.named_parameters(recurse=False):
            if isinstance(p, UninitializedParameter):
                p.materialize(shape, device=device, dtype=torch.float32)
                nn.init.constant_(p, 1.0 if name == "scale" else 0.0)
        if self.range in FOLLOWING and self.learn is None and self.range_low is None:
            self.range_low = torch.zeros(shape, dtype=torch.float32, device=device)
            self.range_high = torch.zeros(shape, dtype=torch.float32, device=device)
            self.observed_step = torch.full((1,), -1, dtype=torch.int64, device=device)

    def has_given_range(self) -> bool:
        """True for range="fixed"."""
        return self.range == "fixed"

    def _set_fixed(self, scale: Tensor | None, zero_point: Tensor | None) -> None:
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.dim() < 1:
            wanted = "a float32 tensor of shape [1], [C] or [C, groups] for range='fixed'"
            checks.fail(ValueError, "scale", wanted, scale)
        elif (zero_point is None) == (not self.symmetric):
            checks.fail(ValueError, "zero_point", "one if and only if the grid is affine", zero_point)
        else:
            self.set_grid(scale, zero_point)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Set the range by hand.

        Args:
            scale: float32 of the shape of ``self.scale``, positive and finite.
            zero_point: float32 likewise; on the offset grid it sets offset = -scale * zero_point.

        Raises:
            ValueError: wrong shape, a scale that is not positive and finite, or a zero point that is not finite.
        """
        checks.positive("scale", scale)
        if zero_point is not None and (zero_point.shape != scale.shape or not bool(zero_point.isfinite().all())):
            checks.fail(ValueError, "zero_point", f"finite values of shape {list(scale.shape)}", zero_point)
        if is_lazy(self.scale):
            self.materialize(tuple(scale.shape), self.qrange.device)
        if scale.shape != self.scale.shape:
            checks.fail(ValueError, "scale", f"shape {list(self.scale.shape)}", list(scale.shape))
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)
        if self.offset is not None and zero_point is not None:
            self.offset.copy_(-scale * zero_point)
        self.initialized = True

    def begin_calibration(self) -> None:
        """From now on every forward only observes, until :meth:`end_calibration` sets the range."""
        self._calibrating, self._estimators = True, {}

    def end_calibration(self) -> bool:
        """Set the range from what was observed; False if no finite value was."""
        estimators, self._calibrating, self._estimators = self._estimators, False, {}
        if not estimators:
            return False
        signed, estimator = next(iter(estimators.items()))
        if self._sign_from_data:
            self.signed = signed
            self._write_codes()
        self.set_grid(*estimator.grid())
        if isinstance(estimator, ranges.MinMax) and self.range_low is not None:
            self.range_low.copy_(estimator.low)
            self.range_high.copy_(estimator.high)
            self.observed_step.copy_(self.step)
        return True

    def _observe(self, x: Tensor) -> None:
        """Take a tensor into account while calibrating, if it has a finite value."""
        low = functional.minmax(x)[0]
        if not low.isfinite():  # minmax looks at finite values alone
            return
        if not self._estimators:
            self._take_shape(x)
            # Where the data decide the sign, both are estimated until a negative value rules one out.
            signs = (False, True) if self._sign_from_data else (self.codes[0] < 0,)
            self._estimators = {signed: self._estimator(signed) for signed in signs}
        if self._sign_from_data and low < 0:
            self._estimators.pop(False, None)
        for estimator in self._estimators.values():
            estimator.observe(x)

    def _estimator(self, signed: bool) -> ranges.Estimator:
        codes = code_range(self._bits, signed, self.restricted)
        grid = ranges.GridSpec(self.axis, self.group_size, *codes, self.symmetric)
        return ranges.estimator(self.range, grid, momentum=self.momentum, percentile=self.percentile)

    def _take_shape(self, x: Tensor) -> None:
        self.materialize(checks.scale_shape(x, checks.normalized_axis(x, self.axis), self.group_size), x.device)

    def _initialize(self, x: Tensor) -> None:
        """Set the range from the first tensor that has a finite value other than 0: zeros say nothing of the scale."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "FakeQuant: wanted an initialized range before compilation; got the first tensor inside a compiled "
                "forward. Call the module once eagerly, or fastqat.calibrate(model, batches); a weight of zeros has a "
                "range after the first step that changes it, or by set_grid."
            )
        if not x.numel():
            return
        self._take_shape(x)
        extremes = torch.stack(functional.minmax(x))
        if not (extremes.isfinite() & (extremes != 0)).any():
            return
        self.begin_calibration()
        self._observe(x)
        self.end_calibration()

    @torch.no_grad()
    def _follow(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Grid of the data so far, for the ranges that follow it: device operations only.

        Time is an optimizer step: a quantizer that follows a weight takes the first tensor of a step, so that a forward
        that is computed again sees the same range. Returns new tensors; what earlier forwards saved stays as it was.
        """
        low, high = functional.minmax(x.detach(), axis=self.axis, group_size=self.group_size)
        momentum = self.momentum if self.range == "running_minmax" else 0.0
        low = ranges.moving_average(self.range_low, low, momentum)
        high = ranges.moving_average(self.range_high, high, momentum)
        if self.tracked:
            fresh = self.step > self.observed_step
            low, high = torch.where(fresh, low, self.range_low), torch.where(fresh, high, self.range_high)
        qmin, qmax = self.qrange.unbind()
        scale, zero_point = ranges.grid_from_range(low, high, qmin, qmax, self.symmetric)
        for kept, new in (
            (self.range_low, low),
            (self.range_high, high),
            (self.observed_step, self.step),
            (self.scale, scale),
            (self.zero_point, zero_point),
        ):
            if kept is not None:
                kept.copy_(new)
        return scale, zero_point if self.zero_point is not None else None
