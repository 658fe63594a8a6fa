"""The named networks: shapes, checkpoint keys, shortcuts."""

from __future__ import annotations

import pytest
import torch

from fastqat import models
from fastqat.models.resnet import BasicBlock

BN_KEYS = ["weight", "bias", "running_mean", "running_var"]


def public_resnet20_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the public CIFAR-10 checkpoint of ResNet-20, without its prefix "module."."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3)}
    shapes |= {f"bn1.{key}": (16,) for key in BN_KEYS}
    for stage, (before, channels) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
        for block in range(3):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (channels, before if block == 0 else channels, 3, 3)
            shapes[f"{name}.conv2.weight"] = (channels, channels, 3, 3)
            shapes |= {f"{name}.{bn}.{key}": (channels,) for bn in ("bn1", "bn2") for key in BN_KEYS}
    return shapes | {"linear.weight": (10, 64), "linear.bias": (10,)}


def test_resnet20_has_the_keys_of_the_public_checkpoint() -> None:
    state = models.build("resnet20").state_dict()
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    assert len(counters) == 19
    assert {key: tuple(value.shape) for key, value in state.items() if key not in counters} == public_resnet20_shapes()


def test_resnet20_size_and_output() -> None:
    model = models.build("resnet20", num_classes=7).eval()
    assert sum(parameter.numel() for parameter in models.build("resnet20").parameters()) == 269_722
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    features = model.layer3(model.layer2(model.layer1(torch.randn(2, 16, 32, 32))))
    assert features.shape == (2, 64, 8, 8)


def test_shortcut_is_option_a() -> None:
    x = torch.arange(1.0, 1 + 2 * 4 * 4 * 4).view(2, 4, 4, 4)
    y = BasicBlock(4, 8, 2).shortcut(x)
    assert y.shape == (2, 8, 2, 2)
    assert torch.equal(y[:, 2:6], x[:, :, [0, 2]][:, :, :, [0, 2]])
    assert not y[:, :2].any() and not y[:, 6:].any()
    assert BasicBlock(4, 4, 1).shortcut(x) is x


def test_block_adds_shortcut_before_the_last_relu() -> None:
    block = BasicBlock(4, 4, 1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(block(x), x.relu())


def test_digits_network() -> None:
    model = models.build("digits", num_classes=6).eval()
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 6)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [conv.groups for conv in convolutions] == [1, 16, 1, 32, 1, 64, 1]
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == len(convolutions)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_takes_the_images_it_declares(name: str) -> None:
    model = models.build(name)
    logits = model(torch.randn(4, *models.MODELS[name].image_shape))
    assert logits.shape == (4, 10)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="model: wanted one of digits, resnet20; got 'resnet21'"):
        models.build("resnet21")
