"""Folders of images: what is found, how it is decoded, and the law of batches with worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastqat.train import data
from fastqat.train.data.images import open_image, random_resized_crop, random_window, resized_centre

SIZE = 16
CLASSES = ("ant", "bee", "cat")
TRAIN_SIZES = [(40, 30), (30, 50), (33, 33), (20, 61)]  # (width, height), of each class

Batch = tuple[torch.Tensor, torch.Tensor]


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 training and 6 test images, in files of several kinds."""
    for c, name in enumerate(reversed(CLASSES)):
        for split, sizes in (("train", TRAIN_SIZES), ("val", TRAIN_SIZES[:2])):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i, size in enumerate(sizes):
                ending = ("png", "JPEG", "bmp", "webp")[i]
                noise(*size, seed=10 * c + i).save(folder / f"{i}.{ending}")
    return tmp_path


def load(root: Path) -> data.FolderDataset:
    dataset = data.load("folder", root, image_size=SIZE)
    assert isinstance(dataset, data.FolderDataset)
    return dataset


def same_batches(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def test_what_is_found(root: Path) -> None:
    (root / "train" / "bee" / "notes.txt").write_text("no image")
    (root / "train" / "bee" / "._0.png").write_text("no image either")
    (root / "train" / ".cache").mkdir()
    dataset = load(root)
    assert dataset.classes == CLASSES and dataset.num_classes == 3 and dataset.image_shape == (3, SIZE, SIZE)
    assert len(dataset.train) == 12 and len(dataset.test) == 6
    batches = list(dataset.train_batches(5, seed=0, epoch=0))
    assert [images.shape for images, _ in batches] == [(5, 3, SIZE, SIZE), (5, 3, SIZE, SIZE), (2, 3, SIZE, SIZE)]
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64 and torch.bincount(labels).tolist() == [4, 4, 4]
    assert torch.cat([labels for _, labels in dataset.test_batches(4)]).tolist() == [0, 0, 1, 1, 2, 2]


def test_size_is_224_by_default(root: Path) -> None:
    assert data.load("folder", root).image_shape == (3, 224, 224)
    for size in (0, -3, 2.5):
        with pytest.raises(ValueError, match=f"image_size: wanted a positive number of pixels; got {size}"):
            data.load("folder", root, image_size=size)  # type: ignore[arg-type]


def test_folder_test_stands_in_for_val(root: Path) -> None:
    (root / "val").rename(root / "test")
    assert len(load(root).test) == 6


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"wanted the folder {root / split}; it does not exist"):
        load(root)


def test_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path / 'train'}: wanted a sub-folder of images for each class; got n"):
        load(tmp_path)


def test_other_classes(root: Path) -> None:
    (root / "val" / "bee").rename(root / "val" / "eel")
    message = rf"{root / 'val'}: wanted the classes of {root / 'train'}; got \['bee'\] missing, \['eel'\] unknown"
    with pytest.raises(ValueError, match=message):
        load(root)


def test_empty_class(root: Path) -> None:
    for file in (root / "train" / "bee").iterdir():
        file.rename(file.with_suffix(".raw"))
    with pytest.raises(
        ValueError, match=rf"{root / 'train' / 'bee'}: wanted at least one image \(.png, .*\); got none"
    ):
        load(root)


def test_needs_root() -> None:
    with pytest.raises(ValueError, match="--root"):
        data.load("folder")


def test_limit_keeps_the_shares_of_classes(root: Path) -> None:
    dataset = load(root)
    assert dataset.limit_train(6).train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.limit_train(3).train.labels.tolist() == [0, 1, 2]
    assert len(dataset.limit_train(100).train) == 12 and len(dataset.limit_train(3).test) == 6
    assert dataset.limit_train(6).train.path(5) == root / "train" / "cat" / "2.bmp"


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_start_and_workers_change_nothing(root: Path, workers: int, start: int) -> None:
    dataset = load(root)
    whole = list(dataset.train_batches(5, seed=1, epoch=2))
    later = list(dataset.train_batches(5, seed=1, epoch=2, start=start, workers=workers))
    assert len(whole) == 3 and same_batches(whole[start:], later)


