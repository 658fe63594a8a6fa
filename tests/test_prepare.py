"""``prepare``, ``remove`` and ``fake_quant_enabled``: what they keep, what they add, and what they refuse."""

from __future__ import annotations

import copy
import io
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


class Norm(nn.Linear):
    """A subclass that computes something else, with a product that takes no quantized weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight / self.weight.norm())


class Net(nn.Module):
    """Two convolutions, a norm, and two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.other = Norm(4, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
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
    assert {k.split(".")[-2] for k in net.state_dict().keys() - state.keys()} == {
        "weight_fake_quant",
        "activation_fake_quant",
    }
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
    net = prepare(Net(), CONFIG, first_last_bits=8)  # the last one shares its weight with the one before
    assert [m.weight_fake_quant.bits for m in layers(net)] == [8, 4, 8, 8]
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


class Same(nn.Linear):
    """A subclass that computes what its base does."""

    def extra(self) -> int:
        """Something of its own."""
        return self.out_features


def test_subclasses() -> None:
    """One whose product takes no quantized weight is left alone; another one stays what it is, and more."""
    net = nn.Sequential(nn.BatchNorm1d(4), Norm(4, 4), Same(4, 4))
    prepare(net, CONFIG)
    assert type(net[1]) is Norm and type(net[0]) is nn.BatchNorm1d
    assert isinstance(net[2], Same) and isinstance(net[2], fastqat.nn.Linear) and net[2].extra() == 4
    net(torch.randn(3, 4))
    for twin in (copy.deepcopy(net), reloaded(net)):
        assert type(twin[2]) is type(net[2]) and twin[2].weight_fake_quant is not net[2].weight_fake_quant
        assert torch.equal(twin.eval()(torch.ones(3, 4)), net.eval()(torch.ones(3, 4)))
    assert type(fastqat.remove(net)[2]) is Same


def reloaded(net: nn.Module) -> Any:
    """The module from the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(net, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_layers_that_cannot_be_twins() -> None:
    """A computed weight, a forward that was replaced, a sparse gradient, a dtype that no kernel takes."""
    net = nn.ModuleDict(
        {
            "parametrized": parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Identity()),
            "normed": torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
            "replaced": nn.Linear(4, 4),
            "sparse": nn.Embedding(4, 4, sparse=True),
            "wide": nn.Linear(4, 4).double(),
            "fine": nn.Linear(4, 4),
        }
    )
    net["replaced"].forward = lambda x: x
    classes = {name: type(layer) for name, layer in net.items()}
    prepare(net, CONFIG)
    assert type(net["fine"]) is fastqat.nn.Linear
    assert all(type(layer) is classes[name] for name, layer in net.items() if name != "fine")
    reasons = {row.layer: row.reason for row in fastqat.report(net).left_in_float}
    assert reasons["normed"] == "its weight is computed, not a Parameter of its own" == reasons["parametrized"]
    assert reasons["replaced"] == "this Linear had its forward replaced"
    assert reasons["sparse"] == "its gradient is sparse" and reasons["wide"] == "its weight is torch.float64"
    with pytest.raises(ValueError, match=r"got Linear without any; itself: its weight is torch.float64$"):
        prepare(nn.Linear(2, 2).double(), CONFIG)


def test_layers_without_values() -> None:
    """Their ranges cannot be set yet: the message says what to do."""
    for layer in (nn.LazyLinear(3), nn.Linear(3, 3, device="meta")):
        net = nn.Sequential(nn.Linear(3, 3), layer)
        with pytest.raises(ValueError, match="layer '1': wanted a weight to quantize; got one without values"):
            prepare(net, CONFIG)
        assert type(net[0]) is nn.Linear


def test_output_quantizers() -> None:
    """The output on its grid instead of the input."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    float_net = copy.deepcopy(net)
    calibrate(prepare(net, QConfig(None, QSpec(3), activation_on="output")), [X])
    for layer, same, x in ((net[0], float_net[0], X), (net[2], float_net[2], torch.randn(5, 36))):
        y = layer(x)
        assert torch.equal(y, layer.activation_fake_quant(same(x))) and len(y.unique()) <= 8
    with pytest.raises(ValueError, match="activation_on: wanted one of 'input', 'output'; got 'both'"):
        QConfig(activation_on="both")
    with pytest.raises(TypeError, match="weight: wanted a QSpec or None; got 4"):
        QConfig(4)


def test_quantizers_are_in_the_mode_of_their_layer() -> None:
    """In evaluation no range follows the data."""
    net = Net().eval()
    net.one.train()
    prepare(net, CONFIG)
    assert [q.training for q in quantizers(net.body)] == [False] * 4 and net.one.activation_fake_quant.training


def test_preparing_again() -> None:
    """The same configuration changes nothing, another one is refused by name."""
    net = prepare(Net(), CONFIG, first_last_bits=8, overrides={"body.3": None})
    before = dict(net.named_modules())
    assert prepare(net, CONFIG, first_last_bits=8, overrides={"body.3": None}) is net
    assert dict(net.named_modules()) == before
    wanted = (
        r"layer 'body\.0' of a prepared model: wanted .*bits=5.*remove\(model\) .* got QConfig\(weight=QSpec\(bits=8,"
    )
    with pytest.raises(ValueError, match=wanted):
        prepare(net, QConfig(QSpec(5, 0), None))
    with pytest.raises(ValueError, match=r"layer 'body\.3' of a prepared model: wanted QConfig.* got left in float"):
        prepare(net, CONFIG, first_last_bits=8)
    assert dict(net.named_modules()) == before
    prepare(copy.deepcopy(net), CONFIG, first_last_bits=8, overrides={"body.3": None})


def test_remove() -> None:
    """The model that it was: classes, keys, attributes, outputs."""
    net = Net().eval()
    expected, keys = net(X), list(net.state_dict())
    attributes = [set(m.__dict__) for m in net.modules()]
    classes = [type(m) for m in net.modules()]
    prepare(net, CONFIG, overrides={"one": {"bits": 5}, "two": {"bits": 5}, "body.3": None})
    calibrate(net, [X])
    assert not torch.equal(net(X), expected)
    assert fastqat.remove(net) is net
    assert [type(m) for m in net.modules()] == classes and list(net.state_dict()) == keys
    assert [set(m.__dict__) for m in net.modules()] == attributes
    assert torch.equal(net(X), expected)
    assert fastqat.remove(net) is net
    prepare(net, QConfig(QSpec(3, 0)))  # and another configuration


def test_remove_keeps_quantized_weights() -> None:
    """Each weight written once, and computed with as before."""
    net = prepare(Net().eval(), QConfig(QSpec(3, 0, range="running_minmax"), None))
    net.add_module("up", nn.ConvTranspose2d(4, 6, 2, groups=2))
    prepare(net.up, QConfig(QSpec(3, 0), None))
    with torch.no_grad():
        net.one.weight *= 1.5  # as training may leave it: beyond its range
    fastqat.step(net)
    expected, up = net(X), net.up(torch.ones(1, 4, 3, 3))
    fastqat.remove(net.train(), keep="quantized").eval()
    assert not quantizers(net) and torch.equal(net(X), expected)
    assert torch.equal(net.up(torch.ones(1, 4, 3, 3)), up)
    assert all(len(row.unique()) <= 8 for row in net.one.weight)
    with pytest.raises(ValueError, match="keep: wanted one of 'float', 'quantized'; got 'both'"):
        fastqat.remove(net, keep="both")


def test_remove_refuses_a_layer_that_was_parametrized_since() -> None:
    net = prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), CONFIG)
    parametrize.register_parametrization(net[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match="layer '1': wanted the class that prepare gave it; got ParametrizedLinear"):
        fastqat.remove(net)
    assert len(quantizers(net)) == 4


def test_fake_quant_enabled() -> None:
    """Off and on, for good or for a while, and back to what each quantizer was."""
    net = prepare(Net(), CONFIG).eval()
    quantized = net(X)
    net.one.activation_fake_quant.fake_quant_enabled = False
    with fastqat.fake_quant_enabled(net, False):
        assert torch.equal(net(X), fastqat.remove(copy.deepcopy(net))(X))
        assert not torch.equal(net(X), quantized)
    assert not net.one.activation_fake_quant.fake_quant_enabled and net.two.activation_fake_quant.fake_quant_enabled
    fastqat.fake_quant_enabled(net)
    assert torch.equal(net(X), quantized)
    with pytest.raises(ValueError, match="model: wanted a model with quantizers; got Linear without any"):
        fastqat.fake_quant_enabled(nn.Linear(2, 2))


def test_an_error_in_the_last_step_leaves_the_model_as_it_was() -> None:
    """Weights that share a quantizer along different axes, or want different ones."""
    net = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ConvTranspose2d(5, 3, 2))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="layers '0', '1': wanted axis=None for the weight that they share"):
        prepare(net, CONFIG)
    assert type(net[0]) is nn.Conv2d and type(net[1]) is nn.ConvTranspose2d
    prepare(net, QConfig(QSpec(4)))
    assert net[0].weight_fake_quant is net[1].weight_fake_quant
    net = Net()
    with pytest.raises(ValueError, match="layers 'one', 'two': wanted one QSpec for the weight that they share"):
        prepare(net, CONFIG, overrides={"two": {"bits": 7}})
    assert not quantizers(net)
    prepare(net, CONFIG, overrides={"two": None})
    assert net.one.weight_fake_quant is not None and type(net.two) is nn.Linear


