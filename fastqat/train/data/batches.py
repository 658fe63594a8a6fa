"""What every data set has in common: which images a batch holds, decided by seed, epoch and position alone.

Nothing here has a state. An epoch can be entered at any batch, by any number of ranks, and gives the same images in the
same order with the same augmentation; torch's global random numbers are neither read nor advanced.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized

import numpy as np
import torch
from torch import Tensor

from fastqat.ops.checks import fail

Batch = tuple[Tensor, Tensor]  # images float32 [n, C, H, W], normalised; labels int64 [n]


class Dataset(ABC):
    """A training and a test split of labelled images.

    Args:
        train, test: the splits; ``len`` counts their images.
        classes: names of the classes, in the order of their labels.
        image_shape: (C, H, W) of an image as a network sees it.
    """

    train: Sized
    test: Sized
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    @property
    def num_classes(self) -> int:
        """Labels are in ``[0, num_classes)``."""
        return len(self.classes)

    def train_batch_count(self, batch_size: int) -> int:
        """Return the number of global batches of an epoch; the last one may be short."""
        return math.ceil(len(self.train) / batch_size)

    @abstractmethod
    def limit_train(self, count: int) -> Dataset:
        """Return the data set with only ``count`` training images, or all if there are fewer."""

    @abstractmethod
    def to(self, device: torch.device) -> Dataset:
        """Return the data set with batches on a device."""

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        augment: bool = True,
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Iterate over the batches of one shuffled epoch, from global batch ``start`` to the last.

        Args:
            batch_size: images of a global batch, of all ranks together.
            seed, epoch: decide the order; with the position in the epoch they decide each image's augmentation.
            start: global batches that are skipped, at no cost.
            rank, world_size: this process takes the rank-th of so many contiguous slices of each global batch; their
                sizes differ by at most one, and a slice may be empty.
            augment: whether images are cropped and mirrored at random.
            workers: processes that decode images; data sets in memory need none.

        Raises:
            ValueError: an argument is out of range, or an image cannot be read.
        """
        length = len(self.train)
        slices = batch_slices(length, batch_size, start=start, rank=rank, world_size=world_size)
        return self._train_batches(
            epoch_order(length, seed, epoch), slices, (seed, epoch) if augment else None, workers
        )

    def test_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        """Iterate over the test split in its order; arguments and slices are those of :meth:`train_batches`."""
        slices = batch_slices(len(self.test), batch_size, rank=rank, world_size=world_size)
        return self._test_batches(slices, workers)

    @abstractmethod
    def _train_batches(
        self, order: Tensor, slices: Iterator[slice], augmentation: tuple[int, int] | None, workers: int
    ) -> Iterator[Batch]:
        """Yield a batch for each slice of positions.

        Args:
            order: image at each position, int64 [N] on the CPU.
            slices: positions of each batch.
            augmentation: seed and epoch, which with the position decide it; None augments nothing.
            workers: see :meth:`train_batches`.
        """

    @abstractmethod
    def _test_batches(self, slices: Iterator[slice], workers: int) -> Iterator[Batch]:
        """Yield a batch of test images for each slice."""


def batch_slices(
    length: int, batch_size: int, *, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[slice]:
    """Yield this rank's positions of each global batch.

    Args:
        length: images of the split.
        batch_size, start, rank, world_size: as in :meth:`Dataset.train_batches`.

    Raises:
        ValueError: an argument is out of range.
    """
    if batch_size < 1:
        fail(ValueError, "batch_size", "at least 1", batch_size)
    if start < 0:
        fail(ValueError, "start", "at least 0", start)
    if not 0 <= rank < world_size:
        fail(ValueError, "rank", f"0 to {world_size - 1}, for world_size {world_size}", rank)
    return (
        slice(first + size * rank // world_size, first + size * (rank + 1) // world_size)
        for first in range(start * batch_size, length, batch_size)
        for size in [min(batch_size, length - first)]
    )


def epoch_generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """Make a CPU generator for one purpose in one epoch; different triples of arguments give unrelated streams.

    Args:
        seed, epoch, purpose: at least 0.
    """
    state = np.random.SeedSequence((seed, epoch, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """Return the order int64 [length] in which an epoch visits the images of a split."""
    return torch.randperm(length, generator=epoch_generator(seed, epoch, purpose=0))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Map stored pixels uint8 [N, C, H, W] to float32 ``(pixel - mean) / std``, with one mean and std per channel."""
    means, stds = (torch.tensor(each, dtype=torch.float32, device=images.device).view(-1, 1, 1) for each in (mean, std))
    # Contiguous, because in channels-last memory the mean changes from number to number: that takes 4 x longer.
    return images.contiguous().to(torch.float32).sub_(means).div_(stds)
