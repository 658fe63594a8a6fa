"""The bit-width of a quantizer: what changes with it, and the grid that another one has."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastqat import multi_tensor, ranges
from fastqat.nn.copied import versions
from fastqat.nn.ranged import RangedQuantizer
from fastqat.nn.tracking import Oscillation, Tracker
from fastqat.ops import checks


class GridValues(NamedTuple):
    """Tensors that say what the grid of a quantizer is, of the shapes that they have there."""

    qrange: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None


def _copied(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.detach().clone()


class SizedQuantizer(RangedQuantizer):
    """Base of :class:`fastqat.FakeQuant`: its bit-width, as a number here and as codes on the device."""

    oscillation: Oscillation | None
    tracker: Tracker | None
    fake_quant_enabled: bool

    @property
    def bits(self) -> int:
        """Bit-width. Setting it changes the codes in place and keeps the scale; nothing is compiled anew.

        The grid of DoReFa has no scale of its own: there it is :meth:`change_bits`.

        What was tracked of oscillations says nothing of other codes: it is forgotten, with a warning.
        """
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        checks.bit_width(bits, lowest=self.fewest_bits)
        if bits != self._bits and self.tracker is not None and self.tracker.has_tracked:
            warnings.warn(
                f"FakeQuant.bits: {self._bits} becomes {bits}; what was tracked of oscillations is reset, frozen "
                "weights are free again",
                stacklevel=2,
            )
        if self.normalize == "tanh":
            self.change_bits(bits)
        else:
            self._set_bits(bits)

    def change_bits(self, bits: int) -> None:
        """Set the bit-width in place and keep the range, as far as the grid allows, see :meth:`grid_at`.

        What was tracked of oscillations says nothing of other codes: it is forgotten.

        Args:
            bits: 1 to 8; from 2 on where the grid is restricted, or that of DoReFa or TRS.

        Raises:
            ValueError: another number.
        """
        checks.bit_width(bits, lowest=self.fewest_bits)
        if bits != self._bits:
            grid = self.grid_at(bits) if self.initialized else None
            self._set_bits(bits)
            if grid is not None:
                self.write_grid(grid)

    @property
    def fewest_bits(self) -> int:
        """The lowest bit-width that its grid may have."""
        return 2 if self.restricted or self.normalize is not None else 1

    def _set_bits(self, bits: int) -> None:
        changed, self._bits = bits != self._bits, bits
        self._write_codes()
        if changed:
            self._make_tracker()

    def follow(self, other: SizedQuantizer) -> None:
        """Be of the bit-width, sign and state of another quantizer with the same options; tensors are not copied."""
        if self._bits != other._bits:
            self._set_bits(other._bits)
        if other.tracker is None:
            self.tracker = None
        elif self.tracker is not None:
            self.tracker.lowest = other.tracker.lowest
        self.signed, self.eps, self.initialized = other.signed, other.eps, other.initialized
        self.fake_quant_enabled = other.fake_quant_enabled
        self.growing = other.growing
        if other.growth is None:
            self.growth = None
        else:
            if self.growth is None:
                self.growth = copy.deepcopy(other.growth).to(self.qrange.device)
            self.growth.count_from(other.growth)

    def _make_tracker(self) -> None:
        """A tracker without a past, or none, as options and bits say."""
        options = self.oscillation
        if options is None or self._bits > options.max_bits:
            self.tracker = None
        elif self.tracker is None:
            self.tracker = Tracker(options, self._bits, self.qrange.device)
        else:  # it knows the shape of the weight, which a compiled forward does not ask for
            self.tracker.reset(self._bits)

    def restore_codes(self) -> None:
        """Take the bit-width and the sign from the loaded qrange; ValueError where it is of another kind of grid."""
        qmin, qmax = self.qrange.tolist()
        before = self._bits, self.signed
        bits = (qmax - qmin + 1).bit_length() - (not self.restricted)
        signed = qmin < 0 if self._sign_from_data else self.signed
        self._bits, self.signed = bits, signed
        fits = 1 <= bits <= 8 and self.codes == (qmin, qmax)
        if not fits or bits < self.fewest_bits:
            self._bits, self.signed = before
            at_least = f"at least {self.fewest_bits} bits"
            wanted = at_least if fits else f"codes of signed={signed}, restricted={self.restricted}"
            checks.fail(ValueError, "qrange", wanted, f"{qmin} to {qmax}")
        if bits != before[0]:
            self._make_tracker()
        if self.tracker is not None:
            self.tracker.lowest = qmin

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *others: Any,
    ) -> None:
        left_out = self.is_left_out(state_dict, prefix, missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        if left_out or self.tracker is None or any(key.startswith(prefix + "tracker.") for key in state_dict):
            return
        if prefix + "eps" in state_dict and prefix + "scale" not in state_dict:  # it is kept under another name
            missing += [f"{prefix}tracker.{name}" for name in multi_tensor.STATE]
        else:  # of a network that was not tracked: tracking begins anew
            self.tracker.reset(self._bits)

    def scale_ratio(self, bits: int) -> float:
        """What keeps the range at another bit-width when the scale is multiplied by it, see :meth:`grid_at`."""
        (qmin, qmax), (low, high) = self.codes, self.codes_at(bits)
        return (qmax + 1) / (high + 1) if self.normalize == "range" else (qmax - qmin) / (high - low)

    @torch.no_grad()
    def grid_at(self, bits: int) -> GridValues:
        """The grid of another bit-width with the same range.

        A range that follows the data stays as it is. Else scale * (qmax - qmin) stays, and the lowest value where there
        is a zero point or an offset; of results in units of scale * (qmax + 1), that.

        Args:
            bits: 1 to 8.

        Returns:
            new tensors; those of the present grid where it is its own bit-width.
        """
        (qmin, qmax), (low, high) = self.codes, self.codes_at(bits)
        grid = GridValues(
            self.qrange.clone(), self.scale.detach().clone(), *map(_copied, (self.zero_point, self.offset))
        )
        if (qmin, qmax) == (low, high):
            return grid
        grid.qrange.copy_(torch.tensor((low, high), dtype=torch.int32, device=self.qrange.device))
        if self.range_low is not None:
            scale, zero_point = ranges.grid_from_range(self.range_low, self.range_high, low, high, self.symmetric)
            return GridValues(grid.qrange, scale, None if grid.zero_point is None else zero_point, grid.offset)
        ratio = self.scale_ratio(bits)
        grid.scale.mul_(ratio)
        if grid.zero_point is not None:
            grid.zero_point.sub_(qmin).div_(ratio).add_(low)
        if grid.offset is not None:
            grid.offset.add_(self.scale * qmin - grid.scale * low)
        return grid

    @torch.no_grad()
    def write_grid(self, grid: GridValues) -> None:
        """Write the values of a grid, in place; the bit-width that :attr:`bits` says stays."""
        for name, values in grid._asdict().items():
            if values is not None:
                getattr(self, name).copy_(values)
        self.note_checked(versions(self))  # other codes than the bit-width says are meant
