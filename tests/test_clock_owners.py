"""Whose optimizer steps move the clock of a prepared model; its copies; and the warning where it stands still."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock_networks import (
    CONFIG,
    NOISY,
    STEPS,
    X,
    assert_equal_states,
    backward,
    network,
    plain,
    quantizers,
    times,
    train,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec
from fastqat.nn.clock import PATIENCE
from fastqat.schedules import Schedule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*wanted an output that needs a gradient"),  # of layers that are frozen here
]


class LoRA(nn.Module):
    """A layer whose weights are frozen, with an update of rank 2 beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def lora(net: Any) -> Any:
    net[0], net[2] = LoRA(net[0]), LoRA(net[2])
    return [p for p in net.parameters() if p.requires_grad]


def frozen_backbone(net: Any) -> Any:
    net[0].requires_grad_(False)
    return net[2].parameters()


def head_in_float(net: Any) -> Any:
    """It has no quantizer, and comes after prepare."""
    net.requires_grad_(False)
    net.append(nn.Linear(4, 2))
    return net[-1].parameters()


def scales_alone(net: Any) -> Any:
    net.requires_grad_(False)
    scales = [q.scale for q in quantizers(net) if isinstance(q, FakeQuant)]
    for scale in scales:
        scale.requires_grad_()
    return scales


def one_bias(net: Any) -> Any:
    return [net[2].bias]


def weight_norm(net: Any) -> Any:
    for layer in (net[0], net[2]):
        parametrizations.weight_norm(layer)
    return net.parameters()