def test_spawned_workers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(root)
    started = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        batches = list(dataset.train_batches(5, seed=0, epoch=0, workers=1))
    finally:
        multiprocessing.set_start_method(started, force=True)
    assert same_batches(batches, list(dataset.train_batches(5, seed=0, epoch=0)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "test"])
def test_ranks_share_each_batch(root: Path, split: str, workers: int) -> None:
    """The last training batch has 2 images for 3 ranks."""
    dataset = load(root)

    def batches(**options: int) -> list[Batch]:
        if split == "test":
            return list(dataset.test_batches(5, **options))
        return list(dataset.train_batches(5, seed=0, epoch=0, **options))

    ranks = [batches(rank=rank, world_size=3, workers=workers) for rank in range(3)]
    joined = [tuple(torch.cat(column) for column in zip(*slices, strict=True)) for slices in zip(*ranks, strict=True)]
    assert same_batches(joined, batches())  # type: ignore[arg-type]
    sizes = [[len(labels) for _, labels in slices] for slices in zip(*ranks, strict=True)]
    assert all(max(each) - min(each) <= 1 for each in sizes)
    assert split == "test" or 0 in sizes[-1]


def test_seed_epoch_and_position_decide(root: Path) -> None:
    dataset = load(root)

    def images(seed: int, epoch: int, batch_size: int = 5, augment: bool = True) -> torch.Tensor:
        batches = dataset.train_batches(batch_size, seed=seed, epoch=epoch, augment=augment)
        return torch.cat([images for images, _ in batches])

    kinds = [images(0, 0), images(0, 1), images(1, 0), images(0, 0, augment=False)]
    assert torch.equal(kinds[0], images(0, 0, batch_size=7)) and torch.equal(kinds[3], images(0, 0, 7, augment=False))
    assert not any(torch.equal(a, b) for i, a in enumerate(kinds) for b in kinds[:i])


