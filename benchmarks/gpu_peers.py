"""Kernels of other packages per channel, where they are installed: NNCF (CUDA C++) and AIMET (Triton).

Each is called as its own package calls it; what it gives is compared with fastqat before it is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peers import aten_learnable, eager_lsq
from torch import Tensor

from fastqat import functional


@dataclass(frozen=True)
class Peer:
    """A way to quantize x [C, N] with a learned range.

    Args:
        name: of the package.
        parameter: scale [C], qmax -> the tensor that this package learns.
        quantize: x, the parameter, qmin, qmax -> y.
    """

    name: str
    parameter: Callable[[Tensor, int], Tensor]
    quantize: Callable[[Tensor, Tensor, int, int], Tensor]


def as_it_is(scale: Tensor, qmax: int) -> Tensor:
    """One scale per channel."""
    return scale.clone()


def fastqat_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """fastqat, through its public function."""
    return functional.fake_quantize(x, scale, qmin=qmin, qmax=qmax, axis=0, eps=1e-8)


def nncf() -> Peer:
    """NNCF's symmetric quantization: its parameter is the largest value; compiled with nvcc when first called."""
    function = importlib.import_module("nncf.torch.quantization.quantize_functions").symmetric_quantize

    def quantize(x: Tensor, largest: Tensor, qmin: int, qmax: int) -> Tensor:
        return function(x, qmax - qmin + 1, qmin, qmax, largest, 0.0)

    return Peer("NNCF CUDA", lambda scale, qmax: (scale * qmax).view(-1, 1), quantize)


def aimet() -> Peer:
    """AIMET's quantize-dequantize, which takes its Triton kernels where they run."""
    try:
        module = importlib.import_module("aimet_torch.quantization.affine")
    except ImportError:
        module = importlib.import_module("aimet_torch.v2.quantization.affine")

    def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        return module.quantize_dequantize(x, scale, torch.zeros_like(scale), qmin=qmin, qmax=qmax)

    return Peer("AIMET Triton", lambda scale, qmax: scale.view(-1, 1).clone(), quantize)


def compiled() -> Peer:
    """torch.compile of plain LSQ, for each size anew."""
    return Peer("compiled LSQ", as_it_is, torch.compile(eager_lsq, fullgraph=True, dynamic=False))


OURS = Peer("fastqat", as_it_is, fastqat_quantize)
MAKERS: dict[str, Callable[[], Peer]] = {
    "NNCF CUDA": nncf,
    "AIMET Triton": aimet,
    "compiled LSQ": compiled,
    "ATen learnable": lambda: Peer("ATen learnable", as_it_is, aten_learnable),
    "eager LSQ": lambda: Peer("eager LSQ", as_it_is, eager_lsq),
}


def check(peer: Peer, device: str) -> None:
    """The peer quantizes as fastqat does, but for ties and its own roundings; RuntimeError otherwise."""
    torch.manual_seed(0)
    x, scale = torch.randn(64, 1000, device=device), torch.full((64,), 0.3, device=device)
    want = fastqat_quantize(x, scale, -8, 7)
    leaf, parameter = x.requires_grad_(), peer.parameter(scale, 7).requires_grad_()
    got = peer.quantize(leaf, parameter, -8, 7)
    dx, dp = torch.autograd.grad(got, (leaf, parameter), torch.ones_like(got))
    wrong = float(((got - want).abs() > 1e-3).float().mean())
    if wrong > 0.01 or dx.shape != x.shape or dp.shape != parameter.shape:
        raise RuntimeError(f"{peer.name} gives other values than fastqat: {wrong:.1%} of the elements differ")
