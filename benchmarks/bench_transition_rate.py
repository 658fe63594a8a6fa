"""What scheduled transition rates cost: a training step of ResNet-20 at W2A2, batch 64, with them and without.

All have the same quantizers, those of TRS, and the first and the last layer in float. "tracked" counts the transitions
of the weights; "scheduled" also scales the updates by them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import goal, take_turns
from torch import Tensor
from torch.nn import functional as F

import fastqat
from fastqat import Oscillation, QConfig, models
from fastqat.quantizers import trs_activation, trs_weight

BATCH, IMAGE = 64, (3, 32, 32)
KINDS = ("plain", "tracked", "scheduled")

for kind in KINDS[1:]:
    goal(f"resnet20, W2A2 of TRS: {kind} step / plain step", f"trs_{kind}", "trs_plain", "<=", 1.03)


def step_of(kind: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A training step of a network of its own."""
    torch.manual_seed(0)
    model = models.build("resnet20", 10, IMAGE).to(memory_format=torch.channels_last)
    weight = trs_weight(2, oscillation=None if kind == "plain" else Oscillation())
    fastqat.prepare(model, QConfig(weight, trs_activation(2)), overrides={"conv1": None, "linear": None})
    fastqat.calibrate(model, [x], progress=False)
    fastqat.quantize_weights_together(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    if kind == "scheduled":
        schedule = fastqat.Schedule("cosine", 1.0, 0.0, 10_000, begin=0.0)
        fastqat.TransitionRateScheduler(optimizer, model, schedule=schedule)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def bench_step_with_transition_rates(benchmark):
    torch.manual_seed(0)
    x = torch.randn(BATCH, *IMAGE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,))
    take_turns(benchmark, {f"trs_{kind}": (step_of(kind, x, y), 0) for kind in KINDS}, rounds=15)
