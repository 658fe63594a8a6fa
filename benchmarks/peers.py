"""What fastqat is compared with, each written as its own users would: plain torch, torch.compile, and the ATen ops."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_lsq(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """LSQ per channel in plain torch, by autograd. x: [C, N]; scale: [C]."""
    s = scale.view(-1, 1)
    r = (x / s).clamp(qmin, qmax)
    return (r + (r.round() - r).detach()) * s


def compiled_lsq():
    """torch.compile of :func:`eager_lsq`."""
    return torch.compile(eager_lsq, fullgraph=True)


def aten_learnable(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """ATen's learnable fake quantization per channel, with its gradients of scale and zero point."""
    zero_point = torch.zeros_like(scale)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, qmin, qmax, 1.0)


def aten_fixed(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """ATen's fake quantization per channel with a fixed scale."""
    zero_point = torch.zeros(scale.shape, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale.detach(), zero_point, 0, qmin, qmax)


def eager_search(x: Tensor, scales: Tensor, qmin: int, qmax: int) -> Tensor:
    """Squared error of each candidate, one evaluation after the other. x: [C, N]; scales, result: [K, C]."""
    errors = []
    for scale in scales:
        s = scale.view(-1, 1)
        errors.append(((x / s).round().clamp(qmin, qmax) * s - x).square().sum(1))
    return torch.stack(errors)
