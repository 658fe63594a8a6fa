"""Fake quantization of many tensors in one call, with oscillation tracking, estimators and dampening.

A weight with any of these takes this way even alone; all weights of a model take it together, see
:func:`fastqat.quantize_weights_together`. The results of one call are those of many, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastqat.autograd import apply_plainly, as_rows, flat, from_rows
from fastqat.ops import select  # noqa: F401  (importing it registers the ops)
from fastqat.ops.estimators import STE, STOCHASTIC

_ops = torch.ops.fastqat

STATE = ("words", "scaled_frequency", "scaled_average", "counts", "clock")


class Constants(NamedTuple):
    """What stays of one tensor's quantization from step to step; see :func:`fastqat.functional.fake_quantize`."""

    qrange: Tensor  # int32 [2]
    step: Tensor  # int64 [1], counted in place
    axis: int | None = None
    group_size: int | None = None
    eps: float = 1e-8
    rounded_mask: bool = True
    lsq: bool = False
    factor: float | None = None
    out_dtype: torch.dtype | None = None
    offset_grid: bool = False  # what shifts the grid is an offset, not a zero point
    estimator: int = STE
    strength: Tensor | None = None  # float32 [1], of the estimator
    seed: int = 0
    tensor_id: int = -1  # >= 0: rounds stochastically in training
    momentum: float = 0.0  # 0: not tracked
    use_average: bool = True
    state: tuple[Tensor | None, ...] = (None,) * len(STATE)  # where the momentum is not 0


class Plan:
    """The quantizations of one call, as the lists that the ops take: made once for as many steps as nothing changes.

    It keeps no view of a tensor, whose memory may be replaced, and nothing that is new in each step.

    Args:
        constants: of each quantization.
        device: of all tensors.
        advance: whether this is training: the state of tracking moves on, and stochastic rounding is stochastic.
    """

    def __init__(self, constants: Sequence[Constants], device: torch.device, advance: bool) -> None:
        self.constants, self.device, self.advance = constants, device, advance
        self.none = none = torch.empty(0, dtype=torch.float32, device=device)
        # (index, axis, group_size) of the tensors that become rows, and of the states that do
        self.groups = [(i, c.axis, c.group_size) for i, c in enumerate(constants) if c.group_size is not None]
        self.state_groups = [g for g in self.groups if constants[g[0]].state[0] is not None]
        self.dtypes = [c.out_dtype for c in constants]
        self.factors = [c.factor for c in constants]
        self.offset_grids = [c.offset_grid for c in constants]
        self.qranges = [c.qrange for c in constants]
        self.axes = [-1 if c.axis is None else 0 if c.group_size is not None else c.axis for c in constants]
        self.eps = [c.eps for c in constants]
        # Evaluation rounds to nearest.
        ids = [c.tensor_id if advance else -1 for c in constants]
        estimators = [STE if c.estimator == STOCHASTIC and not advance else c.estimator for c in constants]
        steps = [c.step for c in constants]
        strengths = [none if c.strength is None else c.strength for c in constants]
        self.noise = ([c.seed for c in constants], ids, steps)
        self.tracking = ([c.momentum for c in constants], [int(c.use_average) for c in constants])
        self.state = [[none if t is None else t for t in [c.state[k] for c in constants]] for k in range(len(STATE))]
        masks, lsq = [int(c.rounded_mask) for c in constants], [int(c.lsq) for c in constants]
        self.estimation = (masks, lsq, estimators, strengths)
        # What backward reads beside the operands, and what must not have changed until then.
        self.watched = [*self.qranges, *steps, *(c.strength for c in constants if c.strength is not None)]

    def _rows(self, column: Sequence[Tensor], groups: Sequence[Any]) -> Sequence[Tensor]:
        if not groups:
            return column
        rows = list(column)
        for i, axis, size in groups:
            rows[i] = as_rows(column[i], axis, size)[0]
        return rows

    def _from_rows(self, rows: list[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
        for i, axis, size in self.groups:
            rows[i] = from_rows(rows[i], likes[i], axis, size)
        return rows

    def _grids(self, scales: Sequence[Tensor], shifts: Sequence[Tensor | None]) -> tuple[Sequence[Any], ...]:
        """The lists that describe the grids."""
        zero_points = offsets = [self.none] * len(scales)
        if any(s is not None for s in shifts):
            pairs = list(zip(shifts, self.offset_grids, strict=True))
            zero_points = [self.none if s is None or is_offset else s for s, is_offset in pairs]
            offsets = [s if s is not None and is_offset else self.none for s, is_offset in pairs]
        return scales, zero_points, offsets, self.qranges, self.axes, self.eps

    def _flat(self, parameters: Sequence[Tensor | None]) -> Sequence[Any]:
        """Parameters of grids as one value per row or channel."""
        return [flat(p) for p in parameters] if self.groups else parameters

    def quantized(
        self,
        xs: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor | None],
        thresholds: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """The quantized tensors; moves the state on in training. See :func:`apply_multi_tensor`."""
        rows = self._rows(xs, self.groups)
        ys = [
            torch.empty_like(x) if dtype is None else torch.empty_like(x, dtype=dtype)
            for x, dtype in zip(rows, self.dtypes, strict=True)
        ]
        state = [self._rows(column, self.state_groups) for column in self.state[:3]]
        _ops.multi_tensor_fake_quantize(
            rows,
            *self._grids(self._flat(scales), self._flat(shifts)),
            *self.noise,
            *self.tracking,
            thresholds,
            self.advance,
            *state,
            *self.state[3:],
            ys,
        )
        if self.advance:
            self._write_back(state)
        return tuple(self._from_rows(ys, xs))

    def _write_back(self, state: Sequence[Sequence[Tensor]]) -> None:
        """Return the state of groups that are no view of it, as in a channels-last weight."""
        for column, rows in zip(self.state, state, strict=False):
            for i, axis, size in self.state_groups:
                if axis != 0 or not column[i].is_contiguous():
                    column[i].copy_(from_rows(rows[i], column[i], axis, size))

    def gradients(
        self,
        gs: Sequence[Tensor],
        xs: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor | None],
        dampenings: Sequence[Tensor],
        learned: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], ...]:
        """The gradients of xs, and of the scales and shifts that are learned."""
        none, rows = self.none, self._rows(xs, self.groups)
        grids = self._grids(self._flat(scales), self._flat(shifts))
        dxs = [torch.empty_like(x) for x in rows]
        dscales = [torch.empty_like(s) if wanted else none for s, wanted in zip(grids[0], learned, strict=True)]
        dshifts = [
            torch.empty_like(s) if wanted and s is not None else none
            for s, wanted in zip(self._flat(shifts), learned, strict=True)
        ]
        _ops.multi_tensor_fake_quantize_backward(
            self._rows(gs, self.groups),
            rows,
            *grids,
            *self.noise,
            *self.estimation,
            dampenings,
            self._rows(self.state[0], self.state_groups),
            dxs,
            dscales,
            dshifts,
        )
        return self._from_rows(dxs, xs), self._shaped(dscales, scales, learned), self._shaped(dshifts, shifts, learned)

    def _shaped(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor | None], learned: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the grids' parameters in their shapes, times the factor."""
        shaped: list[Tensor | None] = [
            None if p is None or not wanted else g if factor is None else g * factor
            for g, p, wanted, factor in zip(gradients, parameters, learned, self.factors, strict=True)
        ]
        for i, *_ in self.groups:
            g, p = shaped[i], parameters[i]
            shaped[i] = None if g is None or p is None else g.view(p.shape)
        return shaped

    def part(self, places: Sequence[int]) -> Plan:
        """The same for some of the quantizations."""
        return Plan([self.constants[i] for i in places], self.device, self.advance)