def test_a_change_that_fails_half_way_is_undone() -> None:
    """An attribute is in the way of the last layer's quantizer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 4), nn.Linear(4, 4))
    net[-1].activation_fake_quant = "mine"
    keys, classes = list(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(KeyError, match="activation_fake_quant"):
        prepare(net, CONFIG)
    assert [type(m) for m in net.modules()] == classes and list(net.state_dict()) == keys and not quantizers(net)
    assert net[-1].activation_fake_quant == "mine" and "fake_quant_choice" not in net[0].__dict__


def test_prepare_refuses() -> None:
    """A model that has nothing to quantize, bits that do not exist."""
    with pytest.raises(ValueError, match=r"model: wanted a model with layers .* got ReLU without any$"):
        prepare(nn.ReLU(), CONFIG)
    for bits, exception in ((9, ValueError), (0, ValueError), (4.0, TypeError)):
        net = Net()
        with pytest.raises(exception, match=f"bits: wanted .* got {bits}"):
            prepare(net, CONFIG, first_last_bits=bits)
        assert not quantizers(net)


def test_prepare_leaves_a_model_whole_that_it_cannot_quantize() -> None:
    """The last layer is indivisible: no layer is changed."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match="layer '2': group_size: wanted a divisor of the 6 elements"):
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


@pytest.mark.usefixtures("process_group")
def test_prepare_comes_before_data_parallel() -> None:
    """Wrapped before, the processes would not share the gradients of the scales."""
    net = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="model: wanted one .* got DistributedDataParallel at '1'$"):
        prepare(nn.Sequential(nn.Linear(3, 3), net), CONFIG)
    assert type(net.module) is nn.Linear
    prepare(nn.parallel.DistributedDataParallel(prepare(nn.Linear(3, 2), CONFIG)), CONFIG)


@pytest.mark.parametrize("surroundings", (torch.inference_mode, lambda: torch.device("meta")))
def test_prepare_in_other_surroundings(surroundings: Any) -> None:
    """The quantizers are where the model is, and can be trained."""
    net = Net()
    with surroundings():
        prepare(net, QConfig(QSpec(4, 0, range="running_minmax"), QSpec(4, learn="scale")))
    net(X).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net(X).sum().backward()
    assert all(q.initialized and int(q.step) == 1 for q in quantizers(net))


def test_a_quantizer_is_made_on_the_default_device() -> None:
    with torch.device("meta"):
        assert FakeQuant().qrange.device.type == "meta" and FakeQuant(device="cpu").step.device.type == "cpu"
