"""The quantized twins of torch's layers: what they compute, along which axis, under autocast and compiled."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prepare import quantizers
from torch import Tensor, nn

import fastqat
from fastqat import QConfig, QSpec, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A layer, and the shape of an input."""

    name: str
    kind: type[nn.Module]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    shape: tuple[int, ...]


CASES = (
    Case("linear", nn.Linear, (5, 6), {}, (2, 3, 5)),
    Case("conv1d", nn.Conv1d, (4, 6, 3), {"padding": 1, "padding_mode": "circular"}, (2, 4, 7)),
    Case("conv2d", nn.Conv2d, (4, 6, 3), {"stride": 2, "padding": "valid"}, (2, 4, 7, 7)),
    Case("conv2d grouped", nn.Conv2d, (4, 6, 3), {"groups": 2, "bias": False}, (2, 4, 7, 7)),
    Case("conv2d depth-wise", nn.Conv2d, (4, 8, 3), {"groups": 4, "dilation": 2}, (2, 4, 7, 7)),
    Case("conv2d without a batch", nn.Conv2d, (4, 6, 3), {}, (4, 7, 7)),
    Case("conv3d", nn.Conv3d, (2, 6, 2), {}, (2, 2, 3, 4, 5)),
    Case("transposed1d", nn.ConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 7)),
    Case("transposed2d", nn.ConvTranspose2d, (4, 6, 3), {"padding": 1}, (2, 4, 5, 5)),
    Case("transposed2d grouped", nn.ConvTranspose2d, (4, 6, 3), {"groups": 2, "stride": 2}, (2, 4, 5, 5)),
    Case("transposed2d depth-wise", nn.ConvTranspose2d, (4, 8, 3), {"groups": 4}, (2, 4, 5, 5)),
    Case("transposed3d", nn.ConvTranspose3d, (2, 6, 2), {"bias": False}, (2, 2, 3, 4, 5)),
)
every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EACH_CHANNEL = QConfig(QSpec(4, 0), None)


def made(case: Case) -> tuple[nn.Module, Tensor]:
    """The layer, with channels of very different size, and an input."""
    torch.manual_seed(0)
    layer = case.kind(*case.arguments, **case.options)
    with torch.no_grad():
        for channel, rows in enumerate(output_channels(layer, layer.weight)):
            rows *= 2.0**channel
    return layer, torch.randn(case.shape)


