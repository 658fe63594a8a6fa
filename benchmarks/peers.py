"""What fastqat is compared with, each written as its own users would: plain torch, torch.compile, and the ATen ops."""

from __future__ import annotations

from dataclasses import dataclass

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
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale.detach(), zero_point, 0, qmin, qmax)


def eager_search(x: Tensor, scales: Tensor, qmin: int, qmax: int) -> Tensor:
    """Squared error of each candidate, one evaluation after the other. x: [C, N]; scales, result: [K, C]."""
    errors = []
    for scale in scales:
        s = scale.view(-1, 1)
        errors.append(((x / s).round().clamp(qmin, qmax) * s - x).square().sum(1))
    return torch.stack(errors)


@dataclass
class TrackingState:
    """What tracking in plain torch keeps: six tensors like the weight, five of them float32."""

    code: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor
    frozen_code: Tensor

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, qmin: int, qmax: int) -> TrackingState:
        """The state after the first forward."""
        s = scale.detach().view(-1, *[1] * (weight.dim() - 1))
        code = (weight / s).round().clamp(qmin, qmax)
        zero = torch.zeros_like(code)
        return cls(code, zero, zero.clone(), code.clone(), torch.zeros_like(code, dtype=torch.bool), zero.clone())


def tracked_lsq(
    w: Tensor, scale: Tensor, qmin: int, qmax: int, state: TrackingState, momentum: float, threshold: float
) -> Tensor:
    """LSQ with the oscillation tracking and freezing of Nagel et al. (ICML 2022), every weight in every step."""
    s = scale.view(-1, *[1] * (w.dim() - 1))
    r = (w / s).clamp(qmin, qmax)
    frozen = state.frozen.clone()  # backward needs the mask of before
    r = torch.where(frozen, state.frozen_code, r + (r.round() - r).detach())
    with torch.no_grad():
        code = r.detach()
        change = code - state.code
        way = change.sign()
        oscillates = way * state.direction == -1
        state.frequency.lerp_(oscillates.float(), momentum)
        state.direction.copy_(torch.where(change != 0, way, state.direction))
        state.code.copy_(code)
        newly = (state.frequency > threshold) & ~frozen
        state.frozen_code.copy_(torch.where(newly, state.average.round(), state.frozen_code))
        state.frozen.logical_or_(newly)
        state.average.lerp_(code, momentum)
    return r * s


def compiled_tracked_lsq():
    """torch.compile of :func:`tracked_lsq`."""
    return torch.compile(tracked_lsq, fullgraph=True)
