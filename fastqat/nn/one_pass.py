"""What a quantizer with one scale makes of a tensor in one read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastqat import autograd, one_tensor
from fastqat.autograd import activated
from fastqat.nn.coded import Keep

if TYPE_CHECKING:
    from fastqat.nn.fake_quant import FakeQuant


def quantize_in_one_pass(
    quantizer: FakeQuant, x: Tensor, clip: float, out_dtype: torch.dtype | None, keep: Keep | None
) -> Tensor:
    """Quantize a tensor behind its activation function; gather the extremes that the range of the next step wants.

    Args:
        quantizer: one that ``fits_one_pass``.
        x: float32, bfloat16 or float16.
        clip: one of :data:`fastqat.autograd.CLIPS`.
        out_dtype: of the result; None is that of x.
        keep: takes the codes, and saves less for the backward pass.
    """
    quantizer.checked_axis(x)
    scale: Tensor = quantizer.scale
    zero_point: Tensor | None = quantizer.zero_point
    is_following = quantizer.is_following
    gathers = is_following and quantizer.new_low is not None
    if is_following:
        scale, zero_point = quantizer.grid_for(x if gathers else activated(x.detach(), clip), gathers)
    learned = autograd.needs_grad(scale, scale, zero_point, quantizer.offset)
    pact = learned and quantizer.has_pact_gradients
    # A Parameter stays alive by itself.
    in_bits = torch.is_grad_enabled() and x.requires_grad and not isinstance(x, nn.Parameter)
    grid = one_tensor.Grid(scale, zero_point, quantizer.grid_offset(), quantizer.qrange)
    rounded = quantizer.ste_mask == "rounded"
    if keep is not None and learned and not pact:
        options = one_tensor.Options(quantizer.eps, clip, rounded, out_dtype=out_dtype)
        return keep.quantize_learned(x, grid, options, quantizer.grad_scale)
    if (learned and not pact) or not (pact or clip or gathers or in_bits or keep is not None):
        return quantize_with_gradients(quantizer, x, None, scale, zero_point, clip, out_dtype)
    factor = None if quantizer.grad_scale is None else float(quantizer.grad_scale)  # no "lsq", see QSpec.is_pact
    options = one_tensor.Options(quantizer.eps, clip, rounded, pact, grad_scale=factor, out_dtype=out_dtype)
    seen = one_tensor.Observed(quantizer.new_low, quantizer.new_high) if gathers else one_tensor.NOTHING
    if keep is None:
        y, _ = one_tensor.fake_quantize_tensor(x, grid, None, options, seen)
    else:
        y = keep.quantize(x, grid, options, seen)
    if gathers:
        quantizer.merge_ranks(quantizer.new_low, quantizer.new_high)
    return y


def quantize_with_gradients(
    quantizer: FakeQuant,
    x: Tensor,
    axis: int | None,
    scale: Tensor,
    zero_point: Tensor | None,
    clip: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """Quantize a tensor, with gradients that read it again.

    Args:
        quantizer: one with the straight-through estimator.
        x, clip, out_dtype: see :func:`quantize_in_one_pass`.
        axis: in [0, x.dim()), or None.
        scale, zero_point: of the quantizer, or of a range that follows the data.
    """
    options = autograd.Options(
        quantizer.qrange,
        axis,
        quantizer.group_size,
        quantizer.eps,
        quantizer.ste_mask == "rounded",
        *autograd.lsq_or_factor(quantizer.grad_scale),
        clip,
        out_dtype,
    )
    return autograd.apply_fake_quantize(x, scale, zero_point, quantizer.grid_offset(), options)
