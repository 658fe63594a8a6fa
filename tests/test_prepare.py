"""``prepare`` and ``calibrate``: what they keep, what they add, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, calibrate, prepare

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
CONFIG = QConfig(QSpec(4, 0), QSpec(4))


class Net(nn.Module):
    """Two convolutions, a norm, and two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.attention = nn.MultiheadAttention(4, 1)
        self.spare: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.body(x).mean((2, 3))))


def layers(net: Net) -> list[Any]:
    """The layers that are quantized, and called."""
    return [net.body[0], net.body[3], net.one, net.two]


def quantizers(net: nn.Module) -> list[FakeQuant]:
    """All of a model, each once."""
    return [m for m in net.modules() if isinstance(m, FakeQuant)]


def test_the_model_stays_what_it_was() -> None:
    """The same objects: model, layers, Parameters, hooks, and every key of the state_dict."""
    net = Net()
    calls: list[int] = []
    net.one.register_forward_hook(lambda *_: calls.append(1))
    parts, parameters, state = layers(net), dict(net.named_parameters()), net.state_dict()
    assert prepare(net, CONFIG) is net
    assert all(a is b for a, b in zip(layers(net), parts, strict=True))
    found = dict(net.named_parameters())
    assert all(found[name] is p for name, p in parameters.items())
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    assert {k.split(".")[-2] for k in net.state_dict().keys() - state.keys()} == {"weight_fake_quant"}
    for layer in parts:
        assert isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight_fake_quant.initialized
        assert not layer.activation_fake_quant.initialized
    net(X)
    assert calls == [1]


@pytest.mark.parametrize("training", (True, False))
def test_without_fake_quantization_it_is_the_float_model(training: bool) -> None:
    """Outputs and gradients to the bit."""
    net = Net().train(training)
    twin = prepare(copy.deepcopy(net), CONFIG)
    twin(X), net(X)  # both update their norm
    for q in quantizers(twin):
        q.fake_quant_enabled = False
    results = []
    for model in (net, twin):
        y = model(X)
        y.square().sum().backward()
        results.append([y.detach(), model.one.weight.grad, model.body[0].weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_quantized_layers_compute_what_they_say() -> None:
    """Input and weight on their grids, then torch's own layer."""
    net = prepare(Net(), CONFIG)
    net(X)
    for layer, x, function in (
        (net.body[0], X, lambda x, w, b: nn.functional.conv2d(x, w, b)),
        (net.one, X[:, 0, 0, :4], nn.functional.linear),
    ):
        xq, wq = layer.activation_fake_quant(x), layer.weight_fake_quant(layer.weight)
        assert torch.equal(layer(x), function(xq, wq, layer.bias))
        rows = wq.detach().flatten(1) / layer.weight_fake_quant.scale.detach()[:, None]
        assert not torch.equal(wq, layer.weight) and bool(((rows - rows.round()).abs() < 1e-4).all())


def test_first_and_last_layer() -> None:
    """Their bit-width, weight and input, in the order of the model."""
    net = prepare(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)), CONFIG, first_last_bits=8)
    assert [m.weight_fake_quant.bits for m in net] == [8, 4, 8]
    assert [m.activation_fake_quant.bits for m in net] == [8, 4, 8]
    one = prepare(nn.Sequential(nn.Linear(2, 2)), CONFIG, first_last_bits=7)
    assert one[0].weight_fake_quant.bits == 7


def test_shared_weights_share_a_quantizer() -> None:
    """One per Parameter object; an input has its own."""
    net = prepare(Net(), CONFIG)
    assert net.one.weight_fake_quant is net.two.weight_fake_quant
    assert net.one.activation_fake_quant is not net.two.activation_fake_quant
    twin = copy.deepcopy(net)
    assert twin.one.weight_fake_quant is twin.two.weight_fake_quant is not net.one.weight_fake_quant
    assert twin.one.weight is twin.two.weight


def test_half_of_a_config() -> None:
    """Weights alone, or inputs alone."""
    net = prepare(Net(), QConfig(QSpec(4, 0), None))
    assert net.one.activation_fake_quant is None and net.one.weight_fake_quant is not None
    net(X)
    net = prepare(Net(), QConfig(None, QSpec(4)))
    assert net.one.weight_fake_quant is None and net.one.quantized_weight("cpu") is net.one.weight
    net(X)


