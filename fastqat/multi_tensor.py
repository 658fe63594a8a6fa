"""Fake quantization of many tensors in one call, with oscillation tracking, estimators and dampening.

A weight with any of these takes this way even alone; all weights of a model take it together, see
:func:`fastqat.quantize_weights_together`. The results of one call are those of many, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastqat.autograd import as_rows, flat, from_rows
from fastqat.ops import select  # noqa: F401  (importing it registers the ops)
from fastqat.ops.estimators import STE, STOCHASTIC

_ops = torch.ops.fastqat


class Options(NamedTuple):
    """The constants of one tensor's quantization; see :func:`fastqat.functional.fake_quantize` for the first six."""

    axis: int | None = None
    group_size: int | None = None
    eps: float = 1e-8
    rounded_mask: bool = True
    lsq: bool = False
    factor: float | None = None
    out_dtype: torch.dtype | None = None
    estimator: int = STE
    seed: int = 0
    tensor_id: int = -1  # >= 0: rounds stochastically in training
    momentum: float = 0.0  # 0: not tracked
    use_average: bool = True


class Operands(NamedTuple):
    """The tensors of one tensor's quantization; None where there is none."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    qrange: Tensor  # int32 [2]
    step: Tensor  # int64 [1]
    strength: Tensor | None = None  # float32 [1], of the estimator
    dampening: Tensor | None = None  # float32 [1], see the schema
    threshold: Tensor | None = None  # float32 [1]
    words: Tensor | None = None  # the five tensors of the state, where the momentum is not 0
    scaled_frequency: Tensor | None = None
    scaled_average: Tensor | None = None
    counts: Tensor | None = None
    clock: Tensor | None = None


STATE = ("words", "scaled_frequency", "scaled_average", "counts", "clock")
Item = tuple[Operands, Options]


def _of_evaluation(o: Options) -> Options:
    """Evaluation rounds to nearest."""
    return o._replace(tensor_id=-1, estimator=STE if o.estimator == STOCHASTIC else o.estimator)


def _rows(tensor: Tensor | None, options: Options, none: Tensor) -> Tensor:
    return none if tensor is None else as_rows(tensor, options.axis, options.group_size)[0]


def _or(tensor: Tensor | None, none: Tensor) -> Tensor:
    return none if tensor is None else flat(tensor)


def _grids(items: Sequence[Item], none: Tensor) -> tuple[Any, ...]:
    """The lists that describe the grids."""
    axes = [-1 if o.axis is None else 0 if o.group_size is not None else o.axis for _, o in items]
    return (
        [flat(p.scale) for p, _ in items],
        [_or(p.zero_point, none) for p, _ in items],
        [_or(p.offset, none) for p, _ in items],
        [p.qrange for p, _ in items],
        axes,
        [o.eps for _, o in items],
    )


def _noise(items: Sequence[Item]) -> tuple[Any, ...]:
    """The lists that describe stochastic rounding."""
    return [o.seed for _, o in items], [o.tensor_id for _, o in items], [p.step for p, _ in items]


def _quantized(items: Sequence[Item], advance: bool) -> tuple[Tensor, ...]:
    """The quantized tensors; moves the state on in training."""
    if not advance:
        items = [(p, _of_evaluation(o)) for p, o in items]
    none = items[0][0].x.new_empty(0, dtype=torch.float32)
    xs = [_rows(p.x, o, none) for p, o in items]
    ys = [torch.empty_like(x, dtype=o.out_dtype or x.dtype) for x, (_, o) in zip(xs, items, strict=True)]
    state = {name: [_rows(getattr(p, name), o, none) for p, o in items] for name in STATE[:3]}
    _ops.multi_tensor_fake_quantize(
        xs,
        *_grids(items, none),
        *_noise(items),
        [o.momentum for _, o in items],
        [int(o.use_average) for _, o in items],
        [_or(p.threshold, none) for p, _ in items],
        advance,
        *state.values(),
        [_or(p.counts, none) for p, _ in items],
        [_or(p.clock, none) for p, _ in items],
        ys,
    )
    if advance:
        _write_back(items, state)
    return tuple(from_rows(y, p.x, o.axis, o.group_size) for y, (p, o) in zip(ys, items, strict=True))


def _write_back(items: Sequence[Item], state: dict[str, list[Tensor]]) -> None:
    """Return the state of groups that are no view of it, as in a channels-last weight."""
    for name, rows in state.items():
        for (p, o), row in zip(items, rows, strict=True):
            kept = getattr(p, name)
            is_view = o.group_size is None or (o.axis == 0 and kept is not None and kept.is_contiguous())
            if kept is not None and not is_view:
                kept.copy_(from_rows(row, kept, o.axis, o.group_size))


def _gradients(items: Sequence[Item], gs: Sequence[Tensor], learned: Sequence[bool]) -> list[tuple[Any, ...]]:
    """(dx, dscale, dzero_point, doffset) of each tensor."""
    none = items[0][0].x.new_empty(0, dtype=torch.float32)
    xs = [_rows(p.x, o, none) for p, o in items]
    dxs = [torch.empty_like(x) for x in xs]
    dscales = [
        torch.empty_like(flat(p.scale)) if wanted else none for (p, _), wanted in zip(items, learned, strict=True)
    ]
    shifts = [p.zero_point if p.offset is None else p.offset for p, _ in items]
    dshifts = [
        none if shift is None or not wanted else torch.empty_like(flat(shift))
        for shift, wanted in zip(shifts, learned, strict=True)
    ]
    _ops.multi_tensor_fake_quantize_backward(
        [_rows(g, o, none) for g, (_, o) in zip(gs, items, strict=True)],
        xs,
        *_grids(items, none),
        *_noise(items),
        [int(o.rounded_mask) for _, o in items],
        [int(o.lsq) for _, o in items],
        [o.estimator for _, o in items],
        [_or(p.strength, none) for p, _ in items],
        [_or(p.dampening, none) for p, _ in items],
        [_rows(p.words, o, none) for p, o in items],
        dxs,
        dscales,
        dshifts,
    )
    return [
        _shaped(p, o, dx, dscale, dshift)
        for (p, o), dx, dscale, dshift in zip(items, dxs, dscales, dshifts, strict=True)
    ]


def _shaped(p: Operands, o: Options, dx: Tensor, dscale: Tensor, dshift: Tensor) -> tuple[Any, ...]:
    """Gradients in the shapes of what they belong to, times the factor of the grid's parameters."""

    def of(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
        if parameter is None or not gradient.numel():
            return None
        return (gradient if o.factor is None else gradient * o.factor).view(parameter.shape)

    dx = from_rows(dx, p.x, o.axis, o.group_size)
    return dx, of(dscale, p.scale), of(dshift, p.zero_point), of(dshift, p.offset)


class _MultiTensorFakeQuantize(torch.autograd.Function):
    """Saves its inputs, and nothing that is not alive elsewhere."""

    @staticmethod
    def forward(ctx, advance, options, *tensors):
        items = _items(options, tensors)
        ctx.options = options if advance else tuple(_of_evaluation(o) for o in options)
        ctx.set_materialize_grads(False)
        # The state changes in place from step to step: what backward reads of it says which weights were frozen then.
        ctx.state = [tuple(getattr(p, name) for name in STATE) for p, _ in items]
        ctx.save_for_backward(*(t for p, _ in items for t in p[: -len(STATE)]))
        return _quantized(items, advance)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs):
        saved, count = ctx.saved_tensors, len(Operands._fields)
        tensors: list[Any] = []
        for i, state in enumerate(ctx.state):
            width = count - len(STATE)
            tensors += [*saved[i * width : (i + 1) * width], *state]
        items = _items(ctx.options, tensors)
        needed = [i for i, g in enumerate(gs) if g is not None]
        results: list[Any] = [None] * len(tensors)
        if needed:
            # ctx.needs_input_grad counts (advance, options) too.
            learned = [any(ctx.needs_input_grad[2 + i * count + 1 : 2 + i * count + 4]) for i in needed]
            found = _gradients([items[i] for i in needed], [gs[i] for i in needed], learned)
            for i, gradients in zip(needed, found, strict=True):
                results[i * count : i * count + 4] = gradients
        return (None, None, *results)


def _items(options: Sequence[Options], tensors: Sequence[Any]) -> list[Item]:
    count = len(Operands._fields)
    return [(Operands(*tensors[i * count : (i + 1) * count]), o) for i, o in enumerate(options)]


def apply_multi_tensor(items: Sequence[Item], advance: bool) -> tuple[Tensor, ...]:
    """Differentiable fake quantization of checked tensors.

    Args:
        items: the tensors of each quantization, and its constants.
        advance: whether this is training: the state of tracking moves on, and stochastic rounding is stochastic.
    """
    tensors = [t for operands, _ in items for t in operands]
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for operands, _ in items for t in operands[:4]
    )
    if torch.compiler.is_compiling() or differentiable:
        return _MultiTensorFakeQuantize.apply(advance, tuple(o for _, o in items), *tensors)
    return _quantized(items, advance)
