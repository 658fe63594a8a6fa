"""Differences of AdaQAT with widths per layer: the running estimates beside passes that lower one width alone.

    python benchmarks/adaqat_per_layer.py --root CIFAR10 --checkpoint resnet20-12fca82f.th

ResNet-20 with LSQ, bit-widths drawn from 3 to 6 for each layer, weights and activations, is trained for some steps;
then it stays as it is. Each step of the estimates takes three passes over a batch of 64, one of them plain; the passes
for each width alone are a plain one and one for every width, over other batches. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastqat
from fastqat import models
from fastqat.train.data import load_cifar10
from fastqat.train.data.batches import normalise
from fastqat.train.weights import load_weights

BATCH, TRAINED = 64, 40
CHECKPOINTS = (25, 50, 100, 200, 400, 800)


class Batches:
    """Training images in a random order, without augmentation."""

    def __init__(self, root: Path, seed: int) -> None:
        self.data, self.generator = load_cifar10(root), torch.Generator().manual_seed(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        train = self.data.train
        chosen = torch.randint(len(train.labels), (BATCH,), generator=self.generator)
        return normalise(train.images[chosen], self.data.mean, self.data.std), train.labels[chosen]


def network(checkpoint: Path, batches: Batches, seed: int) -> nn.Module:
    """ResNet-20 at mixed bit-widths, trained for a while."""
    model = models.build("resnet20", 10, (3, 32, 32))
    load_weights(model, checkpoint)
    lsq = fastqat.quantizers.lsq
    fastqat.prepare(model, fastqat.QConfig(lsq(4, axis=0), lsq(4)), first_last_bits=8)
    names = list(fastqat.bit_widths(model))[1:-1]
    draws = random.Random(seed)
    fastqat.set_bit_widths(model, {name: (draws.randint(3, 6), draws.randint(3, 6)) for name in names})
    fastqat.quantize_weights_together(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for _ in range(TRAINED):
        images, labels = batches()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """What computes the loss of a batch."""
    return lambda: F.cross_entropy(model(images), labels)


def correlation(a: list[float], b: list[float]) -> float:
    """Of two lists."""
    return torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1].item()


def alone(widths: fastqat.AdaQAT, model: nn.Module, batches: Batches, count: int) -> list[tuple[float, float]]:
    """Differences of each width alone over some batches: their mean, and its standard error."""
    found: list[list[float]] = []
    settings = [dict.fromkeys(width.quantizers, width.other) for width in widths.widths]
    for _ in range(count):
        here, *there = widths.probe.losses(loss_of(model, *batches()), [{}, *settings])
        found.append([(here - other).item() for other in there])
    return [(statistics.fmean(of), statistics.stdev(of) / count**0.5) for of in zip(*found, strict=True)]


@torch.no_grad()
def together(widths: fastqat.AdaQAT, model: nn.Module, batches: Batches, steps: int) -> dict[int, list[float]]:
    """The running estimates after some steps."""
    found = {}
    for step in range(1, steps + 1):
        closure = loss_of(model, *batches())
        update = widths.step(closure(), closure)
        if update is not None and step in CHECKPOINTS:
            found[step] = [difference or 0.0 for difference in update.differences]
            print(f"{step} steps", flush=True)
    return found


def report(widths: fastqat.AdaQAT, truth: list[tuple[float, float]], estimates: dict[int, list[float]]) -> None:
    """Print the tables."""
    means, errors = ([pair[k] for pair in truth] for k in (0, 1))
    noise = statistics.fmean(e * e for e in errors) ** 0.5
    print(f"\nalone: mean {statistics.fmean(means):+.4f}, standard deviation {statistics.stdev(means):.4f},")
    print(f"standard error {noise:.4f} (root mean square)\n")
    print("| steps | mean of estimates | root mean square of estimate - alone | correlation |\n|---|---|---|---|")
    for step, of in estimates.items():
        rms = statistics.fmean((a - b) ** 2 for a, b in zip(of, means, strict=True)) ** 0.5
        print(f"| {step} | {statistics.fmean(of):+.4f} | {rms:.4f} | {correlation(of, means):.2f} |")
    print("\n| width | bits | alone | estimate |\n|---|---|---|---|")
    for width, (mean, error), of in zip(widths.widths, truth, estimates[max(estimates)], strict=True):
        print(f"| {width.name} | {width.number.bits} | {mean:+.4f} ± {error:.4f} | {of:+.4f} |")


def main() -> None:
    """Measure both, and print what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10, binary version")
    parser.add_argument("--checkpoint", type=Path, required=True, help="float weights of ResNet-20")
    parser.add_argument("--steps", type=int, default=400, help="of the estimates")
    parser.add_argument("--alone", type=int, default=30, help="batches for each width alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    batches = Batches(options.root, options.seed)
    model = network(options.checkpoint, batches, options.seed)
    widths = fastqat.AdaQAT(model, lam=0.0, lr_weight=0.0, lr_activation=0.0, per_layer=True, seed=options.seed)
    truth = alone(widths, model, batches, options.alone)
    report(widths, truth, together(widths, model, batches, options.steps))


if __name__ == "__main__":
    main()
