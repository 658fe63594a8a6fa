"""``calibrate``: ranges from batches of any kind, what it restores, and what it names."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from test_prepare import CONFIG, Net, X, quantizers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastqat
from fastqat import QConfig, QSpec, calibrate, prepare, ranges

pytestmark = pytest.mark.usefixtures("one_thread")


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
    wanted = r"for every quantizer; got 1 batches, .* none: unused\.weight_fake_quant, unused\.activation_fake_quant$"
    with pytest.raises(ValueError, match=wanted):
        calibrate(net, [torch.randn(2, 5)])
    assert net.training and net.used.activation_fake_quant.initialized
    with pytest.raises(ValueError, match=r"got 0 batches, .*: used\.weight_fake_quant, used\.act.*, unused\.weight"):
        calibrate(net, [])
    with pytest.raises(ValueError, match="model: wanted a model with quantizers to calibrate; got Linear"):
        calibrate(nn.Linear(2, 2), [torch.zeros(2, 2)])


def test_calibrate_restores_after_an_error() -> None:
    """A batch of the wrong shape leaves no quantizer observing, and ranges and modes as they were."""
    net = prepare(Net(), CONFIG)
    with pytest.raises(RuntimeError):
        calibrate(net, [X, torch.zeros(2, 9, 5, 5)])
    assert all(m.training for m in net.modules())
    assert not net.body[0].activation_fake_quant.initialized
    assert not torch.equal(net.body[0].activation_fake_quant(X), X)


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


class Named(nn.Module):
    """A model that takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, features: Tensor, *, factor: float) -> Tensor:
        return self.layer(features * factor)


@pytest.mark.parametrize("estimator", ranges.ESTIMATORS)
def test_every_kind_of_batch(estimator: str) -> None:
    """Mappings are keyword arguments, a forward takes what it likes; the ranges are those of the same tensors."""
    x = torch.randn(4, 3)
    config = QConfig(None, QSpec(4, range=estimator))
    expected = calibrate(prepare(Named().layer, config), [2 * x, x]).activation_fake_quant
    nets = [prepare(Named(), config) for _ in range(2)]
    calibrate(nets[0], [{"features": x, "factor": 2.0}, {"features": x, "factor": 1.0}])
    calibrate(nets[1], ["double", "single"], forward=lambda net, word: net(x, factor=2.0 if word == "double" else 1.0))
    for net in nets:
        assert torch.equal(net.layer.activation_fake_quant.scale, expected.scale)


def test_a_layer_that_is_gone_past() -> None:
    """Its activation has no quantizer that could miss data: the one of its weight is named."""

    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.past = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.seen(x), self.past.weight)

    net = prepare(Past(), CONFIG, overrides={"past": QConfig(QSpec(4, 0), None)})
    with pytest.raises(ValueError, match=r"got 1 batches, in which these saw none: past\.weight_fake_quant$"):
        calibrate(net, [torch.randn(2, 3)])


def test_a_layer_called_twice() -> None:
    """One quantizer sees both inputs."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(10 * x)

    net = prepare(Twice(), QConfig(None, QSpec(4, range="minmax", signed=True)))
    calibrate(net, [torch.tensor([[0.7, 0.1]])])
    assert net.layer.activation_fake_quant.scale.item() == 1.0


class Terminal:
    """Text output that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        """Keep the text."""
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing to do."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.mark.parametrize("package", ("rich", "tqdm", None))
def test_progress(package: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar where stderr is a terminal and a package draws it; nothing elsewhere, and the same ranges."""
    if package is not None:
        pytest.importorskip(package)
    for other in {"rich.progress", "tqdm"} - {"rich.progress" if package == "rich" else package}:
        monkeypatch.setitem(sys.modules, other, None)
    terminal = Terminal()
    net = prepare(Net(), CONFIG)
    monkeypatch.setattr(sys, "stderr", terminal)
    calibrate(net, [X], progress=False)
    assert terminal.text == ""
    calibrate(net, iter([X, X]))
    assert ("calibrating" in terminal.text) is (package is not None)
    assert all(q.initialized for q in quantizers(copy.deepcopy(net)))


def test_a_compiled_model_runs_eagerly() -> None:
    """Nothing is compiled while quantizers only observe; afterwards the ranges are those of the compiled code too."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    net = prepare(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), CONFIG)
    compiled, x = torch.compile(net, backend=backend), torch.randn(5, 3)
    calibrate(compiled, [x, 2 * x])
    assert not graphs
    expected = net(x)
    assert torch.equal(compiled(x), expected) and len(graphs) == 1


@pytest.mark.parametrize("estimator", ranges.ESTIMATORS)
def test_the_sign_is_that_of_all_batches(estimator: str) -> None:
    """A negative value makes the codes signed whenever it comes, whatever the sign was before; without one they are
    unsigned, and the range is that of the same tensors with the sign given."""
    x = torch.tensor([[0.5, 1.0, 3.0]])
    for batches, signed in (([x, -2 * x], True), ([x, 2 * x], False)):
        nets = [
            prepare(nn.Sequential(nn.Linear(3, 2)), QConfig(None, QSpec(4, range=estimator, signed=sign)))
            for sign in (None, signed)
        ]
        nets[0](-x if not signed else x)  # decides the other way
        for net in nets:
            calibrate(net, batches)
        free, given = (net[0].activation_fake_quant for net in nets)
        assert free.codes == given.codes == ((-8, 7) if signed else (0, 15))
        assert torch.equal(free.scale, given.scale)


def test_a_checkpoint_brings_its_sign() -> None:
    """Also to a quantizer whose first tensor gave it the other one."""
    nets = [prepare(nn.Sequential(nn.Linear(3, 2)), CONFIG) for _ in range(2)]
    for net, x in zip(nets, (-torch.ones(1, 3), torch.ones(1, 3)), strict=True):
        net(x)
    nets[1].load_state_dict(nets[0].state_dict())
    assert nets[1][0].activation_fake_quant.codes == (-8, 7)


@pytest.mark.parametrize("estimator", ranges.ESTIMATORS)
def test_batches_without_a_value(estimator: str) -> None:
    """Empty, or without a finite value: no data for a range, and no part in it."""
    net = prepare(nn.Sequential(nn.Linear(3, 2)), QConfig(None, QSpec(4, range=estimator)))
    blind = [torch.full((2, 3), torch.nan), torch.full((2, 3), torch.inf), torch.empty(0, 3)]
    with pytest.raises(ValueError, match=r"got 3 batches, in which these saw none: 0\.activation_fake_quant$"):
        calibrate(net, blind)
    assert not net[0].activation_fake_quant.initialized
    x = torch.randn(4, 3)
    calibrate(net, [*blind, x])
    scale = net[0].activation_fake_quant.scale.clone()
    calibrate(net, [x])
    assert torch.equal(net[0].activation_fake_quant.scale, scale)
    each = fastqat.FakeQuant(4, axis=0, range=estimator)
    assert each(torch.empty(0, 3)).shape == (0, 3) and each(x).shape == (4, 3)
