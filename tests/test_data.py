"""Data sets from files that stay in memory: what is loaded, and what is refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable
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


def test_images_have_one_size() -> None:
    assert data.load("digits", image_size=8).image_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="image_size: wanted none, or 8 as the images of digits have; got 32"):
        data.load("digits", image_size=32)


def test_unknown_data() -> None:
    with pytest.raises(ValueError, match="wanted one of digits, cifar10, fashion-mnist, folder; got 'imagenet'"):
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
    normalised = torch.cat([images for images, _ in digits.train_batches(1297, seed=0, epoch=0)])
    assert digits.num_classes == 10 and digits.image_shape == (1, 8, 8) and digits.classes[3] == "3"
    assert abs(normalised.mean()) < 0.02 and abs(normalised.std() - 1) < 0.02


FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FASHION_COUNTS = (5, 3)


def fashion_files() -> dict[str, bytes]:
    """The four files of a tiny Fashion-MNIST; image i is all 10 * i but for its top right pixel, which is 255."""
    files = {}
    for split, count in zip(("train", "t10k"), FASHION_COUNTS, strict=True):
        images = [bytes([10 * i] * 27 + [255] + [10 * i] * 756) for i in range(count)]
        header = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28])
        files[f"{split}-images-idx3-ubyte"] = header + b"".join(images)
        files[f"{split}-labels-idx1-ubyte"] = bytes([0, 0, 8, 1, 0, 0, 0, count]) + bytes(9 - i for i in range(count))
    return files


def write_fashion(folder: Path, changed: dict[str, bytes] | None = None) -> None:
    for name, content in (fashion_files() | (changed or {})).items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_layout(tmp_path: Path, zipped: bool, dotted: bool) -> None:
    for name, content in fashion_files().items():
        name = name.replace("-idx", ".idx") if dotted else name
        (tmp_path / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    loaded = data.load_fashion_mnist(tmp_path, *FASHION_COUNTS)
    assert loaded.train.images.shape == (5, 1, 28, 28) and loaded.test.images.shape == (3, 1, 28, 28)
    assert loaded.train.labels.tolist() == [9, 8, 7, 6, 5] and loaded.test.labels.tolist() == [9, 8, 7]
    assert loaded.train.images[3, 0, 0, 26:].tolist() == [30, 255] and loaded.train.images[3, 0, 27, 0] == 30
    assert loaded.image_shape == (1, 28, 28) and loaded.classes[9] == "Ankle boot"
    images, _ = next(loaded.test_batches(3))
    torch.testing.assert_close(images[2, 0, 5, 5], torch.tensor((20 / 255 - 0.286) / 0.353), rtol=1e-5, atol=0)


def test_fashion_mnist_real_size_is_the_default(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    with pytest.raises(ValueError, match=r"wanted sizes \(60000, 28, 28\) in its header; got \(5, 28, 28\)"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", FASHION)
def test_fashion_mnist_missing_file(tmp_path: Path, name: str) -> None:
    write_fashion(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"wanted the file .*{name}, with or without .gz; it does not exist"):
        data.load_fashion_mnist(tmp_path, *FASHION_COUNTS)


TRAIN_IMAGES, TRAIN_LABELS = FASHION[:2]
BAD_IDX: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "labels as images": (
        TRAIN_IMAGES, lambda x: fashion_files()[TRAIN_LABELS], "begins with 00000803; got 00000801"
    ),
    "type of elements": (TRAIN_IMAGES, lambda x: b"\0\0\x0d" + x[3:], "begins with 00000803; got 00000d03"),
    "empty": (TRAIN_LABELS, lambda x: b"", "begins with 00000801; got nothing"),
    "short header": (TRAIN_LABELS, lambda x: x[:6], r"wanted sizes \(5,\) in its header; got"),
    "another count": (TRAIN_LABELS, lambda x: x[:7] + b"\4" + x[8:-1], r"sizes \(5,\) in its header; got \(4,\)"),
    "another edge": (TRAIN_IMAGES, lambda x: x[:11] + b"\x1d" + x[12:], r"got \(5, 29, 28\)"),
    "truncated": (TRAIN_IMAGES, lambda x: x[:-1], "wanted 3920 bytes behind its header; got 3919"),
    "too long": (TRAIN_IMAGES, lambda x: x + b"\0", "wanted 3920 bytes behind its header; got more"),
    "label": (TRAIN_LABELS, lambda x: x[:-2] + b"\x0a" + x[-1:], "label 3: wanted 0..9; got 10"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD_IDX.values(), ids=BAD_IDX)
def test_fashion_mnist_bad_file(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    write_fashion(tmp_path, {name: change(fashion_files()[name])})
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        data.load_fashion_mnist(tmp_path, *FASHION_COUNTS)


BAD_GZIP: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda x: x[:-9],
    "without its sum": lambda x: x[:-8],
    "wrong sum": lambda x: x[:-8] + bytes([x[-8] ^ 1]) + x[-7:],
    "damaged": lambda x: x[:20] + bytes([x[20] ^ 255]) + x[21:],
    "not zipped": lambda x: gzip.decompress(x),
}


@pytest.mark.parametrize("change", BAD_GZIP.values(), ids=BAD_GZIP)
def test_fashion_mnist_bad_gzip(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    write_fashion(tmp_path)
    (tmp_path / TRAIN_IMAGES).unlink()
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(change(gzip.compress(fashion_files()[TRAIN_IMAGES], mtime=0)))
    with pytest.raises(ValueError, match=f"{TRAIN_IMAGES}.gz: wanted a complete gzip file; got "):
        data.load_fashion_mnist(tmp_path, *FASHION_COUNTS)