def output_channels(layer: nn.Module, weight: Tensor) -> list[Tensor]:
    """What of a weight makes each output channel, from the definition of the layers."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return list(weight)
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return [weight[g * ins : (g + 1) * ins, j] for g in range(layer.groups) for j in range(outs)]


@every_layer
def test_off_is_the_float_layer(case: Case) -> None:
    """Output and gradients, bit for bit, the strides of the output included."""
    layer, x = made(case)
    twin = prepare(copy.deepcopy(layer), QConfig(QSpec(4, 0), QSpec(4)))
    assert isinstance(twin, case.kind) and type(twin) is getattr(fastqat.nn, case.kind.__name__)
    fastqat.fake_quant_enabled(twin, False)
    results = []
    for module in (layer, twin):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        results.append((y.stride(), y.detach(), leaf.grad, module.weight.grad))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


@every_layer
def test_axis_0_is_that_of_the_output_channels(case: Case) -> None:
    """Each output channel is that of the float layer with a weight on the grid of that channel alone."""
    layer, x = made(case)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for rows in output_channels(expected, expected.weight):
            rows.copy_(fastqat.FakeQuant(bits=4, signed=True)(rows.clone()))
    twin = prepare(layer, QConfig(QSpec(4, 0, signed=True), None))
    assert twin.weight_fake_quant.scale.shape == (case.arguments[1],)
    assert torch.equal(twin(x), expected(x)) and not torch.equal(twin(x), fastqat.remove(copy.deepcopy(twin))(x))


@every_layer
def test_groups_of_weights(case: Case) -> None:
    """Scales of groups within an output channel, for every kind."""
    layer, x = made(case)
    length = layer.weight.numel() // case.arguments[1]
    twin = prepare(layer, QConfig(QSpec(4, 0, group_size=length), None))
    assert twin.weight_fake_quant.scale.shape == (case.arguments[1], 1)
    alone = prepare(made(case)[0], EACH_CHANNEL)
    assert torch.equal(twin(x), alone(x))


@every_layer
def test_gradients_reach_weight_and_scales(case: Case) -> None:
    """Those of the float layer at the quantized weight and input, where nothing is clipped; scales too."""
    layer, x = made(case)
    learned = QSpec(8, 0, learn="scale", range="minmax", signed=True)
    twin = prepare(copy.deepcopy(layer), QConfig(learned, QSpec(8, learn="scale", range="minmax", signed=True)))
    leaf = x.clone().requires_grad_()
    twin(leaf).square().sum().backward()
    quantized = fastqat.remove(copy.deepcopy(twin), keep="quantized")
    quantized.zero_grad()
    point = twin.activation_fake_quant(x).detach().requires_grad_()
    quantized(point).square().sum().backward()
    torch.testing.assert_close(leaf.grad, point.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(twin.weight.grad, quantized.weight.grad, rtol=1e-5, atol=1e-3)
    scales = fastqat.quantizer_parameters(twin)
    assert len(scales) == 2 and all(bool((scale.grad != 0).all()) for scale in scales)


@every_layer
def test_autocast(case: Case) -> None:
    """The dtype and the values of the float layer, where nothing is quantized."""
    layer, x = made(case)
    twin = prepare(copy.deepcopy(layer), QConfig(QSpec(4, 0), QSpec(4)))
    twin(x)
    fastqat.fake_quant_enabled(twin, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), twin(x)) and twin(x).dtype == torch.bfloat16


@every_layer
def test_the_time_is_that_of_the_weight(case: Case) -> None:
    """An optimizer that owns the weight advances both quantizers, also those of a copy."""
    layer, x = made(case)
    twin = prepare(layer, QConfig(QSpec(4, 0, range="running_minmax"), QSpec(4, range="running_minmax")))
    for net in (twin, copy.deepcopy(twin)):
        before = [int(q.step) for q in quantizers(net)]
        net(x).sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        assert [int(q.step) - n for q, n in zip(quantizers(net), before, strict=True)] == [1, 1]


def test_output_size_of_a_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 4)
    expected = layer(x, output_size=[10, 10])
    prepare(layer, EACH_CHANNEL)
    assert layer(x, output_size=[10, 10]).shape == expected.shape
    fastqat.fake_quant_enabled(layer, False)
    assert torch.equal(layer(x, output_size=[10, 10]), expected)


@pytest.mark.parametrize("options", ({}, {"padding_idx": 1}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}))
def test_embedding(options: dict[str, Any]) -> None:
    """Rows on their grids; off it is the float layer, its bound on the norms and its gradients included."""
    torch.manual_seed(0)
    layer = nn.Embedding(7, 5, **options)
    indices = torch.tensor([[1, 2, 2], [6, 1, 0]])
    twin = prepare(copy.deepcopy(layer), QConfig(QSpec(4, 0), QSpec(4)))
    assert type(twin) is fastqat.nn.Embedding and twin.activation_fake_quant is None
    rows = copy.deepcopy(twin)(indices)
    with fastqat.fake_quant_enabled(twin, False):
        results = []
        for module in (layer, twin):
            y = module(indices)
            (y * torch.arange(5)).sum().backward()
            results.append((y.detach(), module.weight.grad, module.weight.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    scale = twin.weight_fake_quant.scale.detach()
    assert scale.shape == (7,)
    codes = rows.detach() / scale[indices][..., None]
    assert bool(((codes - codes.round()).abs() < 1e-4).all()) and not torch.equal(rows, results[0][0])
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(indices).dtype == torch.float32 == layer(indices).dtype


def test_tied_embedding() -> None:
    """An embedding and the layer that projects back share weight, quantizer and grid."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    net = prepare(Tied(), QConfig(QSpec(3, 0, learn="scale"), QSpec(8)), first_last_bits=6)
    assert net.embed.weight_fake_quant is net.head.weight_fake_quant and net.head.weight_fake_quant.bits == 6
    net(torch.arange(9)).square().sum().backward()
    assert len(fastqat.quantizer_parameters(net)) == 1 and bool((net.embed.weight_fake_quant.scale.grad != 0).all())
    assert [row.shared_with for row in fastqat.report(net).quantizers if row.tensor == "weight"] == [
        ("head",),
        ("embed",),
    ]


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 3, 9)], ids=lambda case: case.name)
def test_compiled(case: Case) -> None:
    """One graph, the same values."""
    layer, x = made(case)
    twin = prepare(layer, QConfig(QSpec(4, 0), QSpec(4)))
    expected = twin(x)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)


def test_a_weight_of_zeros_learns() -> None:
    """It has no range until an optimizer has moved it: a grid set before could round all that it learns to zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    nn.init.zeros_(net[0].weight)
    prepare(net, QConfig(QSpec(8, 0), None))
    assert net[0].weight_fake_quant.scale.shape == (3,)  # all that an optimizer or DDP asks for is there
    x, wanted = torch.randn(32, 4), torch.randn(3, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert not net[0].weight_fake_quant.initialized and torch.equal(net(x), torch.zeros(32, 3))
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) - x @ wanted.T).square().sum().backward()
        optimizer.step()
    assert net[0].weight_fake_quant.initialized
    assert bool((net[0].quantized_weight("cpu") != 0).any())


def test_a_checkpoint_that_keeps_shared_tensors_once(tmp_path: Path) -> None:
    """As safetensors writes it: the quantizer of a tied weight comes back under either name, or is missed by name."""
    safetensors = pytest.importorskip("safetensors.torch")

    def tied(order: tuple[str, ...]) -> nn.Module:
        net = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in order})
        net["a"].weight = net["b"].weight
        return prepare(net, QConfig(QSpec(3, 0, learn="scale"), None))

    for order in (("a", "b"), ("b", "a")):
        net, fresh = tied(order), tied(order)
        safetensors.save_model(net, str(tmp_path / "model.safetensors"))
        fresh["a"].weight_fake_quant.set_grid(torch.ones(3))
        safetensors.load_model(fresh, tmp_path / "model.safetensors")
        assert torch.equal(fresh["a"].weight_fake_quant.scale, net["b"].weight_fake_quant.scale)
        with pytest.raises(RuntimeError, match=r'Missing key.*"[ab]\.weight_fake_quant\.scale"'):
            fresh.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