def test_other_classes_are_left_alone() -> None:
    """A subclass may compute anything: nn.MultiheadAttention never calls its projection."""
    net = prepare(Net(), CONFIG)
    assert type(net.attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert type(net.body[1]) is nn.BatchNorm2d


def test_calibrate() -> None:
    """Sets the ranges of activations from all batches, in evaluation mode, and gives back every mode."""
    net = prepare(Net(), CONFIG)
    net.body[1].eval()
    modes = [m.training for m in net.modules()]
    norm, weights = net.body[1].running_mean.clone(), net.one.weight_fake_quant.scale.detach().clone()
    batches = [(X, torch.zeros(8)), [2 * X], 3 * X]
    seen: list[tuple[bool, Tensor]] = []
    net.body[0].register_forward_pre_hook(lambda m, args: seen.append((m.training, args[0])))
    assert calibrate(net, iter(batches)) is net
    assert [m.training for m in net.modules()] == modes
    assert [training for training, _ in seen] == [False] * 3
    assert all(torch.equal(x, k * X) for k, (_, x) in zip((1, 2, 3), seen, strict=True))
    assert all(q.initialized for q in quantizers(net))
    assert torch.equal(net.body[1].running_mean, norm)
    assert torch.equal(net.one.weight_fake_quant.scale, weights)
    # relu's output is unsigned; other inputs have negative values
    assert net.body[3].activation_fake_quant.codes == (0, 15) and net.body[0].activation_fake_quant.codes == (-8, 7)


def test_calibrate_takes_every_batch() -> None:
    """The range of all of them; what a range was before does not count."""
    net = prepare(nn.Sequential(nn.Linear(5, 2)), QConfig(None, QSpec(4, range="minmax", signed=True)))
    calibrate(net, [torch.full((1, 5), 700.0)])
    calibrate(net, [torch.full((1, 5), v) for v in (0.5, 3.5, -2.0)])
    assert net[0].activation_fake_quant.scale.item() == 0.5


class Branching(nn.Module):
    """A layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_calibrate_names_what_saw_nothing() -> None:
    """After restoring the modes; the others have their range."""
    net = prepare(Branching(), CONFIG)
    wanted = r"batches: wanted data for every quantizer; got 1 batches, .* none: unused\.activation_fake_quant$"
    with pytest.raises(ValueError, match=wanted):
        calibrate(net, [torch.randn(2, 5)])
    assert net.training and net.used.activation_fake_quant.initialized
    with pytest.raises(ValueError, match=r"got 0 batches, .*: used\.activation_fake_quant, unused\.activation"):
        calibrate(net, [])
    with pytest.raises(ValueError, match="model: wanted a model with quantizers to calibrate; got Linear"):
        calibrate(nn.Linear(2, 2), [torch.zeros(2, 2)])


def test_calibrate_restores_after_an_error() -> None:
    """A batch of the wrong shape leaves no quantizer observing, and the modes as they were."""
    net = prepare(Net(), CONFIG)
    with pytest.raises(RuntimeError):
        calibrate(net, [X, torch.zeros(2, 9, 5, 5)])
    assert all(m.training for m in net.modules())
    assert net.body[0].activation_fake_quant.initialized
    assert not torch.equal(net.body[0].activation_fake_quant(X), X)


def test_prepare_refuses() -> None:
    """A model that has nothing to quantize, one that is prepared, bits that do not exist."""
    with pytest.raises(ValueError, match="model: wanted a model with Linear or Conv2d layers; got ReLU without any"):
        prepare(nn.ReLU(), CONFIG)
    with pytest.raises(ValueError, match="model: wanted a model without quantizers; got one that is prepared already"):
        prepare(prepare(Net(), CONFIG), CONFIG)
    for bits, exception in ((9, ValueError), (0, ValueError), (4.0, TypeError)):
        net = Net()
        with pytest.raises(exception, match=f"bits: wanted .* got {bits}"):
            prepare(net, CONFIG, first_last_bits=bits)
        assert not quantizers(net)


def test_prepare_leaves_a_model_whole_that_it_cannot_quantize() -> None:
    """The last layer is indivisible: no layer is changed."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match="group_size: wanted a divisor of the 6 elements"):
        prepare(net, QConfig(QSpec(4, 0, group_size=4)))
    assert [type(m) for m in net] == [nn.Linear] * 3 and not quantizers(net)
    prepare(net, QConfig(QSpec(4, 0, group_size=2)))
    assert net[0].weight_fake_quant.scale.shape == (8, 4)


def test_quantizer_parameters() -> None:
    """What is learned, each once; nothing of the float model."""
    net = prepare(Net(), QConfig(QSpec(4, 0, learn="scale"), QSpec(4, learn="scale+offset")))
    net(X)
    found = fastqat.quantizer_parameters(net)
    assert len(found) == 3 + 2 * 4  # three different weights; scale and offset of four inputs
    names = {id(p): name for name, p in net.named_parameters()}
    assert all("fake_quant" in names[id(p)] for p in found)
    assert fastqat.quantizer_parameters(prepare(Net(), CONFIG)) == []


def test_calibrate_leaves_the_quantizer_of_a_parametrized_weight_alone() -> None:
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", fastqat.FakeQuant(bits=3, axis=0, learn="scale"))
    model = nn.Sequential(fastqat.FakeQuant(bits=4), layer)
    of_weight = layer.parametrizations.weight[0]
    with torch.no_grad():
        of_weight.scale.mul_(3)  # as training may have left it
    learned = of_weight.scale.clone()
    fastqat.calibrate(model, [torch.randn(5, 6)])
    assert torch.equal(of_weight.scale, learned)
    assert model[0].initialized
