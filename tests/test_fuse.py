"""``prepare(..., fuse_activations=True)``: the same network to the bit; nothing is fused that others can see."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import third_party
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, calibrate, prepare, remove, report
from fastqat.models.mobilenetv2 import mobilenetv2

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 4
WEIGHT = QSpec(4, 0, learn="scale", range="minmax")
CONFIG = QConfig(WEIGHT, QSpec(3, learn="scale", grad_scale="lsq", range="minmax"))
ACTIVATIONS = {
    "lsq": CONFIG.activation,
    "lsq+": QSpec(3, symmetric=False, learn="scale+offset"),
    "affine": QSpec(3, symmetric=False, learn="scale+zero_point", ste_mask="unrounded"),
    "signed": QSpec(3, signed=True, learn="scale"),
    "pact": QSpec(3, signed=False, learn="scale", estimator="pact"),
    "running_minmax": QSpec(3, range="running_minmax"),
    "in_hindsight": QSpec(3, range="in_hindsight"),
    "fixed": QSpec(3, signed=False, range="fixed", fixed_range=(0.0, 4.0)),
    "per channel": QSpec(3, 1, learn="scale"),
    "ewgs": QSpec(3, learn="scale", estimator="ewgs"),
}


def small(relu: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Convolution, norm, activation, and once more."""
    torch.manual_seed(1)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for norm in norms:
        nn.init.normal_(norm.weight, 3.0)
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(first, norms[0], relu(), second, norms[1], relu(), nn.Conv2d(4, 2, 1))


def pair(net: nn.Module, config: QConfig = CONFIG) -> tuple[nn.Module, nn.Module]:
    """A network prepared without and with fusing."""
    return prepare(copy.deepcopy(net), config), prepare(copy.deepcopy(net), config, fuse_activations=True)


def one_step(net: nn.Module, inputs: Any, seed: int = 1) -> dict[str, Tensor]:
    """Output, gradients, and the state after an optimizer step."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    y = net(**inputs) if isinstance(inputs, dict) else net(inputs)
    y = y if isinstance(y, Tensor) else y.logits
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    optimizer.step()
    return {"output": y.detach(), **found, **copy.deepcopy(net.state_dict())}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal, name by name."""
    assert one.keys() == other.keys()
    assert [name for name, t in one.items() if not torch.equal(t, other[name])] == []


def fused(net: nn.Module) -> dict[str, str]:
    """Name of each fused module -> its layer."""
    return {row.activation: row.layer for row in report(net).activations if row.layer}


@pytest.mark.parametrize("relu", (nn.ReLU, nn.ReLU6))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_same_network_to_the_bit(name: str, relu: type[nn.Module]) -> None:
    """Ranges, outputs, gradients and state, in three steps of training and in evaluation."""
    one, other = pair(small(relu), QConfig(WEIGHT, ACTIVATIONS[name]))
    assert fused(other) == {"2": "3", "5": "6"} and not fused(one)
    for seed in range(3):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 4
        x[0, 0, 0, 0] = 0.0
        assert_same(one_step(one, x), one_step(other, x))
    assert torch.equal(one.eval()(X), other.eval()(X))
    assert other[3].activation_fake_quant.activation == ("relu6" if relu is nn.ReLU6 else "relu")  # type: ignore[union-attr]


def test_the_quantizer_sees_the_clamp() -> None:
    """Its codes are unsigned, its activation works where it is switched off, and in 16 bits under autocast."""
    one, other = pair(small(nn.ReLU6))
    for net in (one, other):
        calibrate(net, [X, X / 2])
    quantizer: Any = other[3].activation_fake_quant  # type: ignore[union-attr]
    assert quantizer.codes == (0, 7) and torch.equal(quantizer.scale, one[3].activation_fake_quant.scale)  # type: ignore
    assert quantizer(torch.tensor([-5.0])).item() == 0.0
    with fastqat.fake_quant_enabled(other, False), fastqat.fake_quant_enabled(one, False):
        assert quantizer(torch.tensor([-5.0, 5.0, 7.0])).tolist() == [0.0, 5.0, 6.0]
        assert torch.equal(small(nn.ReLU6).eval()(X), other.eval()(X))
        assert_same(one_step(one.train(), X), one_step(other.train(), X))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(one_step(one, X), one_step(other, X))


