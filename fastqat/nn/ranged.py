"""How a quantizer comes to its range: given, estimated from tensors that it sees, or following them while training."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastqat import functional, ranges
from fastqat.nn.copied import refuse_copy
from fastqat.nn.following import FollowingRange
from fastqat.nn.growing import Growth
from fastqat.nn.sharded import write_parameter
from fastqat.nn.spec import code_range
from fastqat.ops import checks


class ObservedRange(NamedTuple):
    """What calibration found: whether codes are signed, the grid, and the range itself where it is followed."""

    signed: bool
    scale: Tensor
    zero_point: Tensor
    bounds: tuple[Tensor, Tensor] | None


class RangedQuantizer(FollowingRange):
    """Base of :class:`fastqat.FakeQuant`: the parameters of its grid, and what sets them."""

    offset: nn.Parameter | None
    growth: Growth | None
    layer_name: str | None
    _warned_of_no_range: bool
    _bits: int
    signed: bool | None
    symmetric: bool
    restricted: bool
    count_from: str
    fixed_range: tuple[float, float] | None
    _sign_from_data: bool
    percentile: float
    normalize: str | None
    rescale: str | None

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.initialized = False
        self._estimators: dict[bool, ranges.Estimator] = {}  # signed -> of its codes, while calibrating
        self._calibrating = self._once = False
        self._warned_of_no_range = False
        self.growth = None
        self.growing = False  # True while the range follows a weight that began at zero
        self._began_at_zero = False  # True where a weight was seen that is zero all over, and nothing else since

    @property
    def codes(self) -> tuple[int, int]:
        """qmin and qmax."""
        return self.codes_at(self._bits)

    def codes_at(self, bits: int) -> tuple[int, int]:
        """qmin and qmax of another bit-width."""
        low, high = self._levels_at(bits)
        return (0, high - low) if self.count_from == "lowest" else (low, high)

    @property
    def _levels(self) -> tuple[int, int]:
        """qmin and qmax where codes count from 0."""
        return self._levels_at(self._bits)

    def _levels_at(self, bits: int) -> tuple[int, int]:
        signed = (self.symmetric or self.restricted) if self.signed is None else self.signed
        return code_range(bits, signed, self.restricted)

    @property
    def is_on_offset_grid(self) -> bool:
        """True if codes count from an offset: a parameter, or the lowest value of the grid."""
        return self.offset is not None or self.count_from == "lowest"

    @property
    def grid_kind(self) -> str:
        """What a reader is told of the grid."""
        if self.normalize == "tanh":
            return f"SAT, {self.rescale}" if self.rescale else "DoReFa"
        if self.count_from == "lowest":
            return "symmetric from the lowest"
        return "offset" if self.offset is not None else "symmetric" if self.symmetric else "affine"

    def grid_offset(self) -> Tensor | None:
        """The offset of the grid, float32 like the scale, with its gradient; None on the zero-point grid.

        Where codes count from the lowest value of the grid, that is -q * max(scale, eps), with 2q the highest code: the
        offset passes its gradient on to the scale.
        """
        if self.count_from == "zero":
            return self.offset
        # A scale below its floor keeps its gradient, as it does in the kernels.
        scale = torch.where(self.scale < self.eps, self.scale - self.scale.detach() + self.eps, self.scale)
        return scale * (self.qrange[1] * -0.5)

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
                nn.init.constant_(p, torch.nan if name == "scale" else 0.0)  # NaN: there is no range
                self.note_placeholder()
        self._make_range(shape, device)

    def has_given_range(self) -> bool:
        """True for range="fixed"."""
        return self.range == "fixed"

    def _set_fixed(self, scale: Tensor | None, zero_point: Tensor | None) -> None:
        if self.fixed_range is not None:
            if scale is not None or zero_point is not None:
                checks.fail(ValueError, "scale, zero_point", "none beside fixed_range", "values")
            if self._sign_from_data:
                self.signed = self.fixed_range[0] < 0
                self._write_codes()
            low, high = torch.tensor(self.fixed_range, dtype=torch.float32, device=self.qrange.device).view(2, 1)
            self.set_grid(*ranges.grid_from_range(low, high, *self._levels, self.symmetric))
        elif not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.dim() < 1:
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
        write_parameter(self.scale, scale)
        if self.zero_point is not None and zero_point is not None:
            write_parameter(self.zero_point, zero_point)
        if self.offset is not None and zero_point is not None:
            write_parameter(self.offset, -scale * zero_point)
        if self.range_low is not None:
            self._begin_range(*self._bounds_of(scale, zero_point))
        self.initialized = True
        if self.growth is not None:  # a range by hand, or of a calibration, is the user's
            self.growing = False
            self.growth.growing.zero_()

    def _bounds_of(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """The range that this grid is made of, from which a range that follows the data goes on."""
        qmin, qmax = self.codes
        if self.symmetric or zero_point is None:
            high = scale * max(qmax, 1)  # signed codes of 1 bit are -1 and 0
            return (-high if qmin < 0 else torch.zeros_like(high)), high
        return scale * (qmin - zero_point), scale * (qmax - zero_point)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the range by hand from its bounds, as tensors with these extreme values would under range="minmax".

        Args:
            low, high: float32 of the shape of ``self.scale``; a negative one makes the codes signed where the data
                decide.

        Raises:
            ValueError: wrong shape.
        """
        signed = bool((low < 0).any()) if self._sign_from_data else self._levels[0] < 0
        bounds = ranges.MinMax(self._grid_spec(signed))
        bounds.low, bounds.high = low, high
        self._estimators = {signed: bounds}
        self.end_calibration()

    def begin_calibration(self, once: bool = False) -> None:
        """From now on every forward only observes, until :meth:`end_calibration` sets the range.

        Args:
            once: it will observe one tensor alone.
        """
        self._calibrating, self._estimators, self._once = True, {}, once

    def end_calibration(self, across_processes: bool = False) -> bool:
        """Set the range from what was observed; False if no finite value was.

        Args:
            across_processes: in this process and all others, each of which does the same.
        """
        estimators = self.stop_calibration()
        if across_processes:
            estimators = ranges.joined(estimators, self.qrange.device)
        observed = self.observed_range(estimators)
        if observed is not None:
            self.take_range(observed)
        return observed is not None

    def stop_calibration(self) -> dict[bool, ranges.Estimator]:
        """Observe no more, and return what was observed, by the sign of the codes; the range stays as it is."""
        estimators, self._calibrating, self._estimators = self._estimators, False, {}
        return estimators

    def observed_range(self, estimators: dict[bool, ranges.Estimator]) -> ObservedRange | None:
        """The range that estimators found; None if they saw no finite value.

        Args:
            estimators: of :meth:`stop_calibration`.

        Raises:
            ValueError: it has a scale that is not positive and finite.
        """
        if not estimators:
            return None
        signed, estimator = next(iter(estimators.items()))
        scale, zero_point = estimator.grid()
        checks.positive("scale", scale)
        bounds = None
        if isinstance(estimator, ranges.MinMax) and self.range_low is not None:
            bounds = estimator.bounds()
        return ObservedRange(signed, scale, zero_point, bounds)

    def take_range(self, observed: ObservedRange) -> None:
        """Set the range to one that was observed."""
        if self._sign_from_data:
            self.signed = observed.signed
            self._write_codes()
        self.set_grid(observed.scale, observed.zero_point)
        if observed.bounds is not None:
            self._begin_range(*observed.bounds)

    def _observe(self, x: Tensor) -> None:
        """Take a tensor into account while calibrating, if it has a finite value."""
        low = functional.minmax(x)[0]
        if not low.isfinite():  # minmax looks at finite values alone
            return
        if not self._estimators:
            self._take_shape(x)
            # Where the data decide the sign, both are estimated until a negative value rules one out.
            signs = (False, True) if self._sign_from_data else (self._levels[0] < 0,)
            self._estimators = {signed: self._estimator(signed) for signed in signs}
        if self._sign_from_data and low < 0:
            self._estimators.pop(False, None)
        for estimator in self._estimators.values():
            estimator.observe(x)

    def _estimator(self, signed: bool) -> ranges.Estimator:
        name = "running_minmax" if self.range == "in_hindsight" else self.range
        spec = self._grid_spec(signed)
        return ranges.estimator(name, spec, momentum=self.momentum, percentile=self.percentile, once=self._once)

    def _grid_spec(self, signed: bool) -> ranges.GridSpec:
        codes = code_range(self._bits, signed, self.restricted)
        return ranges.GridSpec(self.axis, self.group_size, *codes, self.symmetric)

    def _take_shape(self, x: Tensor) -> None:
        self.materialize(checks.scale_shape(x, checks.normalized_axis(x, self.axis), self.group_size), x.device)

    def _initialize(self, x: Tensor, of_weight: bool = False) -> None:
        """Set the range from the first tensor that has a finite value other than 0: zeros say nothing of the scale.

        Args:
            x: the tensor.
            of_weight: what is zero now in a weight is learned later: its range grows until it has settled.
        """
        if not torch.compiler.is_compiling() and self._adopt():
            return
        if self.range == "in_hindsight" and not self.training:
            self._refuse_written()
            self._warn_of_no_range()
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "FakeQuant: wanted an initialized range before compilation; got the first tensor inside a compiled "
                "forward. Call the module once eagerly, or fastqat.calibrate(model, batches); a weight of zeros has a "
                "range after the first step that changes it, or by set_grid."
            )
        if not (x.numel() or self.sync_range):  # where others wait, one that has nothing still answers
            return
        self._take_shape(x)
        low, high = self.merge_ranks(*functional.minmax(x))
        extremes = torch.stack([low, high])
        if not (extremes.isfinite() & (extremes != 0)).any():
            self._began_at_zero = of_weight
            if of_weight and self.range_low is None:
                self._wait_for_growth()
            return
        if not self.training:
            self._refuse_written()
        self.begin_calibration(once=True)
        self._observe(extremes if self.sync_range else x)
        self.end_calibration()
        if of_weight and self.range_low is None:
            self._begin_growth(x)

    @torch.no_grad()
    def _begin_growth(self, x: Tensor) -> None:
        """From now on let the range of the channels grow that are zero, or were; x is the weight."""
        low, high = self._extremes(x)
        was_zero = (low == 0) & (high == 0)
        if self._began_at_zero:
            was_zero.fill_(True)
            if self._sign_from_data and not self.signed:  # a first update is not all that the weight will be
                self.signed = True
                self._write_codes()
        self._began_at_zero = False
        if bool(was_zero.any()):
            self._wait_for_growth().growing.copy_(was_zero)
            self.growing = True
            self._grow(x)

    def _wait_for_growth(self) -> Growth:
        """The state of growth, from when zeros are seen: what averages models pairs their tensors by order."""
        if self.growth is None:
            self.growth = Growth(tuple(self.scale.shape), self.scale.device)
            self.growth.growing.fill_(True)
        return self.growth

    def _grow(self, x: Tensor) -> None:
        """Give the growing channels the range of the weight x."""
        if self.growth is not None and not torch._C._are_functorch_transforms_active():
            self.growth.observe(*self._extremes(x))
            self.growth.write(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        growing = state_dict.get(prefix + "growth.growing")
        if growing is not None and self.growth is None:
            self.growth = Growth(tuple(growing.shape), self.qrange.device)
        super()._load_from_state_dict(state_dict, prefix, *others)
        if prefix + "scale" in state_dict:  # a network without growth has none to go on with
            grows = growing is not None and bool(growing.any())
            self.growing, self._began_at_zero = grows and self.initialized, grows and not self.initialized
            if growing is None and self.growth is not None:
                self.growth.growing.zero_()
        elif not self.initialized:
            self._began_at_zero = False  # the weight may be another one

    def _adopt(self) -> bool:
        """Take a range that something else has written into the scale, as a load would; True if there is one."""
        scale = self._scale_of_state()
        if scale is None or scale.is_meta or is_in_torch_dispatch_mode() or bool(scale.isnan().all()):
            return False
        if not bool(((scale > 0) & scale.isfinite()).all()):
            refuse_copy(self, "scale", "positive, finite values", "others: some were averaged before they were known")
        qmin, qmax = self.qrange.tolist()
        if (qmax - qmin + 1).bit_length() - (not self.restricted) != self._bits:
            refuse_copy(self, "qrange", f"codes of {self._bits} bits", f"{qmin} to {qmax}")
        self.restore_codes()
        self.initialized = True
        return True

    def _refuse_written(self) -> None:
        """Refuse to set a range in the place of one that was averaged away."""
        if not torch.compiler.is_compiling() and self.was_written():
            refuse_copy(self, "scale", "a range", "NaN: it was averaged with one that was not known yet")

    def _warn_of_no_range(self) -> None:
        if not self._warned_of_no_range:
            self._warned_of_no_range = True
            warnings.warn(
                f"quantizer of layer {self.layer_name or '?'!r}: wanted a range before evaluation; got none: it has "
                "seen no tensor in training, and range='in_hindsight' takes none from evaluation: its tensors stay as "
                "they are. Train a step, or call fastqat.calibrate(model, batches)",
                stacklevel=4,
            )
