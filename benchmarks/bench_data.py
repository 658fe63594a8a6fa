"""Loading against training: images per second of the data sets, beside those of training steps on the same machine.

Run with ``make bench``. CIFAR-10 is random pixels of its size, folders are random JPEGs of the usual 500 x 375; neither
changes how long loading takes by much, and nothing has to be downloaded. A step is forward, backward and SGD in FP32
with channels-last convolutions, as the trainer does it. Loading is no bottleneck while its share of a step is small.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import goal, take_turns
from PIL import Image

from fastqat import models
from fastqat.train import data

BATCH = 128
CIFAR_IMAGES = 50_000
FOLDER_BATCH, FOLDER_BATCHES, SIZE = 16, 24, 224  # of each pass through a folder

for name in ("resnet20", "mobilenetv2"):
    goal(f"cifar10 batch / step of {name}", "load_cifar10", f"step_{name}", "<=", 0.05)
goal("folder, no worker / 2 workers", "load_folder[0]", "load_folder[2]", ">=", 1.5)


def cifar10() -> data.MemoryDataset:
    """Random pixels with the shape and the augmentation of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (CIFAR_IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.arange(CIFAR_IMAGES) % 10)
    return data.MemoryDataset(split, split, tuple("0123456789"), (125.0,) * 3, (60.0,) * 3, crop_padding=4, flip=True)


class Endless:
    """The batches of one epoch after the other."""

    def __init__(self, dataset: data.Dataset, batch_size: int) -> None:
        self.dataset, self.batch_size, self.epoch = dataset, batch_size, 0
        self.batches: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self.batches, None)
        while batch is None:
            self.batches = self.dataset.train_batches(self.batch_size, seed=0, epoch=self.epoch)
            self.epoch += 1
            batch = next(self.batches, None)
        return batch


class Step:
    """One training step of a network on the same batch every time."""

    def __init__(self, name: str, batch_size: int, edge: int) -> None:
        torch.manual_seed(0)
        self.images = torch.randn(batch_size, 3, edge, edge)
        self.labels = torch.randint(10, (batch_size,))
        self.model = models.build(name, 10, (3, edge, edge)).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def show_speed(benchmark, images: dict[str, int]) -> None:
    """Print images per second. images: contender -> images that one call handles."""
    print()
    for name, count in images.items():
        print(f"{name:<24}{count / benchmark.extra_info[name][0]:>12,.0f} images/s")


def bench_cifar10(benchmark):
    contenders = {"load_cifar10": Endless(cifar10(), BATCH)}
    contenders |= {f"step_{name}": Step(name, BATCH, 32) for name in ("resnet20", "mobilenetv2")}
    take_turns(benchmark, {name: (call, 0) for name, call in contenders.items()}, rounds=6)
    show_speed(benchmark, dict.fromkeys(contenders, BATCH))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    """JPEGs of smooth noise: as costly to decode as photographs are."""
    root = tmp_path_factory.mktemp("folder")
    random = np.random.RandomState(0)
    for split, count in (("train", FOLDER_BATCH * FOLDER_BATCHES // 2), ("val", 1)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(random.randint(0, 256, (47, 63, 3), np.uint8))
                picture = coarse.resize((500, 375), Image.Resampling.BICUBIC)
                picture.save(root / split / name / f"{i}.jpg", quality=90)
    return data.load("folder", root, image_size=SIZE)


def bench_folder(benchmark, folder):
    """One pass through the training split, with workers that includes starting them, beside a step at its size."""
    contenders = {
        f"load_folder[{workers}]": lambda workers=workers: [
            len(labels) for _, labels in folder.train_batches(FOLDER_BATCH, seed=0, epoch=0, workers=workers)
        ]
        for workers in (0, 1, 2)
    }
    images = dict.fromkeys(contenders, FOLDER_BATCH * FOLDER_BATCHES) | {"step_mobilenetv2[224]": FOLDER_BATCH}
    contenders["step_mobilenetv2[224]"] = Step("mobilenetv2", FOLDER_BATCH, SIZE)
    take_turns(benchmark, {name: (call, 0) for name, call in contenders.items()}, rounds=3)
    show_speed(benchmark, images)