def test_gradient_by_hand() -> None:
    """2 bits, scale 1: x below 0 and at 0 passes none; the scale gets 3 above, the rounding error between."""
    quantizer = FakeQuant(2, signed=False, learn="scale", range="fixed", scale=torch.ones(1), activation="relu")
    x = torch.tensor([-1.0, 0.0, 0.4, 1.75, 9.0], requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert y.tolist() == [0.0, 0.0, 0.0, 2.0, 3.0]
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 4.0, 8.0, 0.0]
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(4 * -0.4 + 8 * 0.25 + 16 * 3)


def test_mobilenetv2_of_the_library() -> None:
    """All of its activations but one that a sum takes too, and one in front of the pooling."""
    net = mobilenetv2(10, (3, 32, 32), width=0.25, dropout=0.0)
    one, other = pair(net)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_same(one_step(one, x), one_step(other, x))
    rows = report(other).activations
    kept = {row.activation: row.reason for row in rows if not row.layer}
    assert kept == {"features.0.2": "its output has 2 users", "features.18.2": "mean takes its output"}
    assert len(rows) == 35 and "33 of 35" in str(report(other))


def test_mobilenetv2_of_others() -> None:
    """A network whose forward checks its arguments cannot be traced as a whole: its parts can."""
    reason = third_party.why_not("transformers")
    if reason:
        pytest.skip(reason)
    options = {"image_size": 32, "depth_multiplier": 0.35, "tf_padding": False, "classifier_dropout_prob": 0.0}
    inputs = third_party.images(32, "pixel_values")
    model = third_party.of_transformers("MobileNetV2ForImageClassification", inputs, **options)
    torch.manual_seed(0)
    one, other = pair(model.build())
    batch = model.inputs()
    assert_same(one_step(one, batch), one_step(other, batch))
    assert len(fused(other)) == 34


class Twice(nn.Module):
    """One ReLU for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.relu(self.one(self.relu(x))))


class Added(Twice):
    """The output of the ReLU goes past the layer, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        return self.two(x) + x


class OnlyTrained(Twice):
    """The output is used twice in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        return self.two(x) + x if self.training else self.two(x)


class Kept(Twice):
    """Keeps the features for later."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.relu(self.one(x))
        return self.two(self.features)


class CalledTwice(Twice):
    """The layer has another input, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.relu(self.one(x))) + self.two(x)


class Looks(Twice):
    """What runs depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.relu(self.one(x))) if x.sum() > 0 else x


