"""The named networks: shapes, checkpoint keys, shortcuts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastqat import models
from fastqat.models.mobilenetv2 import InvertedResidual, MobileNetV2, mobilenetv2, scaled_channels
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
    model = models.build("resnet20", 7).eval()
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
    model = models.build("digits", 6).eval()
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 6)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [conv.groups for conv in convolutions] == [1, 16, 1, 32, 1, 64, 1]
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == len(convolutions)


# Channels, blocks and edge of the last map of each row of table 2, for images of 224 pixels.
TABLE_2 = [(16, 1, 112), (24, 2, 56), (32, 3, 28), (64, 4, 14), (96, 3, 14), (160, 3, 7), (320, 1, 7)]


def edges(model: MobileNetV2, image_edge: int) -> list[int]:
    """Edge of the map behind the stem, behind the last block of each row of table 2, and behind the head."""
    x, found = torch.zeros(1, 3, image_edge, image_edge), []
    for layer in model.eval().features:
        x = layer(x)
        found.append(x.shape[-1])
    last_blocks = [sum(row[1] for row in TABLE_2[: i + 1]) for i in range(len(TABLE_2))]
    return [found[0], *(found[last] for last in last_blocks), found[-1]]


def test_mobilenetv2_is_table_2() -> None:
    model = mobilenetv2(1000)
    blocks = [module for module in model.features if isinstance(module, InvertedResidual)]
    assert [block.conv[-1].num_features for block in blocks] == [c for c, n, _ in TABLE_2 for _ in range(n)]
    assert [block.residual for block in blocks] == [i > 0 for _, n, _ in TABLE_2 for i in range(n)]
    assert edges(model, 224) == [112, *(edge for _, _, edge in TABLE_2), 7]
    assert model.features[0][0].out_channels == 32 and model.features[-1][0].out_channels == 1280


def test_mobilenetv2_has_the_size_of_the_literature() -> None:
    assert sum(parameter.numel() for parameter in mobilenetv2(1000).parameters()) == 3_504_872


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [
        (32, 1.0, 32),
        (16, 0.35, 8),  # 5.6
        (24, 0.5, 16),  # 12: halves go up
        (24, 0.35, 8),  # 8.4
        (32, 0.35, 16),  # 11.2 would lose 29 % at 8
        (24, 1.4, 32),  # 33.6
        (96, 0.75, 72),
        (16, 0.1, 8),
    ],
)
def test_channels_are_rounded_to_8(channels: int, width: float, expected: int) -> None:
    assert scaled_channels(channels, width) == expected


@pytest.mark.parametrize(
    ("image_edge", "stride", "expected"),
    [
        (224, None, [112, 112, 56, 28, 14, 14, 7, 7, 7]),
        (32, None, [32, 32, 32, 16, 8, 8, 4, 4, 4]),  # as in the public networks for CIFAR
        (28, None, [28, 28, 28, 14, 7, 7, 4, 4, 4]),
        (64, None, [64, 64, 32, 16, 8, 8, 4, 4, 4]),
        (8, None, [8, 8, 8, 8, 8, 8, 4, 4, 4]),
        (2, None, [2] * 9),
        (32, 4, [32, 32, 32, 32, 16, 16, 8, 8, 8]),
        (32, 1, [32] * 9),
        (32, 32, [16, 16, 8, 4, 2, 2, 1, 1, 1]),
    ],
)
def test_mobilenetv2_strides_follow_the_image(image_edge: int, stride: int | None, expected: list[int]) -> None:
    model = mobilenetv2(10, (3, image_edge, image_edge), width=0.35, stride=stride)
    assert edges(model, image_edge) == expected


@pytest.mark.parametrize("width", [1.0, 0.35, 1.4])
def test_mobilenetv2_is_the_one_of_transformers(width: float) -> None:
    """Layer by layer: the same weights in the same order give the same maps and logits."""
    transformers = pytest.importorskip("transformers")
    # Theirs pads as TensorFlow does unless told otherwise, and has another epsilon in BN.
    options = {"tf_padding": False, "layer_norm_eps": 1e-5, "hidden_act": "relu6"}
    config = transformers.MobileNetV2Config(depth_multiplier=width, num_labels=10, **options)
    theirs = transformers.MobileNetV2ForImageClassification(config).eval()
    ours = mobilenetv2(10, width=width).eval()
    state = theirs.state_dict()
    for value in state.values():
        if value.is_floating_point() and value.dim() == 1:  # BN and bias, all ones and zeros so far
            value.copy_(torch.rand_like(value) + 0.5)
        elif value.dim() == 4:  # so large that ReLU6 cuts
            value.mul_(20)
    assert [tuple(v.shape) for v in ours.state_dict().values()] == [tuple(v.shape) for v in state.values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(x, output_hidden_states=True)
        torch.testing.assert_close(ours(x), expected.logits, rtol=1e-4, atol=1e-4)
        maps = [x]
        for layer in ours.features[:-1]:
            maps.append(layer(maps[-1]))
    for ours_map, theirs_map in zip(maps[3:], expected.hidden_states, strict=True):  # their stem holds the first block
        torch.testing.assert_close(ours_map, theirs_map, rtol=1e-4, atol=1e-4)


def test_dropout_is_an_option() -> None:
    x = torch.randn(4, 3, 32, 32)
    with_dropout, without = (models.build("mobilenetv2", 10, x.shape[1:], dropout=p, width=0.35) for p in (0.5, 0.0))
    for model, same in ((with_dropout, False), (without, True)):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        assert torch.equal(model(x), model(x)) is same


IMAGES = [("digits", (1, 8, 8)), ("digits", (1, 28, 28)), ("resnet20", (3, 32, 32)), ("mobilenetv2", (3, 32, 32)),
          ("mobilenetv2", (1, 28, 28))]  # fmt: skip


@pytest.mark.parametrize(("name", "image_shape"), IMAGES)
def test_every_model_trains(name: str, image_shape: tuple[int, int, int]) -> None:
    assert {name for name, _ in IMAGES} == set(models.MODELS)
    model = models.build(name, 7, image_shape)
    assert all(module.training for module in model.modules())
    logits = model(torch.randn(4, *image_shape))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


BAD_NAMES = {
    "resnet21": "model: wanted one of digits, resnet20, mobilenetv2, or package.module:callable; got 'resnet21'; "
    "did you mean 'resnet20'?",
    "zzz": "model: wanted one of digits, resnet20, mobilenetv2, or package.module:callable; got 'zzz'",
    "absent.networks:make": "model absent.networks:make: wanted a module 'absent.networks' to import; "
    "got ModuleNotFoundError: No module named 'absent'",
    "broken:make": "model broken:make: wanted a module 'broken' to import; got ZeroDivisionError: division by zero",
    "networks:smal": "model networks:smal: wanted an attribute 'smal' in networks; got none; did you mean 'small'?",
    "networks:": "model networks:: wanted an attribute '' in networks; got none",
    "networks:number": "model networks:number: wanted a callable that returns a torch.nn.Module; "
    "got an object of type int",
    "networks:network": "model networks:network: wanted a callable that returns a torch.nn.Module; "
    "got an object of type Identity",
    "networks:text": "model networks:text: wanted a callable that returns a torch.nn.Module; got str",
    "networks:failing": "model networks:failing: wanted a network from (num_classes=10); got KeyError: 'no weights'",
    "networks:fixed": "model networks:fixed: wanted a network that turns images of shape (1, 4, 4) into 10 logits; "
    "got a result of shape [1, 3] for one image",
    "networks:Pair": "model networks:Pair: wanted a network that turns images of shape (1, 4, 4) into 10 logits; "
    "got a result of type tuple",
}

NETWORKS = """
import torch
from torch import nn

