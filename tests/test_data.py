"""Data sets: what is loaded, what is refused, and how batches are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastqat.train import data

RECORDS = 4  # images per file of the CIFAR-10 made here
NAMES = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
]
DIGITS_TRAIN_LABELS = [9, 1, 5, 2, 2, 1, 9, 8, 4, 3, 3, 0]
DIGITS_TEST_LABELS = [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]


def record(label: int, red: int, green: int, blue: int) -> bytes:
    """One image of a single colour, whose top left red pixel is 255 and whose second red pixel is 1."""
    return bytes([label, 255, 1] + [red] * 1022 + [green] * 1024 + [blue] * 1024)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        (folder / name).write_bytes(b"".join(record((i + j) % 10, 10 * i, 10 * i + j, 7) for j in range(RECORDS)))
    return tmp_path


def image_ramp(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Images whose pixels are all different and none black."""
    return torch.arange(1, n * channels * height * width + 1).view(n, channels, height, width)


def test_cifar_layout(cifar: Path) -> None:
    loaded = data.load_cifar10(cifar, RECORDS)
    assert loaded.train.images.shape == (20, 3, 32, 32) and loaded.train.images.dtype == torch.uint8
    assert loaded.test.images.shape == (4, 3, 32, 32)
    assert loaded.train.labels.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6, 4, 5, 6, 7]
    assert loaded.test.labels.tolist() == [5, 6, 7, 8]
    image = loaded.train.images[9]  # file 3, record 1
    assert image[:, 0, :3].tolist() == [[255, 1, 20], [21, 21, 21], [7, 7, 7]]
    assert image[:, 31, 31].tolist() == [20, 21, 7]


def test_cifar_folder_itself(cifar: Path) -> None:
    inner = data.load_cifar10(cifar / "cifar-10-batches-bin", RECORDS)
    assert torch.equal(inner.train.images, data.load_cifar10(cifar, RECORDS).train.images)


def test_cifar_normalisation(cifar: Path) -> None:
    loaded = data.load_cifar10(cifar, RECORDS)
    images, labels = next(loaded.test_batches(3))
    assert images.shape == (3, 3, 32, 32) and labels.tolist() == [5, 6, 7]
    expected = torch.tensor([(50 / 255 - 0.485) / 0.229, (52 / 255 - 0.456) / 0.224, (7 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(images[2, :, 5, 5], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_cifar_missing_file(cifar: Path, name: str) -> None:
    (cifar / "cifar-10-batches-bin" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"wanted the file .*{name}; it does not exist"):
        data.load_cifar10(cifar, RECORDS)


@pytest.mark.parametrize("change", [-1, 1])
def test_cifar_wrong_size(cifar: Path, change: int) -> None:
    file = cifar / "cifar-10-batches-bin" / "data_batch_4.bin"
    file.write_bytes((file.read_bytes() + b"\0")[: RECORDS * 3073 + change])
    wanted = rf"data_batch_4.bin: wanted 12292 bytes \(4 records of 3073\); got {12292 + change} bytes"
    with pytest.raises(ValueError, match=wanted):
        data.load_cifar10(cifar, RECORDS)


def test_cifar_real_size_is_the_default(cifar: Path) -> None:
    with pytest.raises(ValueError, match="wanted 30730000 bytes"):
        data.load_cifar10(cifar)


def test_cifar_wrong_label(cifar: Path) -> None:
    file = cifar / "cifar-10-batches-bin" / "test_batch.bin"
    content = bytearray(file.read_bytes())
    content[2 * 3073] = 10
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch.bin: record 2: wanted a label 0..9; got 10"):
        data.load_cifar10(cifar, RECORDS)


def test_cifar_needs_root() -> None:
    with pytest.raises(ValueError, match="--root"):
        data.load("cifar10")


def test_unknown_data() -> None:
    with pytest.raises(ValueError, match="wanted one of digits, cifar10; got 'imagenet'"):
        data.load("imagenet")


def test_digits_split_is_fixed_and_complete() -> None:
    digits, again = data.load("digits"), data.load("digits")
    assert digits.train.images.shape == (1297, 1, 8, 8) and digits.test.images.shape == (500, 1, 8, 8)
    assert (
        digits.train.labels[:12].tolist() == DIGITS_TRAIN_LABELS
        and digits.test.labels[:12].tolist() == DIGITS_TEST_LABELS
    )
    assert torch.equal(digits.train.images, again.train.images)
    assert torch.bincount(torch.cat([digits.train.labels, digits.test.labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    normalised = digits.normalise(digits.train.images)
    assert abs(normalised.mean()) < 0.02 and abs(normalised.std() - 1) < 0.02


def test_an_epoch_visits_every_image_once() -> None:
    images = image_ramp(10, 1, 1, 1).to(torch.uint8)
    dataset = data.Dataset(
        data.Split(images, images.view(-1).long()), data.Split(images, images.view(-1).long()), 11, (0.0,), (1.0,)
    )
    batches = list(dataset.train_batches(4, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    order = torch.cat([labels for _, labels in batches])
    assert order.tolist() != list(range(1, 11)) and order.sort().values.tolist() == list(range(1, 11))
    assert torch.equal(torch.cat([x for x, _ in batches]).view(-1), order.float())
    assert [labels.tolist() for _, labels in dataset.test_batches(4)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_order_and_augmentation_follow_the_seed(cifar: Path) -> None:
    loaded = data.load_cifar10(cifar, RECORDS)

    def epochs(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.cat([images for images, _ in loaded.train_batches(8, generator)]) for _ in range(2)]

    first, second = epochs(5)
    assert all(torch.equal(a, b) for a, b in zip((first, second), epochs(5), strict=True))
    assert not torch.equal(first, second) and not torch.equal(first, epochs(6)[0])


def test_random_crop_flip_is_a_window_of_the_padded_image() -> None:
    n, padding = 200, 2
    images = image_ramp(n, 2, 5, 6)
    augmented = data.random_crop_flip(images, padding, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    seen = set()
    for i in range(n):
        windows = {
            (top, left, flip): window.flip(2) if flip else window
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for window in [padded[i, :, top : top + 5, left : left + 6]]
        }
        matches = [where for where, window in windows.items() if torch.equal(window, augmented[i])]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {s[0] for s in seen} == set(range(5)) == {s[1] for s in seen} and {s[2] for s in seen} == {False, True}


def test_no_augmentation_is_the_identity() -> None:
    images = image_ramp(3, 1, 8, 8)
    assert torch.equal(data.random_crop_flip(images, 0, False, torch.Generator()), images)


def test_limit_train(cifar: Path) -> None:
    loaded = data.load_cifar10(cifar, RECORDS)
    limited = loaded.limit_train(7)
    assert limited.train.labels.tolist() == [0, 1, 2, 3, 1, 2, 3] and len(limited.test) == 4
    assert len(loaded.limit_train(1000).train) == 20
