"""Images in class sub-folders, decoded by worker processes when their batch comes."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastqat.ops.checks import fail
from fastqat.train.data.batches import Batch, Dataset, normalise
from fastqat.train.data.images import open_image, random_resized_crop, resized_centre
from fastqat.train.extras import import_extra

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_FOLDERS = ("val", "test")  # the first that exists
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in 0..1
PIXEL_MEAN, PIXEL_STD = tuple(255 * m for m in MEAN), tuple(255 * s for s in STD)

Key = tuple[int, str | None]  # index of an image, and the seed of its augmentation; None is the window in its middle


@dataclass(frozen=True)
class Files:
    """The images of one split by name; worker processes get a copy, so it holds arrays and no million of objects.

    Args:
        folder: the folder of the split.
        classes: its sub-folders.
        names: file names inside their sub-folder, bytes [N].
        labels: index of the sub-folder of each, int64 [N].
    """

    folder: Path
    classes: tuple[str, ...]
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / self.classes[self.labels[index]] / os.fsdecode(self.names[index].item())

    def spread(self, count: int) -> Files:
        """Return ``count`` files at even distances, so that each class keeps its share; all if there are fewer."""
        count = min(count, len(self))
        chosen = np.arange(count) * len(self) // count if count else np.arange(0)
        return dataclasses.replace(self, names=self.names[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class FolderDataset(Dataset):
    """Two splits of image files, decoded as they are needed.

    Args:
        train, test: the files.
        size: edge in pixels of the square that a network sees.
        device: where batches are put.
    """

    train: Files
    test: Files
    size: int
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # read only
        """Names of the sub-folders, sorted."""
        return self.train.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]  # read only
        """(3, size, size)."""
        return 3, self.size, self.size

    def limit_train(self, count: int) -> FolderDataset:
        """Return the data set with ``count`` training images at even distances: files are sorted by class."""
        return dataclasses.replace(self, train=self.train.spread(count))

    def to(self, device: torch.device) -> FolderDataset:
        """Return the data set with batches on a device; decoding stays on the CPU."""
        return dataclasses.replace(self, device=device)

    def _train_batches(
        self, order: Tensor, slices: Iterator[slice], augmentation: tuple[int, int] | None, workers: int
    ) -> Iterator[Batch]:
        keys: Iterator[list[Key]] = (
            [
                (int(order[position]), "{} {} {}".format(*augmentation, position) if augmentation else None)
                for position in range(positions.start, positions.stop)
            ]
            for positions in slices
        )
        return self._decode(self.train, keys, workers)

    def _test_batches(self, slices: Iterator[slice], workers: int) -> Iterator[Batch]:
        keys: Iterator[list[Key]] = ([(index, None) for index in range(s.start, s.stop)] for s in slices)
        return self._decode(self.test, keys, workers)

    def _decode(self, files: Files, keys: Iterator[list[Key]], workers: int) -> Iterator[Batch]:
        """Turn lists of keys into batches, several lists ahead in worker processes if there are any."""
        on_gpu = self.device.type == "cuda"
        loader: DataLoader[object] = DataLoader(
            Decoder(files, self.size),  # type: ignore[arg-type]  # has all that DataLoader uses
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts_to_the_parent,
            pin_memory=on_gpu,
            generator=torch.Generator(),  # or it would draw a number from the global one
        )
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            images, labels = (tensor.to(self.device, non_blocking=on_gpu) for tensor in batch)
            yield normalise(images, PIXEL_MEAN, PIXEL_STD), labels


@dataclass(frozen=True)
class Decoder:
    """Reads the images of a batch: the side of the loader that worker processes run.

    Args:
        files: what is read.
        size: edge of the results in pixels.
    """

    files: Files
    size: int

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor] | ValueError:
        """Return (pixels uint8 [n, 3, size, size], labels int64 [n]).

        An image that cannot be read makes the error the result: raised here, it would reach the user of a worker inside
        the text of a traceback.
        """
        pixels = np.empty((len(keys), self.size, self.size, 3), np.uint8)
        try:
            for at, (index, seed) in enumerate(keys):
                image = open_image(self.files.path(index))
                if seed is None:
                    pixels[at] = resized_centre(image, self.size)
                else:  # Python promises the numbers of a seed for ever
                    pixels[at] = random_resized_crop(image, self.size, random.Random(seed))
        except ValueError as error:
            return error
        labels = torch.tensor([self.files.labels[index] for index, _ in keys], dtype=torch.int64)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), labels


def _as_it_is(batch: object) -> object:
    return batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Let Ctrl-C, which reaches all processes of a terminal, be answered by the one that knows what to save.

    SIGTERM gets its default back: a forked worker has the handler of the trainer, which would only take note.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load_folder(root: Path, size: int) -> FolderDataset:
    """Find the images ``root/train/CLASS/*`` and ``root/val/CLASS/*`` (or ``root/test``); none is read yet.

    Args:
        root: the folder of the splits; hidden folders and files with other endings than :data:`ENDINGS` are passed by.
        size: edge in pixels of the square that a network sees.

    Raises:
        FileNotFoundError: a split has no folder.
        ValueError: a split has other classes than the other, a class has no image, or the size is not positive.
        ImportError: Pillow is not installed.
    """
    import_extra("PIL.Image")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        fail(ValueError, "image_size", "a positive number of pixels", repr(size))
    folders = [root / "train", next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), root / "val")]
    for folder in folders:  # both before the first is listed
        if not folder.is_dir():
            raise FileNotFoundError(f"data folder: wanted the folder {folder}; it does not exist")
    train, test = (_list(folder) for folder in folders)
    if train.classes != test.classes:
        here, there = (sorted(set(a.classes) - set(b.classes)) for a, b in ((train, test), (test, train)))
        wanted = f"the classes of {train.folder}"
        fail(ValueError, f"data folder: {test.folder}", wanted, f"{here or 'none'} missing, {there or 'none'} unknown")
    return FolderDataset(train, test, size)


def _list(folder: Path) -> Files:
    """List the images of a split, sorted by class and name."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        fail(ValueError, f"data folder: {folder}", "a sub-folder of images for each class", "none")
    names: list[bytes] = []
    counts: list[int] = []
    for name in classes:
        found = sorted(os.fsencode(f) for f in os.listdir(folder / name) if _is_image_name(f))
        if not found:
            wanted = f"at least one image ({', '.join(ENDINGS)})"
            fail(ValueError, f"data folder: {folder / name}", wanted, "none")
        names += found
        counts.append(len(found))
    return Files(folder, tuple(classes), np.array(names), np.repeat(np.arange(len(classes)), counts))


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(ENDINGS)