class _MultiTensorFakeQuantize(torch.autograd.Function):
    """Saves its inputs, and nothing that is not alive elsewhere."""

    @staticmethod
    def forward(ctx, plan, thresholds, dampenings, *operands):
        count = len(plan.constants)
        # The state changes in place from step to step: what backward reads of it says which weights were frozen then.
        ctx.plan, ctx.dampenings = plan, dampenings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *plan.watched)
        return plan.quantized(operands[:count], operands[count : 2 * count], operands[2 * count :], thresholds)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs):
        plan, saved, count = ctx.plan, ctx.saved_tensors, len(gs)
        xs, scales, shifts = saved[:count], saved[count : 2 * count], saved[2 * count : 3 * count]
        # ctx.needs_input_grad counts (plan, thresholds, dampenings) too.
        needs = ctx.needs_input_grad[3 + count :]
        learned = [a or b for a, b in zip(needs[:count], needs[count:], strict=True)]
        columns = (gs, xs, scales, shifts, ctx.dampenings, learned)
        needed = [i for i, g in enumerate(gs) if g is not None]
        if len(needed) == count:
            return (None, None, None, *chain(*plan.gradients(*columns)))
        results: list[Any] = [None] * (3 * count)
        if needed:
            found = plan.part(needed).gradients(*([column[i] for i in needed] for column in columns))
            for k, gradients in enumerate(found):
                for i, gradient in zip(needed, gradients, strict=True):
                    results[k * count + i] = gradient
        return (None, None, None, *results)


def apply_multi_tensor(
    plan: Plan,
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    dampenings: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Differentiable fake quantization of checked tensors.

    Args:
        plan: what stays from step to step.
        xs: what is quantized.
        scales: of each, of the shape that its axis and group_size want.
        shifts: zero point or offset of each, or None.
        thresholds: float32 [1], beyond which the frequency of each freezes; empty where it is not tracked.
        dampenings: float32 [1], see the schema; empty where there is none.
    """
    operands = (*xs, *scales, *shifts)
    if torch.compiler.is_compiling():
        return _MultiTensorFakeQuantize.apply(plan, thresholds, dampenings, *operands)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return apply_plainly(_MultiTensorFakeQuantize, (plan, thresholds, dampenings, *operands))
    return plan.quantized(xs, scales, shifts, thresholds)
