"""One warning where the time of a model that needs it stands still while it trains, and none elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from clock_networks import (
    NOISY,
    STEPS,
    X,
    backward,
    network,
    plain,
    times,
    train,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec
from fastqat.nn.clock import PATIENCE
from fastqat.schedules import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

NEEDY = {
    "tracking": QConfig(QSpec(3, axis=0, oscillation=Oscillation(0.4)), None),
    "dampening": QConfig(QSpec(3, axis=0, dampening=fastqat.Dampening(Schedule("linear", 0.0, 1.0, 10))), None),
    "noise": NOISY,
    "hindsight": QConfig(None, QSpec(4, range="in_hindsight")),
    "running": QConfig(None, QSpec(4, range="running_minmax")),
    "gradient range": QConfig(None, None, gradient=fastqat.GradientQSpec(method="in_hindsight", rounding="nearest")),
    "gradient noise": QConfig(None, None, gradient=fastqat.GradientQSpec(method="minmax")),
}
PATIENT = {
    "learned": QConfig(QSpec(3, axis=0, learn="scale"), QSpec(4, learn="scale")),
    "estimated": QConfig(QSpec(3, axis=0), QSpec(4)),
    "gradient": QConfig(None, None, gradient=fastqat.GradientQSpec(method="minmax", rounding="nearest")),
}


@pytest.mark.parametrize("config", NEEDY.values(), ids=NEEDY)
def test_a_clock_that_stands_still_warns_once(config: QConfig) -> None:
    """After as many training forwards, with the name of a layer and the cure; none before, and none after it."""
    net = network(config)
    train(net, lambda x: (backward(net, x), None)[1], PATIENCE - 1)
    with pytest.warns(UserWarning, match=r"quantizer '0\..*_fake_quant'.*fastqat\.step\(model\)") as seen:
        for _ in range(2 * PATIENCE):
            backward(net, X[0])
    assert len(seen) == 1
    assert times(net) == {0}


@pytest.mark.parametrize("config", PATIENT.values(), ids=PATIENT)
def test_no_warning_where_nothing_needs_time(config: QConfig) -> None:
    """Ranges that are learned or estimated once need none."""
    net = network(config)
    train(net, lambda x: (backward(net, x), None)[1], 2 * PATIENCE)


def evaluated(net: nn.Module) -> None:
    backward(net.eval(), X[0])


def without_gradients(net: nn.Module) -> None:
    with torch.no_grad():
        net(X[0])


def calibrated(net: nn.Module) -> None:
    fastqat.calibrate(net, [X[0]])


def stepped_by_hand(net: nn.Module) -> None:
    backward(net, X[0])
    fastqat.step(net)


def trained(net: nn.Module) -> None:
    plain(net)(X[0])


@pytest.mark.parametrize("use", (evaluated, without_gradients, calibrated, stepped_by_hand, trained))
def test_no_warning(use: Callable[[nn.Module], None]) -> None:
    """What is no training, and what moves the time, does not warn."""
    net = network(QConfig(None, QSpec(4, range="running_minmax")))
    train(net, lambda x: use(net), 2 * PATIENCE)


def accumulated(net: nn.Module) -> None:
    net(X[0]).square().mean().backward()


def without_a_backward_pass(net: nn.Module) -> None:
    net(X[0]).detach()


@pytest.mark.parametrize("use", (accumulated, without_a_backward_pass))
@pytest.mark.parametrize("name", ("tracking", "noise"))
def test_forwards_that_want_no_step(use: Callable[[nn.Module], None], name: str) -> None:
    """Gradients that pile up over many batches, and a generator whose critic trains."""
    net = network(NEEDY[name])
    train(net, lambda x: use(net), 4 * PATIENCE)
    with pytest.warns(UserWarning, match="time stands still"):  # by an optimizer that nobody sees
        for _ in range(2 * PATIENCE):
            backward(net, X[0])


@pytest.mark.parametrize("to_none", (True, False))
@pytest.mark.parametrize("before", (True, False))
def test_gradients_that_are_cleared_in_other_ways(to_none: bool, before: bool) -> None:
    """An optimizer that nobody sees is said, however it clears gradients: before the forward pass or after it."""
    net = network(NEEDY["tracking"])
    with pytest.warns(UserWarning, match="time stands still"):
        for _ in range(PATIENCE + 1):
            if before:
                net.zero_grad(to_none)
            loss = net(X[0]).square().mean()
            if not before:
                net.zero_grad(to_none)
            loss.backward()


def test_a_warning_of_compiled_forwards() -> None:
    """A model that gets gradients, while the steps of optimizers that own nothing of it go by."""
    net = network(NOISY)
    net(X[0])
    forward = torch.compile(net, backend="eager", fullgraph=True)
    masters = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    with pytest.warns(UserWarning, match=r"weight_fake_quant'.*fastqat\.step\(model\)"):
        for _ in range(PATIENCE):
            backward(forward, X[0])
            optimizer.step()


def test_an_idle_model_warns_of_nothing() -> None:
    """One that is prepared while another one trains."""
    idle, net = network(), network()
    train(net, plain(net), 3 * PATIENCE)
    assert times(idle) == {0}


def test_a_bare_quantizer_that_stands_still() -> None:
    """One that no prepare made warns too: of a weight, and of a tensor that is none."""
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", FakeQuant(4, axis=0, oscillation=Oscillation(0.4)))
    for call in (layer, FakeQuant(4, estimator="stochastic")):
        with pytest.warns(UserWarning, match="'FakeQuant'.*fastqat.step"):
            for _ in range(PATIENCE):
                call(X[0])


def test_a_layer_that_is_called_many_times_in_a_pass() -> None:
    """A recurrent network's own layer is no reason for a warning."""
    net = network(NOISY)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def iterate(x: Tensor) -> None:
        hidden = x
        for _ in range(2 * PATIENCE):
            hidden = torch.cat([net(hidden), x[:, :2]], 1)
        net.zero_grad()
        hidden.sum().backward()
        optimizer.step()

    train(net, iterate)
    assert times(net) == {STEPS}