def old_weight_norm(net: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for layer in (net[0], net[2]):
            torch.nn.utils.weight_norm(layer)
    return net.parameters()


def other_parameters(net: Any) -> Any:
    for layer in (net[0], net[2]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return [net[0].weight]


def all_frozen(net: Any) -> Any:
    """Nothing is trained, by an optimizer that has nothing else."""
    return [p.requires_grad_(False) for p in net.parameters()]


TRAINED: dict[str, Callable[[Any], Any]] = {
    f.__name__: f
    for f in (
        lora,
        frozen_backbone,
        head_in_float,
        scales_alone,
        one_bias,
        weight_norm,
        old_weight_norm,
        other_parameters,
        all_frozen,
    )
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("changed", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("lead", (0, 1), ids=("first", "after a step"))
def test_what_the_optimizer_holds(changed: Callable[[Any], Any], lead: int) -> None:
    """One step for each of its steps, in all quantizers, whatever part of the model as it is now it trains."""
    net = network()
    train(net, plain(net), lead)
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(changed(net), lr=0.1)

    def iterate(x: Tensor) -> None:
        loss = net(x).square().mean()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()

    train(net, iterate)
    assert times(net) == {STEPS + lead}
    ranges = [q for q in quantizers(net) if isinstance(q, FakeQuant) and q.range == "in_hindsight"]
    assert len(ranges) == 2 and all(int(q.observed_step) == STEPS + lead - 1 for q in ranges)


@pytest.mark.parametrize("changed", (lora, head_in_float, old_weight_norm))
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_noise_is_new_in_each_step(changed: Callable[[Any], Any]) -> None:
    """Noise that stays the same is a bias: over many steps the mean of a quantized weight is the weight."""
    net = network(NOISY)
    optimizer = torch.optim.SGD(changed(net), lr=0.0)
    seen = []
    layer = getattr(net[0], "base", net[0])
    for x in X:
        net(x).square().mean().backward()
        seen.append(layer.weight_fake_quant(layer.weight).detach())
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


def test_peft() -> None:
    """A library that puts adapters into a prepared model."""
    peft = pytest.importorskip("peft")
    net = network()
    tuned = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    train(tuned, plain(tuned))
    assert times(net) == {STEPS}


def test_a_stranger_moves_nothing() -> None:
    """Two networks and their optimizers, as in a GAN: each has the time of its own, whoever else runs or steps."""
    one, other = network(), network()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (one, other)]
    strangers = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for number, x in enumerate(X):
        (one(x).sum() + other(x).sum()).backward()
        optimizers[0].step()
        strangers.step()
        if number % 2:
            optimizers[1].step()
    assert times(one) == {STEPS} and times(other) == {STEPS // 2}


def test_a_frozen_network_beside_a_trained_one() -> None:
    """An optimizer that has both changes the one that it trains."""
    teacher, student = network().requires_grad_(False), network()
    torch.optim.SGD([*teacher.parameters(), *student.parameters()], lr=0.1).step()
    assert times(teacher) == {0} and times(student) == {1}


def test_a_stranger_that_becomes_an_owner() -> None:
    """Parameters that a model takes in later, whose optimizer has long made steps, count from then on."""
    net = network().requires_grad_(False)
    head = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.step()
    net.append(head)
    backward(net, X[0])
    optimizer.step()
    assert times(net) == {1}
    del net[-1]
    backward(net, X[0].requires_grad_())
    optimizer.step()
    assert times(net) == {1}


def test_optimizers_that_take_turns() -> None:
    """Each with a forward pass of its own: each of their steps is one. Without, they are one."""
    net = network()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (net[0], net[2])]
    for optimizer in optimizers * 2:
        backward(net, X[0])
        optimizer.step()
    assert times(net) == {4}
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert times(net) == {7}


def test_lbfgs() -> None:
    """A step of many evaluations of its closure is one."""
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.01, max_iter=4)
    for x in X:
        optimizer.step(lambda x=x: backward(net, x))
    assert times(net) == {STEPS}


def test_scaled_gradients() -> None:
    """A gradient scaler that finds an infinity makes no step: neither does the fused optimizer that it asks to skip."""
    for fused in (False, True):
        net = network(NOISY)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        for factor in (1.0, torch.inf, 1.0):
            net.zero_grad()
            scaler.scale(net(X[0]).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert times(net) == {2}


@pytest.mark.parametrize("options", ({}, {"fused": True}), ids=("default", "fused"))
def test_compiled(options: dict[str, bool]) -> None:
    """A compiled step is one; a compiled forward needs no graph more from step to step."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    net = network()
    backward(net, X[0])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, **options)
    counter = CompileCounter()
    forward = torch.compile(net, backend=counter, fullgraph=True)
    step = torch.compile(optimizer.step, backend="eager")
    for x in X:
        backward(forward, x)
        step()
    assert times(net) == {STEPS} and counter.frame_count == 1


# Copies.


def by_pickle(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", (copy.deepcopy, by_pickle))
@pytest.mark.parametrize("lead", (0, 2), ids=("new", "trained"))
def test_a_copy_has_a_clock_of_its_own(copied: Callable[[nn.Module], nn.Module], lead: int) -> None:
    """Trained alone, under LoRA or plainly, it counts its own steps, and the model that it is of counts none."""
    net = network()
    train(net, plain(net), lead)
    twins = [copied(net), copied(nn.ModuleDict({"net": net}))["net"]]  # type: ignore[index]
    train(net, plain(net))
    for twin in twins:
        assert times(twin) == {lead}
        train(twin, plain(twin))
        assert_equal_states(twin, net)
    torch.optim.SGD(lora(twins[0]), lr=0.1).step()
    assert times(twins[0]) == {lead + STEPS + 1} and times(net) == times(twins[1]) == {lead + STEPS}


def test_a_copied_layer_follows_its_weight() -> None:
    """A layer alone knows no model."""
    net: Any = network()
    layer = copy.deepcopy(net[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(X[0])
    optimizer.step()
    assert times(layer) == {1} and times(net) == {0}


def test_a_layer_outlives_its_model() -> None:
    """It follows its weight when the model is gone."""
    net: Any = network()
    layer = net[0]
    del net
    gc.collect()
    layer(X[0])
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert times(layer) == {1}


def test_nothing_is_kept_alive() -> None:
    """Neither the model by its clock, nor by an optimizer that has made steps."""
    net = network()
    optimizer, stranger = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, nn.Linear(2, 2)))
    net(X[0])
    optimizer.step(), stranger.step()
    gone = weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert gone() is None
    stranger.step()


def test_parameters_that_are_swapped() -> None:
    """swap_module_params refuses parameters with a weak reference: no clock of a model has one."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net = network(QConfig(QSpec(3, axis=0, oscillation=Oscillation(0.4, 0.9)), QSpec(4)))
        backward(net, X[0])
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        net.zero_grad()
        net.to(torch.bfloat16)
        assert net[0].weight.dtype == torch.bfloat16 and net[0].weight_fake_quant.scale.dtype == torch.float32
        backward(net, X[0].bfloat16())
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert times(net) == {2}


def test_remove_takes_the_clock_away() -> None:
    """A model that is prepared again has one that works."""
    net = network()
    attributes = set(fastqat.remove(copy.deepcopy(net)).__dict__)
    assert attributes == set(nn.Sequential().__dict__)
    again = fastqat.prepare(fastqat.remove(net), CONFIG)
    train(again, plain(again))
    assert times(again) == {STEPS}


# The warning.

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


# By hand.


def test_by_hand_alone() -> None:
    """fastqat.step adds one each time; from then on no optimizer does. Of a part of a model, for that part."""
    net: Any = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        fastqat.step(net[0])
        backward(net, X[0])
        optimizer.step()
    assert times(net[0]) == {2} and times(net[2]) == {2}
    fastqat.step(net)
    fastqat.step(net)
    optimizer.step()
    assert times(net[0]) == {4} and times(net[2]) == {3}
