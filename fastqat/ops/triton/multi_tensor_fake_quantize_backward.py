"""multi_tensor_fake_quantize_backward: gradients of many tensors, each from one pass over (g, x, words)."""

from __future__ import annotations

from fastqat.ops.estimators import PACT, STE, STOCHASTIC
from fastqat.ops.triton.fake_quantize_backward import Modes, Rule, write_gradients
from fastqat.ops.triton.multi_tensor_fake_quantize import axis_of, grid_at, unless_empty


def multi_tensor_fake_quantize_backward(
    gs,
    xs,
    scales,
    zero_points,
    offsets,
    qranges,
    axes,
    eps,
    seeds,
    tensor_ids,
    steps,
    rounded_masks,
    lsq_grad_scales,
    estimators,
    strengths,
    dampenings,
    words,
    dxs,
    dscales,
    dshifts,
):
    """dx, dscale and dshift of each tensor; see fastqat.ops.schema."""
    for i, (g, x) in enumerate(zip(gs, xs, strict=True)):
        if x.numel() == 0:
            dscales[i].zero_()
            dshifts[i].zero_()
            continue
        modes = Modes(
            unless_empty(words[i]),
            None if estimators[i] in (STE, PACT, STOCHASTIC) else strengths[i],
            unless_empty(dampenings[i]),
            steps[i] if estimators[i] == STOCHASTIC else None,
        )
        rule = Rule(bool(rounded_masks[i]), bool(lsq_grad_scales[i]), estimators[i], seeds[i], tensor_ids[i])
        grid = grid_at(i, scales, zero_points, offsets, qranges, eps)
        write_gradients(g, x, grid, axis_of(axes[i]), rule, modes, dxs[i], dscales[i], dshifts[i])
