"""Whose optimizer steps move the clock of a prepared model, whatever part of it they train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock_networks import (
    NOISY,
    STEPS,
    X,
    backward,
    lora,
    network,
    plain,
    quantizers,
    times,
    train,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastqat
from fastqat import FakeQuant

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*wanted an output that needs a gradient"),  # of layers that are frozen here
]


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


def test_training_inside_the_step_of_another_optimizer() -> None:
    """A search for hyperparameters may train a network in its closure: each step of that training is one."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hyperparameter = nn.Parameter(torch.ones(1))

    def closure() -> Tensor:
        for x in X:
            backward(net, x)
            optimizer.step()
        hyperparameter.grad = torch.zeros(1)
        return hyperparameter.sum()

    torch.optim.LBFGS([hyperparameter], max_iter=1).step(closure)
    assert times(net) == {STEPS}


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
