"""A training step with AdaQAT beside one of plain QAT: ResNet-20, batch 64 of 32 x 32 images, W4A4.

Widths that do not move (rates of 0): each step takes its two passes. "passes" is what these take beside what the
network computes, for one of 20 layers whose loss costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import goal, take_turns
from torch import Tensor, nn
from torch.nn import functional as F

import fastqat
from fastqat import models, quantizers

BATCH, IMAGE, ROUNDS = 64, (3, 32, 32), 5
CONFIGS = {
    "lsq": fastqat.QConfig(quantizers.lsq(4, axis=0), quantizers.lsq(4)),
    "dorefa": fastqat.QConfig(quantizers.dorefa_weight(4), quantizers.cg_pact(4)),
}

for name in CONFIGS:
    goal(f"AdaQAT {name}: step / step of plain QAT", f"adaqat_{name}", f"plain_{name}", "<=", 1.8)
goal("AdaQAT per layer: step / step of plain QAT", "adaqat_lsq_per_layer", "plain_lsq", "<=", 1.8)


def prepared(config: fastqat.QConfig) -> nn.Module:
    """ResNet-20 in training, with ranges."""
    torch.manual_seed(0)
    model = models.build("resnet20", 10, IMAGE).to(memory_format=torch.channels_last)
    fastqat.prepare(model, config, first_last_bits=8)
    fastqat.quantize_weights_together(model)
    model.train()
    with torch.no_grad():
        model(torch.randn(BATCH, *IMAGE))
    return model


def step(model: nn.Module, images: Tensor, labels: Tensor, widths: fastqat.AdaQAT | None) -> Callable[[], object]:
    """A step of SGD, with AdaQAT or without."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def closure() -> Tensor:
        return F.cross_entropy(model(images), labels)

    def run() -> None:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        if widths is not None:
            widths.step(loss, closure)
        optimizer.step()

    return run


def still(model: nn.Module, per_layer: bool = False) -> fastqat.AdaQAT:
    """Widths that do not move."""
    return fastqat.AdaQAT(model, lam=0.1, lr_weight=0.0, lr_activation=0.0, per_layer=per_layer)


def bench_step(benchmark):
    images, labels = torch.randn(BATCH, *IMAGE), torch.randint(10, (BATCH,))
    images = images.contiguous(memory_format=torch.channels_last)
    contenders: dict[str, tuple[Callable[[], object], int]] = {}
    for name, config in CONFIGS.items():
        model = prepared(config)
        contenders[f"plain_{name}"] = step(model, images, labels, None), 0
        model = prepared(config)
        contenders[f"adaqat_{name}"] = step(model, images, labels, still(model)), 0
    model = prepared(CONFIGS["lsq"])
    contenders["adaqat_lsq_per_layer"] = step(model, images, labels, still(model, per_layer=True)), 0
    take_turns(benchmark, contenders, rounds=ROUNDS)


def bench_passes(benchmark):
    model = prepared(CONFIGS["lsq"])
    widths, constant = still(model), torch.zeros(())
    settings = [dict.fromkeys(width.quantizers, width.other) for width in widths.widths]
    take_turns(
        benchmark,
        {
            "passes_2_of_nothing": (lambda: widths.probe.losses(lambda: constant, settings), 0),
            "passes_step_of_nothing": (lambda: widths.step(constant, lambda: constant), 0),
        },
        rounds=50,
    )