def test_seed_and_epoch_decide_the_augmentation(root: Path) -> None:
    """Of a single image, whose place in the order is always the same."""
    dataset = load(root).limit_train(1)
    images = [next(dataset.train_batches(1, seed=s, epoch=e))[0] for s, e in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_numbers_are_left_alone(root: Path, workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(load(root).train_batches(5, seed=0, epoch=0, workers=workers))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_workers_end_with_the_iterator(root: Path) -> None:
    before = set(multiprocessing.active_children())
    batches: Iterator[Batch] = load(root).train_batches(1, seed=0, epoch=0, workers=2)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del batches
    assert not set(multiprocessing.active_children()) - before


def test_workers_leave_interrupts_to_the_parent(root: Path) -> None:
    before = set(multiprocessing.active_children())
    batches = load(root).train_batches(1, seed=0, epoch=0, workers=1)
    next(batches)  # the worker runs
    for worker in set(multiprocessing.active_children()) - before:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 11


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"this is no image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image(root: Path, content: bytes | None, workers: int) -> None:
    dataset, file = load(root), root / "train" / "bee" / "1.JPEG"
    file.write_bytes(file.read_bytes()[:700] if content is None else content)
    with pytest.raises(ValueError) as caught:
        list(dataset.train_batches(5, seed=0, epoch=0, workers=workers))
    message = str(caught.value)
    assert message.startswith(f"{file}: wanted an image that Pillow can read; got ") and "\n" not in message


def test_image_that_has_gone(root: Path) -> None:
    dataset, file = load(root), root / "val" / "ant" / "0.png"
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}: wanted an image"):
        list(dataset.test_batches(5))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    """Gray values come back as they were, as three equal channels."""
    gray = np.random.RandomState(0).choice([0, 255], (5, 7)).astype(np.uint8)
    Image.fromarray(gray).convert(mode).save(tmp_path / "image.png")
    rgb = open_image(tmp_path / "image.png")
    assert rgb.mode == "RGB" and np.array_equal(np.asarray(rgb), np.repeat(gray[..., None], 3, axis=2))


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: wanted at most 8 bits per channel; got an image of mode I;16"):
        open_image(tmp_path / "deep.png")


def test_normalisation(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        Image.new("RGB", (30, 20), (10, 200, 90)).save(tmp_path / split / "only" / "0.png")
    expected = torch.tensor([(10 / 255 - 0.485) / 0.229, (200 / 255 - 0.456) / 0.224, (90 / 255 - 0.406) / 0.225])
    for images, _ in [*load(tmp_path).test_batches(1), *load(tmp_path).train_batches(1, seed=0, epoch=0)]:
        torch.testing.assert_close(images, expected.view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE), rtol=1e-5, atol=1e-6)


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row, blue a mark of the top left quarter."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def expected_coordinates(first: int, length: int, size: int) -> np.ndarray:
    """Where the centres of ``size`` pixels lie that share ``length`` pixels from ``first``."""
    return first + (np.arange(size) + 0.5) * length / size - 0.5


def test_random_resized_crop_scales_its_window() -> None:
    """On a linear ramp, scaling gives the coordinate of each pixel's centre, but for the rim."""
    image, flips = ramp(200, 150), 0
    for seed in range(200):
        numbers = random.Random(seed)
        left, top, right, bottom = random_window(200, 150, numbers)
        flipped = numbers.random() < 0.5
        square = np.asarray(random_resized_crop(image, SIZE, random.Random(seed))).astype(float)
        columns = expected_coordinates(left, right - left, SIZE)
        columns = columns[::-1] if flipped else columns
        assert np.abs(square[:, 1:-1, 0] - columns[1:-1]).max() <= 1
        assert np.abs(square[1:-1, :, 1] - expected_coordinates(top, bottom - top, SIZE)[1:-1, None]).max() <= 1
        flips += flipped
    assert 70 < flips < 130  # 4 standard deviations


@pytest.mark.parametrize(("width", "height"), [(200, 150), (150, 200), (100, 100), (640, 480)])
def test_windows_have_the_areas_and_ratios_of_the_paper(width: int, height: int) -> None:
    windows = [random_window(width, height, random.Random(seed)) for seed in range(2000)]
    areas, ratios = [], []
    for left, top, right, bottom in windows:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
    rounding = 2 / math.sqrt(0.08 * width * height)  # half a pixel of each edge of the smallest window
    assert 0.08 * (1 - rounding) < min(areas) < 0.1 and 0.8 < max(areas) <= 1
    assert 0.75 * (1 - rounding) < min(ratios) < 0.78 and 1.28 < max(ratios) < 4 / 3 * (1 + rounding)
    assert 0.40 < statistics.median(areas) < 0.54  # 0.54 if every window fitted; large ones often do not
    assert {(w[0] == 0, w[2] == width) for w in windows} >= {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize(
    ("size", "window"),
    [((100, 3), (48, 0, 52, 3)), ((3, 100), (0, 48, 3, 52)), ((1, 50), (0, 24, 1, 25)), ((50, 1), (24, 0, 25, 1))],
)
def test_very_long_images(size: tuple[int, int], window: tuple[int, int, int, int]) -> None:
    """No window of 8 % fits: the largest one in the middle whose ratio is allowed."""
    assert random_window(*size, random.Random(0)) == window


@pytest.mark.parametrize(("width", "height"), [(200, 150), (150, 200), (90, 90), (35, 37)])
def test_resized_centre(width: int, height: int) -> None:
    """224 / 256 of the shorter edge, from the middle of both."""
    square = np.asarray(resized_centre(ramp(width, height), 56)).astype(float)
    side = min(width, height) * 56 / 64
    assert square.shape == (56, 56, 3)
    columns, rows = (expected_coordinates(0, side, 56) + (edge - side) / 2 for edge in (width, height))
    tolerance = side / 56 + 0.5  # the longer edge and the window's corner are whole numbers of scaled pixels
    assert np.abs(square[..., 0] - columns).max() <= tolerance
    assert np.abs(square[..., 1] - rows[:, None]).max() <= tolerance


def test_one_pixel_is_enough() -> None:
    assert resized_centre(ramp(1, 1), SIZE).size == (SIZE, SIZE) == resized_centre(ramp(1, 40), SIZE).size
    assert random_resized_crop(ramp(1, 1), SIZE, random.Random(0)).size == (SIZE, SIZE)