class InPlace(Twice):
    """What the ReLU overwrites is used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.relu.inplace = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(self.relu(x)) + x


def shared() -> nn.Module:
    """A module under two names."""
    relu = nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1), nn.Tanh(), relu, nn.Conv2d(3, 3, 1))


def hooked(on: str) -> Callable[[], nn.Module]:
    """A hook that sees the output."""

    def build() -> nn.Module:
        block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        net = nn.Sequential(block, nn.Conv2d(3, 3, 1))
        net.get_submodule(on).register_forward_hook(lambda *_: None)
        return net

    return build


def overwriting(before: nn.Module) -> Callable[[], nn.Module]:
    """A ReLU that works in place."""
    return lambda: nn.Sequential(before, nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))


def heard() -> nn.Module:
    """A convolution that somebody listens to."""
    conv = nn.Conv2d(3, 3, 1)
    conv.register_forward_hook(lambda *_: None)
    return conv


def chain(*between: nn.Module) -> Callable[[], nn.Module]:
    """Modules between two convolutions."""
    return lambda: nn.Sequential(nn.Conv2d(3, 3, 1), *between, nn.Conv2d(3, 3, 1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], QConfig, str]] = {
    "called twice": (Twice, CONFIG, "it is called 2 times"),
    "two users": (Added, CONFIG, "its output has 2 users"),
    "two users in training": (OnlyTrained, CONFIG, "its output has 2 users"),
    "kept": (Kept, CONFIG, "a module keeps its output"),
    "layer called twice": (CalledTwice, CONFIG, "two, which takes its output, takes other inputs too"),
    "not traced": (Looks, CONFIG, "no part of the model that holds it can be traced"),
    "in place, used again": (InPlace, CONFIG, "it works in place, on what others may hold"),
    "in place, on the input": (overwriting(nn.Identity()), CONFIG, "it works in place, on what others may hold"),
    "in place, heard": (overwriting(heard()), CONFIG, "it works in place, on what others may hold"),
    "shared": (shared, CONFIG, "it is also 4"),
    "hook": (hooked("0.1"), CONFIG, "hooks of 0.1 see its output"),
    "hook of what holds it": (hooked("0"), CONFIG, "hooks of 0 see its output"),
    "hook of the layer": (hooked("1"), CONFIG, "hooks of 1 see its output"),
    "pooling": (chain(nn.ReLU(), nn.MaxPool2d(1)), CONFIG, "2, which takes its output, has no quantizer of its input"),
    "function": (chain(nn.ReLU(), nn.Flatten(2), nn.Unflatten(2, (6, 6))), CONFIG, "2, which takes its output, has no"),
    "last": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), CONFIG, "its output is that of the model"),
    "output": (chain(nn.ReLU()), QConfig(WEIGHT, QSpec(4), "output"), "2, which takes its output, has no quantizer"),
    "weights alone": (chain(nn.ReLU()), QConfig(WEIGHT, None), "2, which takes its output, has no quantizer"),
    "has one": (chain(nn.ReLU()), QConfig(WEIGHT, QSpec(4, activation="relu6")), "has an activation already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_fused(name: str) -> None:
    """The reason is in the report, and the network computes what it did."""
    build, config, reason = REFUSED[name]
    torch.manual_seed(0)
    net = build()
    one, other = pair(net, config)
    (row,) = report(other).activations
    assert not row.layer and reason in row.reason, row
    assert torch.equal(one(X.clone()), other(X.clone()))


def test_in_place_where_nobody_else_looks() -> None:
    """What a layer or a norm has made is seen by the ReLU alone: torchvision's networks are full of these."""
    one, other = pair(small(lambda: nn.ReLU(inplace=True)))
    assert len(fused(other)) == 2
    assert_same(one_step(one, X), one_step(other, X))


class Counts(nn.Module):
    """A forward that changes the module, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = small(), []
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.calls.append(x)
        return self.body(x) + torch.rand(1)


def test_looking_changes_nothing() -> None:
    """Tracing runs the forward of a copy: no count, no random number, no hook of the model itself."""
    net = Counts()
    net.body[1].register_forward_hook(lambda *_: net.calls.append(None))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    prepare(net, CONFIG, fuse_activations=True)
    assert torch.equal(torch.get_rng_state(), before) and net.count.item() == 0 and net.calls == []
    assert len(fused(net)) == 2 and net.training and net.body[1].training


def test_remove_copy_and_save() -> None:
    """remove gives the classes back; a copy, a pickle and a checkpoint compute the same; twice is once."""
    net = small()
    classes, state, x = [type(m) for m in net], copy.deepcopy(net.state_dict()), X[:2]
    expected = net.eval()(x)
    prepare(net, CONFIG, fuse_activations=True)
    assert prepare(net, CONFIG, fuse_activations=True) is net and len(fused(net)) == 2
    with pytest.raises(ValueError, match="fuse_activations: wanted True, as the model was prepared; got False"):
        prepare(net, CONFIG)
    y = net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y) and len(fused(other)) == 2
        remove(other)
        assert [type(m) for m in other] == classes and torch.equal(other(x), expected)
    other = prepare(small().eval(), CONFIG, fuse_activations=True)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), y)
    assert "ReLU, computed by the input quantizer of 3" in str(net)
    remove(net[3])  # the layer alone: its ReLU comes back, wherever it is
    assert type(net[2]) is nn.ReLU and len(fused(net)) == 1
    remove(net)
    assert [type(m) for m in net] == classes and net.state_dict().keys() == state.keys()
    assert torch.equal(net(x), expected)
    assert all(m.__dict__.keys() == n.__dict__.keys() for m, n in zip(net, small(), strict=True))


def test_compiled_as_one_graph() -> None:
    """A fused network compiles without a break, to the same values and gradients."""
    _, net = pair(small())
    calibrate(net, [X])
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    results = one_step(net, X), one_step(compiled, X)
    assert_same(*({name.replace("_orig_mod.", ""): t for name, t in r.items()} for r in results))
