"""Data sets held as tensors, and an iterator over their batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastqat.train.extras import import_extra

CIFAR_RECORDS = 10_000  # in each file
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32  # the label, then the red, green and blue planes
CIFAR_TRAIN_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
CIFAR_TEST_FILES = ["test_batch.bin"]


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Args:
        images: uint8 [N, C, H, W], as stored: not normalised.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Split:
        """Return the first ``count`` images, or all if there are fewer."""
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and what is done to their images on the way to a network.

    Args:
        train, test: the splits.
        num_classes: labels are in ``[0, num_classes)``.
        mean, std: per channel, in units of the stored pixels; a network sees ``(pixel - mean) / std``.
        crop_padding: augmentation pads by so many black pixels and crops back at random; 0 leaves the image in place.
        flip: augmentation mirrors every second image, left to right.
    """

    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False

    def limit_train(self, count: int) -> Dataset:
        """Return the data set with only the first ``count`` training images."""
        return dataclasses.replace(self, train=self.train.first(count))

    def to(self, device: torch.device) -> Dataset:
        """Return the data set with both splits on a device."""
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))

    def train_batches(
        self, batch_size: int, generator: torch.Generator, augment: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of shuffled ``(images float32 [N, C, H, W], labels int64 [N])``; the last N may be smaller.

        Args:
            batch_size: images per batch.
            generator: a CPU generator that decides order and augmentation, on every device alike.
            augment: whether images are cropped and mirrored at random.
        """
        order = torch.randperm(len(self.train), generator=generator)
        for indices in order.split(batch_size):
            indices = indices.to(self.train.images.device)
            images = self.train.images[indices]
            if augment:
                images = random_crop_flip(images, self.crop_padding, self.flip, generator)
            yield self.normalise(images), self.train.labels[indices]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test split in its order, as :meth:`train_batches` does."""
        for images, labels in zip(self.test.images.split(batch_size), self.test.labels.split(batch_size), strict=True):
            yield self.normalise(images), labels

    def normalise(self, images: Tensor) -> Tensor:
        """Map stored pixels uint8 [N, C, H, W] to float32 of about zero mean and unit variance."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images - mean) / std


def random_crop_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image at random by up to ``padding`` pixels, filling with black, and mirror it with probability 1/2.

    Args:
        images: [N, C, H, W].
        padding: largest shift in pixels.
        flip: whether to mirror.
        generator: a CPU generator.
    """
    n, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    rows = top + torch.arange(height)  # [N, H] into the padded image
    columns = left + torch.arange(width)  # [N, W]
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    image = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    padded = F.pad(images, (padding,) * 4)
    return padded[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def load_digits() -> Dataset:
    """Load the 1,797 handwritten 8x8 digits that scikit-learn carries; 500 of them, always the same, are for testing.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    digits = import_extra("sklearn.datasets").load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))  # NumPy promises this stream for ever
    images = torch.from_numpy(digits.images[order].astype(np.uint8)).unsqueeze(1)  # [1797, 1, 8, 8], pixels 0..16
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    test, train = Split(images[:500], labels[:500]), Split(images[500:], labels[500:])
    return Dataset(train, test, num_classes=10, mean=(4.9,), std=(6.0,))


def load_cifar10(root: Path, records: int = CIFAR_RECORDS) -> Dataset:
    """Load CIFAR-10, binary version (https://www.cs.toronto.edu/~kriz/cifar.html): 50,000 + 10,000 32x32 colour images.

    Args:
        root: the folder with ``data_batch_1.bin`` ... ``data_batch_5.bin`` and ``test_batch.bin``, or the one above it.
        records: images per file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size, or a label outside 0..9.
    """
    nested = root / "cifar-10-batches-bin"
    folder = nested if nested.is_dir() else root
    train = _read_cifar([folder / name for name in CIFAR_TRAIN_FILES], records)
    test = _read_cifar([folder / name for name in CIFAR_TEST_FILES], records)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the usual ones, of ImageNet, for pixels in 0..1
    scaled = {"mean": tuple(255 * m for m in mean), "std": tuple(255 * s for s in std)}
    return Dataset(train, test, num_classes=10, **scaled, crop_padding=4, flip=True)


def _read_cifar(files: list[Path], records: int) -> Split:
    for file in files:  # all of them before the first is read
        if not file.is_file():
            raise FileNotFoundError(f"CIFAR-10, binary version: wanted the file {file}; it does not exist")
        if (size := file.stat().st_size) != records * CIFAR_RECORD_BYTES:
            wanted = f"{records * CIFAR_RECORD_BYTES} bytes ({records} records of {CIFAR_RECORD_BYTES})"
            raise ValueError(f"CIFAR-10: {file}: wanted {wanted}; got {size} bytes")
    data = np.stack([np.fromfile(file, np.uint8).reshape(records, CIFAR_RECORD_BYTES) for file in files])
    labels = data[:, :, 0]  # [files, records]
    if (wrong := np.argwhere(labels > 9)).size:
        file, record = wrong[0]
        raise ValueError(f"CIFAR-10: {files[file]}: record {record}: wanted a label 0..9; got {labels[file, record]}")
    images = np.ascontiguousarray(data[:, :, 1:]).reshape(-1, 3, 32, 32)
    return Split(torch.from_numpy(images), torch.from_numpy(labels.reshape(-1).astype(np.int64)))


def _cifar10(root: Path | None) -> Dataset:
    if root is None:
        raise ValueError("data cifar10: wanted --root DIR, the folder of the binary version; got none")
    return load_cifar10(root)


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {"digits": lambda root: load_digits(), "cifar10": _cifar10}


def load(name: str, root: Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: a key of :data:`DATASETS`.
        root: the folder with its files, for those that have files.

    Raises:
        ValueError: unknown name, no root where one is needed, or a file with wrong content.
        FileNotFoundError: a file is missing.
        ImportError: scikit-learn is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"data: wanted one of {', '.join(DATASETS)}; got {name!r}")
    return DATASETS[name](root)