number, network = 3, nn.Identity()

def small(num_classes, hidden=5, *, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), nn.Linear(hidden, num_classes, bias=bias))

def anything(**options):
    return small(**options)

def fixed():
    return small(3)

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.LazyLinear(num_classes))

def text(num_classes):
    return "no network"

def failing(num_classes):
    raise KeyError("no weights")

class Pair(nn.Module):
    def forward(self, x):
        return x, x
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two modules in the current directory; what importing them leaves behind is undone."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("networks", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "message"), BAD_NAMES.items())
def test_bad_model(modules: None, name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        models.build(name, 10, (1, 4, 4))
    assert str(caught.value) == message


def test_own_network(modules: None) -> None:
    """From the current directory, with what it takes: the number of classes, and options."""
    model = models.build("networks:small", 10, (1, 4, 4), hidden=6, bias=False)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(6, 16), (6,), (10, 6)]
    assert models.build("networks:anything", 4, (1, 4, 4), hidden=2)[2].out_features == 4
    assert models.build("networks:fixed", 3, (1, 4, 4))[2].out_features == 3
    assert models.build("torch.nn:Flatten", 16, (1, 4, 4)).training


def test_lazy_layers_get_their_shape(modules: None) -> None:
    model = models.build("networks:lazy", 10, (1, 4, 4))
    assert model[2].weight.shape == (10, 16) and all(module.training for module in model.modules())


BAD_OPTIONS: list[tuple[str, dict[str, object], str]] = [
    ("mobilenetv2", {"widht": 1}, "options of model mobilenetv2: wanted one of width, stride, dropout; got 'widht'; "
     "did you mean 'width'?"),
    ("resnet20", {"width": 1}, "options of model resnet20: wanted none, as it has no options; got 'width'"),
    ("networks:small", {"hiden": 1}, "options of model networks:small: wanted one of hidden, bias; got 'hiden'; "
     "did you mean 'hidden'?"),
    ("networks:small", {"num_classes": 1}, "options of model networks:small: wanted one of hidden, bias; "
     "got 'num_classes'"),
    ("networks:small", {"hidden": "x"}, "model networks:small: wanted a network from (num_classes=10, hidden='x'); got "
     "TypeError"),
    ("mobilenetv2", {"width": 0}, "width: wanted a number above 0; got 0"),
    ("mobilenetv2", {"width": "wide"}, "width: wanted a number above 0; got 'wide'"),
    ("mobilenetv2", {"width": float("inf")}, "width: wanted a number above 0; got inf"),
    ("mobilenetv2", {"stride": 3}, "stride: wanted one of 1, 2, 4, 8, 16, 32; got 3"),
    ("mobilenetv2", {"dropout": 1}, "dropout: wanted a probability below 1; got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_option(modules: None, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        models.build(name, 10, (1, 4, 4), **options)
    assert str(caught.value).startswith(message)
