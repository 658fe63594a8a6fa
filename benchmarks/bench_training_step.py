"""A whole training step, batch 128 of 32 x 32 images: float32 beside W4A4, by fastqat and by its peers.

Every quantized network is the same one, prepared and calibrated by fastqat; the peers stand in for its quantizers.
First and last layer at 8 bits, weights per channel, activations per tensor, all scales learned. "gradients" has LBT's
quantizers, those of gradients too; "compressed" keeps codes and bits for the backward pass.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from conftest import goal, take_turns
from torch import Tensor, nn
from torch.nn import functional as F

import fastqat
from fastqat import models

BATCH, IMAGE = 128, (3, 32, 32)
ROUNDS = {"resnet20": 10, "mobilenetv2": 2}

for network in ROUNDS:
    goal(f"{network}: W4A4 step / float32 step", f"{network}_fastqat", f"{network}_float", "<=", 1.35)
    goal(f"{network}: W4A4G4 step / float32 step", f"{network}_gradients", f"{network}_float", "<=", 1.35)
    goal(f"{network}: compressed W4A4 step / W4A4 step", f"{network}_compressed", f"{network}_fastqat", "<=", 1.15)
    for peer in ("eager", "aten"):
        goal(f"{network}: {peer} step / fastqat step", f"{network}_{peer}", f"{network}_fastqat", ">=", 1)


def eager_lsq(quantizer: fastqat.FakeQuant, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """LSQ in plain torch, with the range of a FakeQuant."""
    qmin, qmax = quantizer.codes
    s = quantizer.scale if quantizer.axis is None else quantizer.scale.view(-1, *[1] * (x.dim() - 1))
    r = (x / s).clamp(qmin, qmax)
    return (r + (r.round() - r).detach()) * s


def aten_learnable(quantizer: fastqat.FakeQuant, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """ATen's learnable fake quantization, with the range of a FakeQuant."""
    zero_point = torch.zeros_like(quantizer.scale)
    if quantizer.axis is None:
        op = torch._fake_quantize_learnable_per_tensor_affine
        return op(x, quantizer.scale, zero_point, *quantizer.codes, 1.0)
    op = torch._fake_quantize_learnable_per_channel_affine
    return op(x, quantizer.scale, zero_point, quantizer.axis, *quantizer.codes, 1.0)


def by_peer(model: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    """A copy of a prepared network whose quantizers compute as a peer does."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, fastqat.FakeQuant):
            module.forward = functools.partial(forward, module)
    return model


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """A step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


@pytest.mark.parametrize("network", ROUNDS)
def bench_step(benchmark, network):
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, *IMAGE), torch.randint(10, (BATCH,))
    images = images.contiguous(memory_format=torch.channels_last)
    model = models.build(network, 10, IMAGE).to(memory_format=torch.channels_last)
    spec = fastqat.QSpec(bits=4, learn="scale")
    config = fastqat.QConfig(fastqat.QSpec(bits=4, axis=0, learn="scale"), spec)
    quantized = fastqat.prepare(copy.deepcopy(model), config, first_last_bits=8)
    lbt = fastqat.quantizers.lbt_weight(4), fastqat.quantizers.lbt_activation(4)
    with_gradients = fastqat.QConfig(*lbt, gradient=fastqat.GradientQSpec(4))
    gradients = fastqat.prepare(copy.deepcopy(model), with_gradients, first_last_bits=8)
    for prepared in (quantized, gradients):
        fastqat.calibrate(prepared, [images])
    compressed = copy.deepcopy(quantized)
    fastqat.compress_saved_activations(compressed)
    networks = {
        "float": model,
        "fastqat": quantized,
        "gradients": gradients,
        "compressed": compressed,
        "eager": by_peer(quantized, eager_lsq),
        "aten": by_peer(quantized, aten_learnable),
    }
    contenders = {f"{network}_{name}": (step(m, images, labels), 0) for name, m in networks.items()}
    take_turns(benchmark, contenders, rounds=ROUNDS[network])
