"""A whole step of training a ResNet-50: images of 224 x 224, bfloat16 autocast, channels_last, float32 weights.

W4A4 with learned scales (LSQ) and freezing, first and last layer at 8 bits, all weights in one call, beside the same
step without quantization; in eager mode and with torch.compile. Forward, backward, SGD with momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from gpu_resnet import resnet50
from gpu_timing import DEVICE, REHEARSAL, Call, Record, as_called, attempt, take_turns
from torch import Tensor, nn

import fastqat

BATCH, SIZE, CLASSES = (2, 32, 10) if REHEARSAL else (128, 224, 1000)
FREEZING = fastqat.Oscillation(0.01, fastqat.Schedule("cosine", start=0.1, end=0.02, steps=1000))
MODES = ("eager", "compiled")
BOUNDS = {"eager": 1.3, "compiled": 1.15}


def network() -> nn.Module:
    """The float network."""
    torch.manual_seed(0)
    model = resnet50(CLASSES, width=8, blocks=(1, 1)) if REHEARSAL else resnet50(CLASSES)
    return model.to(DEVICE, memory_format=torch.channels_last)


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    """A W4A4 copy of it that freezes oscillating weights, calibrated."""
    weight = fastqat.QSpec(4, axis=0, learn="scale", oscillation=FREEZING)
    config = fastqat.QConfig(weight, fastqat.QSpec(4, learn="scale"))
    twin = fastqat.prepare(copy.deepcopy(model), config, first_last_bits=8)
    fastqat.quantize_weights_together(twin)
    with torch.autocast(DEVICE, torch.bfloat16):
        fastqat.calibrate(twin, [images])
    return twin


def training(model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Call:
    """A step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    model.train()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return run


def measure(record: Record, rounds: int) -> None:
    """Both steps in both modes, eager mode first: it needs no compilation."""
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (BATCH,), device=DEVICE)
    torch.backends.cudnn.benchmark = True
    floating = network()
    twin = quantized(floating, images)
    twin(images)  # a tracked weight is seen once before compilation
    for mode in MODES:
        calls = {}
        for name, model in (("float", floating), ("W4A4", twin)):
            forward = torch.compile(model) if mode == "compiled" else model
            call = attempt(f"ResNet-50 step, {name}, {mode}", lambda m=model, f=forward: training(m, f, images, labels))
            if call is not None:
                calls[f"ResNet-50 step, {name}, {mode}"] = call
        record.add(take_turns(calls, rounds))
        record.add({f"{name}, as called": s for name, s in as_called(calls, max(rounds // 3, 2)).items()})
        for kind in ("", ", as called"):
            names = (f"ResNet-50 step, {name}, {mode}{kind}" for name in ("W4A4", "float"))
            label = f"ResNet-50 step, W4A4 with freezing / float, {mode}{kind}"
            record.goal(label, record.ratio(*names), "<=", BOUNDS[mode])
