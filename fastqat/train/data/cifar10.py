"""CIFAR-10 from the files of its binary version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastqat.train.data.memory import MemoryDataset, Split

RECORDS = 10_000  # in each file
RECORD_BYTES = 1 + 3 * 32 * 32  # the label, then the red, green and blue planes
TRAIN_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST_FILES = ["test_batch.bin"]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the usual ones, of ImageNet, for pixels in 0..1


def load_cifar10(root: Path, records: int = RECORDS) -> MemoryDataset:
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
    train = _read([folder / name for name in TRAIN_FILES], records)
    test = _read([folder / name for name in TEST_FILES], records)
    scaled = {"mean": tuple(255 * m for m in MEAN), "std": tuple(255 * s for s in STD)}
    return MemoryDataset(train, test, CLASSES, **scaled, crop_padding=4, flip=True)


def _read(files: list[Path], records: int) -> Split:
    for file in files:  # all of them before the first is read
        if not file.is_file():
            raise FileNotFoundError(f"CIFAR-10, binary version: wanted the file {file}; it does not exist")
        if (size := file.stat().st_size) != records * RECORD_BYTES:
            wanted = f"{records * RECORD_BYTES} bytes ({records} records of {RECORD_BYTES})"
            raise ValueError(f"CIFAR-10: {file}: wanted {wanted}; got {size} bytes")
    data = np.stack([np.fromfile(file, np.uint8).reshape(records, RECORD_BYTES) for file in files])
    labels = data[:, :, 0]  # [files, records]
    if (wrong := np.argwhere(labels >= len(CLASSES))).size:
        file, record = wrong[0]
        raise ValueError(f"CIFAR-10: {files[file]}: record {record}: wanted a label 0..9; got {labels[file, record]}")
    images = np.ascontiguousarray(data[:, :, 1:]).reshape(-1, 3, 32, 32)
    return Split(torch.from_numpy(images), torch.from_numpy(labels.reshape(-1).astype(np.int64)))
