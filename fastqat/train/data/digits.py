"""The handwritten digits that scikit-learn carries: data for a machine without files or network."""

from __future__ import annotations

import numpy as np
import torch

from fastqat.train.data.memory import MemoryDataset, Split
from fastqat.train.extras import import_extra

TEST_IMAGES = 500


def load_digits() -> MemoryDataset:
    """Load the 1,797 handwritten 8x8 digits that scikit-learn carries; 500 of them, always the same, are for testing.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    digits = import_extra("sklearn.datasets").load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))  # NumPy promises this stream for ever
    images = torch.from_numpy(digits.images[order].astype(np.uint8)).unsqueeze(1)  # [1797, 1, 8, 8], pixels 0..16
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    test, train = Split(images[:TEST_IMAGES], labels[:TEST_IMAGES]), Split(images[TEST_IMAGES:], labels[TEST_IMAGES:])
    return MemoryDataset(train, test, classes=tuple("0123456789"), mean=(4.9,), std=(6.0,))
