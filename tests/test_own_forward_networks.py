"""Networks of other packages whose layers have forwards of their own: next to all of their parameters are quantized."""

from __future__ import annotations

import copy
import importlib
from functools import partial
from typing import Any

import pytest
import third_party
import torch
from third_party import BLOCKS, CONFIG, Model, efficientnet_lite, gpt2, images, of_timm, of_transformers, words
from torch import nn

import fastqat

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS: dict[str, Any] = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
OPT = {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}


class Added(nn.Module):
    """A network with an operation that stays in float."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + x.mean((1, 2, 3)).unsqueeze(1)


def layers_of_timm() -> nn.Module:
    """Its convolutions and its linear layer, which all have forwards of their own."""
    timm = importlib.import_module("timm.layers")
    convolutions = [
        timm.Conv2dSame(3, 16, 3, stride=2, bias=False),
        timm.ScaledStdConv2d(16, 32, 3, bias=False),
        timm.ScaledStdConv2dSame(32, 32, 3, stride=2, bias=False),
        timm.StdConv2d(32, 32, 1),
        timm.StdConv2dSame(32, 32, 3),
    ]
    relus = [nn.ReLU() for _ in convolutions]
    body = [layer for pair in zip(convolutions, relus, strict=True) for layer in pair]
    return Added(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), timm.Linear(32, 10)))


NETWORKS = (
    Model(
        "GPT2", "transformers", partial(gpt2, **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=16), words(200, 10)
    ),
    of_transformers("FalconForCausalLM", words(200, 10), **TOKENS, **BLOCKS),
    of_transformers("OPTForCausalLM", words(200, 10), **TOKENS, **BLOCKS, **OPT),
    of_transformers("GemmaForCausalLM", words(200, 10), **TOKENS, **BLOCKS, num_key_value_heads=2, head_dim=8),
    of_timm("tf_mobilenetv3_small_minimal_100", 32),
    Model("layers", "timm", layers_of_timm, images(16)),
)


def importable(model: Model) -> None:
    """Skip, with the reason, where its package does not import."""
    if reason := third_party.why_not(model.package):
        pytest.skip(reason)


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: f"{model.package} {model.name}")
def test_network(model: Model) -> None:
    """All that holds for other networks, and none of their layers with a weight stays in float."""
    importable(model)
    report = third_party.check(model).report
    left = {row.layer: row.kind for row in report.left_in_float if not row.reason.startswith("no quantized twin")}
    assert left == {}
    assert report.quantized_parameters >= 0.96 * report.parameters  # of a network this small, biases are the rest


def test_conv1d_of_gpt2() -> None:
    """One scale for each output channel, a column of its weight; the product is that of the quantized weight."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    net = nn.Sequential(pytorch_utils.Conv1D(6, 4))
    plain = copy.deepcopy(net[0])
    fastqat.prepare(net, fastqat.QConfig(fastqat.QSpec(3, 0), None))
    scale = net[0].weight_fake_quant.scale.detach()
    assert scale.shape == (6,) and isinstance(net[0], pytorch_utils.Conv1D)
    x = torch.randn(2, 3, 4)
    weight = scale * (plain.weight.detach() / scale).round().clamp(-4, 3)
    expected = torch.addmm(plain.bias, x.view(-1, 4), weight).view(2, 3, 6)
    assert torch.equal(net(x), expected)
    fastqat.remove(net, keep="quantized")
    assert torch.equal(net[0].weight, weight)


def test_efficientnet_lite() -> None:
    """EfficientNet-Lite0 of efficientnet-lite-pytorch, whose convolutions pad by themselves."""
    pytest.importorskip("efficientnet_lite_pytorch")
    net: Any = efficientnet_lite().eval()
    fastqat.prepare(net, CONFIG, first_last_bits=8)
    x = torch.randn(1, 3, 64, 64)
    fastqat.calibrate(net, [x])
    report = fastqat.report(net, x)
    assert report.quantized_parameters >= 0.98 * report.parameters and not report.never_ran
    assert {row.kind for row in report.left_in_float} == {"BatchNorm2d"}
    assert net._conv_stem.weight_fake_quant.bits == net._fc.weight_fake_quant.bits == 8
