"""Data sets by name, and an iterator over their batches whose every image depends on seed, epoch and position alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastqat.ops.checks import fail
from fastqat.train.data.batches import Batch, Dataset
from fastqat.train.data.cifar10 import load_cifar10
from fastqat.train.data.digits import load_digits
from fastqat.train.data.fashion_mnist import load_fashion_mnist
from fastqat.train.data.folder import FolderDataset, load_folder
from fastqat.train.data.memory import MemoryDataset, Split

__all__ = [
    "DATASETS",
    "Batch",
    "Dataset",
    "FolderDataset",
    "MemoryDataset",
    "Split",
    "load",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_folder",
]

_IN_ONE_SIZE: dict[str, Callable[[Path], Dataset]] = {"cifar10": load_cifar10, "fashion-mnist": load_fashion_mnist}
DATASETS = ("digits", *_IN_ONE_SIZE, "folder")  # digits alone need no root
DEFAULT_IMAGE_SIZE = 224  # of "folder"


def load(name: str, root: Path | None = None, *, image_size: int | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: one of :data:`DATASETS`.
        root: the folder with its files, for those that have files.
        image_size: edge in pixels of the square that a network sees, for "folder" (None is 224); the images of the
            other data sets have one size, and are taken as they are.

    Raises:
        ValueError: unknown name, no root where one is needed, a size the images do not have, or a file with wrong
            content.
        FileNotFoundError: a file is missing.
        ImportError: scikit-learn or Pillow is missing.
    """
    if name not in DATASETS:
        fail(ValueError, "data", f"one of {', '.join(DATASETS)}", repr(name))
    if name == "digits":
        dataset: Dataset = load_digits()
    elif root is None:
        raise ValueError(f"data {name}: wanted --root DIR, the folder of its files; got none")
    elif name == "folder":
        return load_folder(root, DEFAULT_IMAGE_SIZE if image_size is None else image_size)
    else:
        dataset = _IN_ONE_SIZE[name](root)
    if image_size not in (None, dataset.image_shape[-1]):
        fail(ValueError, "image_size", f"none, or {dataset.image_shape[-1]} as the images of {name} have", image_size)
    return dataset
