"""The law of batches: what they hold depends on seed, epoch and position alone, for every start and number of ranks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fastqat.train import data
from fastqat.train.data.memory import crop_flip, crop_flip_moves


@pytest.fixture
def twenty() -> data.MemoryDataset:
    """20 training and 4 test images of noise, augmented as those of CIFAR-10 are."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 3, 32, 32), generator=generator, dtype=torch.uint8)
    train, test = (data.Split(each, torch.arange(len(each)) % 10) for each in (images[:20], images[20:]))
    means, stds = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)
    return data.MemoryDataset(train, test, tuple("0123456789"), means, stds, crop_padding=4, flip=True)


def image_ramp(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Images whose pixels are all different and none black."""
    return torch.arange(1, n * channels * height * width + 1).view(n, channels, height, width)


def counting(n: int) -> data.MemoryDataset:
    """n images of one pixel, whose values are their labels: 0 to n - 1."""
    split = data.Split(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))
    return data.MemoryDataset(split, split, tuple(map(str, range(n))), mean=(0.0,), std=(1.0,))


def test_an_epoch_visits_every_image_once() -> None:
    dataset = counting(10)
    batches = list(dataset.train_batches(4, seed=0, epoch=0))
    assert [len(labels) for _, labels in batches] == [4, 4, 2] and dataset.train_batch_count(4) == 3
    order = torch.cat([labels for _, labels in batches])
    assert order.tolist() != list(range(10)) and order.sort().values.tolist() == list(range(10))
    assert torch.equal(torch.cat([x for x, _ in batches]).view(-1), order.float())
    assert [labels.tolist() for _, labels in dataset.test_batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_every_order_is_about_equally_frequent() -> None:
    """All 24 orders of 4 images: 100 each are expected of 2,400 epochs, and 4 standard deviations are 40."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(40):
        for epoch in range(60):
            _, labels = next(counting(4).train_batches(4, seed=seed, epoch=epoch))
            counts[tuple(labels.tolist())] = counts.get(tuple(labels.tolist()), 0) + 1
    assert len(counts) == 24 and 60 < min(counts.values()) and max(counts.values()) < 140


def test_order_and_augmentation_follow_seed_and_epoch(twenty: data.MemoryDataset) -> None:
    def images(seed: int, epoch: int) -> torch.Tensor:
        return torch.cat([images for images, _ in twenty.train_batches(8, seed=seed, epoch=epoch)])

    again = {key: images(*key) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 0)]}
    assert all(torch.equal(images(*key), value) for key, value in again.items())
    values = list(again.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    plain = torch.cat([labels for _, labels in twenty.train_batches(8, seed=0, epoch=0, augment=False)])
    assert torch.equal(plain, torch.cat([labels for _, labels in twenty.train_batches(8, seed=0, epoch=0)]))


def test_seed_and_epoch_decide_the_augmentation(twenty: data.MemoryDataset) -> None:
    """Of a single image, whose place in the order is always the same: it has 162 forms."""
    dataset = twenty.limit_train(1)
    for key in ("seed", "epoch"):
        images = [next(dataset.train_batches(1, **({"seed": 0, "epoch": 0} | {key: i})))[0] for i in range(20)]
        assert len({tuple(image.flatten().tolist()) for image in images}) > 10


def test_global_random_numbers_are_left_alone(twenty: data.MemoryDataset) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = list(twenty.train_batches(8, seed=0, epoch=0))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.manual_seed(12345)
    assert same_batches(first, list(twenty.train_batches(8, seed=0, epoch=0)))


def same_batches(a: list[tuple[torch.Tensor, ...]], b: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20, 64])
def test_start_is_the_same_as_skipping(twenty: data.MemoryDataset, batch_size: int) -> None:
    whole = list(twenty.train_batches(batch_size, seed=3, epoch=2))
    assert len(whole) == twenty.train_batch_count(batch_size) == -(-20 // batch_size)
    for start in range(len(whole) + 2):
        assert same_batches(whole[start:], list(twenty.train_batches(batch_size, seed=3, epoch=2, start=start)))


def test_augmentation_depends_on_the_position_alone(twenty: data.MemoryDataset) -> None:
    whole, *others = (
        [torch.cat(column) for column in zip(*twenty.train_batches(n, seed=1, epoch=4), strict=True)]
        for n in (20, 1, 7)
    )
    assert all(same_batches([tuple(whole)], [tuple(other)]) for other in others)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 2), (8, 3), (7, 3), (19, 2), (6, 6), (64, 5)])
def test_ranks_share_each_batch(twenty: data.MemoryDataset, batch_size: int, world_size: int, split: str) -> None:
    """20 training and 4 test images; the last batches of some cases have fewer images than there are ranks."""

    def batches(**shard: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if split == "test":
            return list(twenty.test_batches(batch_size, **shard))
        return list(twenty.train_batches(batch_size, seed=0, epoch=1, start=1, **shard))

    whole, ranks = batches(), [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [tuple(torch.cat(column) for column in zip(*slices, strict=True)) for slices in zip(*ranks, strict=True)]
    assert same_batches(whole, joined)
    for slices in zip(*ranks, strict=True):
        sizes = [len(labels) for _, labels in slices]
        assert max(sizes) - min(sizes) <= 1
        assert all(images.shape == (len(labels), 3, 32, 32) for images, labels in slices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: wanted at least 1; got 0"),
        ({"batch_size": 2, "start": -1}, "start: wanted at least 0; got -1"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank: wanted 0 to 1, for world_size 2; got 2"),
        ({"batch_size": 2, "rank": -1, "world_size": 2}, "rank: wanted 0 to 1, for world_size 2; got -1"),
    ],
)
def test_batches_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(counting(4).train_batches(**arguments, seed=0, epoch=0))


@pytest.mark.parametrize("flip", [False, True])
def test_crop_flip_is_a_window_of_the_padded_image(flip: bool) -> None:
    n, padding = 400, 2
    images = image_ramp(n, 2, 5, 6)
    moves = crop_flip_moves(n, padding, flip, torch.Generator().manual_seed(0))
    augmented = crop_flip(images, padding, moves)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    seen = []
    for i in range(n):
        windows = {
            (top, left, mirrored): window.flip(2) if mirrored else window
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for window in [padded[i, :, top : top + 5, left : left + 6]]
        }
        matches = [where for where, window in windows.items() if torch.equal(window, augmented[i])]
        assert len(matches) == 1
        seen.append(matches[0])
    assert {s[0] for s in seen} == set(range(5)) == {s[1] for s in seen}
    mirrored = sum(s[2] for s in seen)
    assert 160 < mirrored < 240 if flip else mirrored == 0  # 4 standard deviations


def test_no_augmentation_is_the_identity() -> None:
    images = image_ramp(3, 1, 8, 8)
    assert torch.equal(crop_flip(images, 0, crop_flip_moves(3, 0, False, torch.Generator())), images)
    assert torch.equal(crop_flip(images, 4, torch.tensor([[4, 4, 0]] * 3)), images)


def test_limit_train(twenty: data.MemoryDataset) -> None:
    limited = twenty.limit_train(7)
    assert torch.equal(limited.train.images, twenty.train.images[:7]) and len(limited.test) == 4
    assert len(twenty.limit_train(1000).train) == 20
    assert limited.train_batch_count(3) == 3 and len(list(limited.train_batches(3, seed=0, epoch=0))) == 3
