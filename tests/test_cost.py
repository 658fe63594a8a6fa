"""Multiplications, bit operations and bytes of networks: literals of the literature, and counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastqat
from fastqat import QConfig, QSpec
from fastqat.cost import Cost, cost
from fastqat.models.resnet import resnet20

IMAGE = torch.zeros(1, 3, 32, 32)


def of_resnet20(weight: int, activation: int) -> Cost:
    """ResNet-20 with its first and last layer at 8 bits; activation 32 leaves activations in float."""
    config = QConfig(QSpec(bits=weight, axis=0), QSpec(bits=activation) if activation < 32 else None)
    return cost(fastqat.prepare(resnet20(), config, first_last_bits=8), IMAGE)


@pytest.mark.parametrize(("bits", "giga"), (((3, 8), 0.991), ((3, 4), 0.5096), ((3, 3), 0.389), ((2, 32), 2.68)))
def test_bit_operations_of_resnet20(bits: tuple[int, int], giga: float) -> None:
    """AdaQAT (2404.16876), table III: 0.99, 0.51, 0.39 and 2.7 Gb, the digits beyond by hand from 40.551 M MACs."""
    assert of_resnet20(*bits).bit_operations / 1e9 == pytest.approx(giga, abs=0.0006)


def test_float_resnet20() -> None:
    found = cost(resnet20(), IMAGE)
    assert found.macs == 40_551_040
    assert found.bit_operations == 40_551_040 * 32 * 32
    assert found.weight_compression_rate == 1.0
    assert found.model_bytes == 4 * sum(p.numel() for p in resnet20().parameters())


def test_compression_of_weights() -> None:
    found = of_resnet20(3, 4)
    rates = {row.layer: row.weight_compression_rate for row in found.layers}
    assert rates["layer2.0.conv1"] == pytest.approx(10.7, abs=0.04) and rates["conv1"] == 4.0
    edges = 432 + 640
    assert found.weight_compression_rate == pytest.approx(32 * 268_336 / (3 * (268_336 - edges) + 8 * edges))


def test_kinds_of_layers_by_hand() -> None:
    """Groups, stride, dilation, transposed and 1-d convolutions, a linear layer on three dimensions, an embedding."""
    layers: list[tuple[nn.Module, tuple[int, ...], int]] = [
        (nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3), (2, 6, 7, 5), 2 * 9 * 4 * 3 * 2 * 9),
        (nn.Conv1d(4, 4, 3, dilation=2, groups=4), (1, 4, 9), 4 * 5 * 3),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 3, 3), 2 * 4 * 9 * 3 * 9),
        (nn.Linear(5, 7), (2, 3, 5), 6 * 35),
        (nn.Linear(5, 7, bias=False), (3, 5), 3 * 35),
    ]
    for layer, shape, macs in layers:
        assert [row.macs for row in cost(layer, torch.zeros(shape)).layers] == [macs], layer
    assert cost(nn.Embedding(10, 4), torch.zeros(3, dtype=torch.long)).macs == 0


def test_attention_has_products_of_its_own() -> None:
    """5 tokens of 16: projections 5 * 16 * 64, products 2 * 5 * 5 * 16, which stay in float when layers do not."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = cost(model, torch.zeros(1, 5, 16))
    fastqat.prepare(model, QConfig(QSpec(bits=4, axis=0), QSpec(bits=4)))
    found = {row.layer: row for row in cost(model, torch.zeros(1, 5, 16)).layers}
    assert before.macs == sum(row.macs for row in found.values()) == 5 * 16 * 64 + 800 + 2 * 5 * 16 * 32
    assert found["self_attn"].macs == 5 * 16 * 48 and found["self_attn.out_proj"].macs == 5 * 16 * 16
    assert found[""].macs == 800 and found[""].bit_operations == 800 * 32 * 32


def test_shared_weights_and_second_calls() -> None:
    """A layer that runs twice multiplies twice; a weight of two layers is stored once."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    found = cost(nn.Sequential(first, nn.ReLU(), first, second), torch.zeros(1, 4))
    assert found.macs == 3 * 16 and found.model_bytes == 64
    assert [row.weights for row in found.layers] == [16, 0]


def test_nothing_changes() -> None:
    model = fastqat.prepare(resnet20(), QConfig(QSpec(bits=4, axis=0), QSpec(bits=4, range="minmax")))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost(model, torch.randn(2, 3, 32, 32))
    assert model.training and torch.backends.mha.get_fastpath_enabled()
    assert {q.initialized for n, q in model.named_modules() if n.endswith("activation_fake_quant")} == {False}
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)


def test_the_table_and_the_error() -> None:
    lines = str(of_resnet20(3, 4)).splitlines()
    assert lines[0].split() == ["layer", "bits", "W/A", "weights", "MACs", "bit", "operations"]
    assert lines[1].split() == ["conv1", "8/8", "432", "442,368", "28,311,552"]
    with pytest.raises(ValueError, match="model: wanted a module with Linear"):
        cost(nn.ReLU(), torch.zeros(1))
