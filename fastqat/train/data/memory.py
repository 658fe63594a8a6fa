"""Data sets that fit into memory: images as one tensor, augmented batch by batch where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastqat.train.data.batches import Batch, Dataset, epoch_generator, normalise


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
class MemoryDataset(Dataset):
    """Two splits in memory, and what is done to their images on the way to a network.

    Args:
        train, test: the splits.
        classes: names of the classes, in the order of their labels.
        mean, std: per channel, in units of the stored pixels; a network sees ``(pixel - mean) / std``.
        crop_padding: augmentation pads by so many black pixels and crops back at random; 0 leaves the image in place.
        flip: augmentation mirrors every second image, left to right.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]  # read only
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def limit_train(self, count: int) -> MemoryDataset:
        """Return the data set with only the first ``count`` training images."""
        return dataclasses.replace(self, train=self.train.first(count))

    def to(self, device: torch.device) -> MemoryDataset:
        """Return the data set with both splits on a device, where augmentation then runs too."""
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))

    def _train_batches(
        self, order: Tensor, slices: Iterator[slice], augmentation: tuple[int, int] | None, workers: int
    ) -> Iterator[Batch]:
        split, device = self.train, self.train.images.device
        order = order.to(device)
        if augmentation:
            generator = epoch_generator(*augmentation, purpose=1)
            moves = crop_flip_moves(len(split), self.crop_padding, self.flip, generator).to(device)
        for positions in slices:
            images = split.images[order[positions]]
            if augmentation:
                images = crop_flip(images, self.crop_padding, moves[positions])
            yield normalise(images, self.mean, self.std), split.labels[order[positions]]

    def _test_batches(self, slices: Iterator[slice], workers: int) -> Iterator[Batch]:
        for positions in slices:
            yield normalise(self.test.images[positions], self.mean, self.std), self.test.labels[positions]


def crop_flip_moves(length: int, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Draw what :func:`crop_flip` does to each of some images: int64 [length, 3], rows (top, left, mirrored).

    Args:
        length: number of images.
        padding: top and left are in ``[0, 2 * padding]``.
        flip: whether half of the images are mirrored; None is if not.
        generator: a CPU generator.
    """
    corners = torch.randint(2 * padding + 1, (length, 2), generator=generator)
    mirrored = torch.randint(2 if flip else 1, (length, 1), generator=generator)
    return torch.cat([corners, mirrored], dim=1)


def crop_flip(images: Tensor, padding: int, moves: Tensor) -> Tensor:
    """Shift each image by up to ``padding`` pixels, filling with black, and mirror some of them, left to right.

    Args:
        images: [N, C, H, W].
        padding: largest shift in pixels.
        moves: int64 [N, 3], rows (top, left, mirrored); ``top = left = padding`` leaves an image in place.
    """
    n, channels, height, width = images.shape
    device = images.device
    top, left, mirrored = moves.view(n, 3, 1).unbind(1)
    rows = top + torch.arange(height, device=device)  # [N, H] into the padded image
    columns = left + torch.arange(width, device=device)  # [N, W]
    columns = torch.where(mirrored.bool(), columns.flip(1), columns)
    image = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, channels, 1, 1)
    padded = F.pad(images, (padding,) * 4)
    return padded[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
