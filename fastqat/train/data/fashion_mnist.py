"""Fashion-MNIST from its IDX files, as they are distributed or unpacked."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from fastqat.ops.checks import fail
from fastqat.train.data.memory import MemoryDataset, Split

TRAIN_IMAGES, TEST_IMAGES, EDGE = 60_000, 10_000, 28
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # the usual ones, of the training images, for pixels in 0..1
UNSIGNED_BYTES = 0x08  # third byte of an IDX file: the type of its elements; the fourth is the number of dimensions


def load_fashion_mnist(root: Path, train_images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES) -> MemoryDataset:
    """Load Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist): 28x28 gray images of ten kinds of clothes.

    Augmentation is the usual one: 4 pixels of padding and a mirror (Zhong et al., "Random Erasing", 2017, section 4).

    Args:
        root: the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same for ``t10k``, each
            as it is or with ".gz"; names with a dot, as in ``train-images.idx3-ubyte``, are taken too.
        train_images, test_images: images of each split.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, is not what its name says, has another size, or a label outside 0..9.
    """
    files = {  # all of them before the first is read
        (split, kind): _find(root, f"{split}-{kind}")
        for split in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    }
    train, test = (
        _read(files[split, "images-idx3-ubyte"], files[split, "labels-idx1-ubyte"], count)
        for split, count in (("train", train_images), ("t10k", test_images))
    )
    return MemoryDataset(train, test, CLASSES, mean=(255 * MEAN,), std=(255 * STD,), crop_padding=4, flip=True)


def _read(images_file: Path, labels_file: Path, count: int) -> Split:
    images = read_idx(images_file, (count, EDGE, EDGE))
    labels = read_idx(labels_file, (count,))
    if (wrong := np.flatnonzero(labels >= len(CLASSES))).size:
        fail(ValueError, f"{labels_file}: label {wrong[0]}", "0..9", labels[wrong[0]])
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _find(root: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")
    candidates = [root / (each + ending) for each in (name, dotted) for ending in ("", ".gz")]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"Fashion-MNIST: wanted the file {root / name}, with or without .gz; it does not exist")
    return found


def read_idx(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of unsigned bytes: two zero bytes, type, number of dimensions, their sizes, then the elements.

    Args:
        file: read through gzip if its name ends in ".gz".
        shape: the sizes that it must have.

    Raises:
        ValueError: its header says something else, or it holds fewer or more bytes.
    """
    header = bytes([0, 0, UNSIGNED_BYTES, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    wanted = int(np.prod(shape))
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            got_header = stream.read(len(header))
            content = stream.read(wanted + 1)  # one more: a longer file shows, and gzip checks its sum at the end
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: wanted a complete gzip file; got {error}") from error
    if got_header[:4] != header[:4]:
        fail(
            ValueError, str(file), f"an IDX file that begins with {header[:4].hex()}", got_header[:4].hex() or "nothing"
        )
    sizes = tuple(int.from_bytes(got_header[at : at + 4], "big") for at in range(4, len(got_header), 4))
    if sizes != shape:
        fail(ValueError, str(file), f"sizes {shape} in its header", sizes)
    if len(content) != wanted:
        got = "more" if len(content) > wanted else len(content)
        fail(ValueError, str(file), f"{wanted} bytes behind its header", got)
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)  # a bytearray: torch wants to own what it holds
