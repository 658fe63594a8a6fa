"""Transition rate scheduling against its equations in float64, beside optimizers of torch that nothing else changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import Oscillation, QConfig, QSpec, Schedule
from fastqat.transition_rate import LARGEST, RULES, TransitionRateScheduler

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-3),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
}


TRACKED = Oscillation()


def network(bits: int = 2, oscillation: Oscillation | None = TRACKED, **options) -> nn.Module:
    """Two tracked layers, whose scales stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    config = QConfig(QSpec(bits=bits, range="minmax", learn="scale", oscillation=oscillation, **options), None)
    return with_fixed_scales(fastqat.prepare(model, config))


def with_fixed_scales(model: nn.Module) -> nn.Module:
    for scale in fastqat.quantizer_parameters(model):
        scale.requires_grad_(False)
    return model


def weights_of(model: nn.Module) -> list[Tensor]:
    return [model[0].weight, model[2].weight]


def codes_of(model: nn.Module) -> list[Tensor]:
    """Codes of the weights as they are, by the equation of the grid."""
    found = []
    for i in (0, 2):
        q = model[i].weight_fake_quant
        found.append((model[i].weight.detach() / q.scale.detach()).round().clamp(*q.codes))
    return found


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
    model.zero_grad()
    (model(x) - y).square().mean().backward()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_equations(name: str, rule: str) -> None:
    """Factors by the equations in float64 from codes that are compared here; weights by an optimizer beside it.

    The twin's optimizer takes the same gradients, and its update is scaled by hand.
    """
    steps, m, lam, gain = 30, 0.8, 0.05, 3.0
    model, schedule = network(), Schedule("cosine", 1.0, 0.0, steps, begin=0.0)
    twin = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](weights_of(model))
    twin_optimizer = OPTIMIZERS[name](weights_of(twin))
    scheduler = TransitionRateScheduler(optimizer, model, lam=lam, schedule=schedule, momentum=m, rule=rule, gain=gain)
    running, factor = [lam * math.sqrt(2)] * 2, [1.0, 1.0]
    previous: list[Tensor] = []
    moved = 0
    for step in range(steps):
        codes = codes_of(model)
        backward(model, step)
        for ours, theirs in zip(weights_of(model), weights_of(twin), strict=True):
            theirs.grad = ours.grad.clone()
            theirs.data.copy_(ours)
        before = [w.detach().clone() for w in weights_of(twin)]
        optimizer.step()
        twin_optimizer.step()
        target = lam * math.sqrt(2) * schedule(step)
        for i, weight in enumerate(weights_of(model)):
            if previous:
                changed = int((codes[i] != previous[i]).sum())
                assert int(model[2 * i].weight_fake_quant.tracker.counts[3]) == changed
                rate = changed / codes[i].numel()
                moved += changed > 0
                running[i] = m * running[i] + (1 - m) * rate
                if rule == "additive":
                    factor[i] = max(0.0, factor[i] + gain * (target - running[i]))
                elif rule == "unsmoothed":
                    factor[i] *= target / (running[i] + 1e-8)
                else:
                    factor[i] = m * factor[i] + (1 - m) * factor[i] * target / (running[i] + 1e-8)
            want = before[i].double() + factor[i] * (weights_of(twin)[i].detach() - before[i]).double()
            torch.testing.assert_close(weight.detach().double(), want, rtol=1e-5, atol=1e-6)
        found = scheduler.rates()
        assert [r.running for r in found] == pytest.approx(running, rel=1e-4)
        assert [r.factor for r in found] == pytest.approx(factor, rel=1e-3, abs=1e-6)
        assert found[0].target == pytest.approx(target, rel=1e-5, abs=1e-9)
        previous = codes
    assert moved > 5, "no code has ever changed: nothing was tested"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_switched_off_is_the_plain_optimizer(name: str) -> None:
    """Bit for bit; and so is a scheduler that was removed."""
    for way in ("disabled", "removed"):
        plain, model = network(), network()
        optimizers = [OPTIMIZERS[name](weights_of(net)) for net in (plain, model)]
        scheduler = TransitionRateScheduler(optimizers[1], model)
        if way == "disabled":
            scheduler.enabled = False
        else:
            scheduler.remove()
        for step in range(5):
            for net, optimizer in zip((plain, model), optimizers, strict=True):
                backward(net, step)
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(model), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_of_one_changes_no_bit(name: str) -> None:
    """The additive rule without gain keeps q at 1."""
    plain, model = network(), network()
    optimizers = [OPTIMIZERS[name](weights_of(net)) for net in (plain, model)]
    TransitionRateScheduler(optimizers[1], model, rule="additive", gain=0.0)
    for step in range(5):
        for net, optimizer in zip((plain, model), optimizers, strict=True):
            backward(net, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(model), strict=True))


def test_no_transitions() -> None:
    """k = 0: K decays from R^0 by m a step from the second step on; bounds keep the factor from growing without end."""
    model = network()
    for weight in weights_of(model):
        weight.requires_grad_(False)
    weights = weights_of(model)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    scheduler = TransitionRateScheduler(optimizer, model, lam=0.01, bounds=(0.0, 10.0))
    for step in range(200):
        model(torch.randn(2, 6))
        optimizer.step()
        scheduler_rates = scheduler.rates()
        assert scheduler_rates[0].rate == 0.0
        assert scheduler_rates[0].running == pytest.approx(0.01 * 2**0.5 * 0.99**step, rel=1e-4)
    assert scheduler.rates()[0].factor < 10**3
    assert scheduler.factor.isfinite().all()


def test_frozen_weights_leave_the_count() -> None:
    with pytest.warns(UserWarning, match="freezes after one or two"):
        model = network(oscillation=Oscillation(momentum=0.9, freeze_threshold=0.5))
    optimizer = torch.optim.SGD(weights_of(model), lr=2.0)
    scheduler = TransitionRateScheduler(optimizer, model, rule="additive", gain=0.0)
    seen = False
    for step in range(60):
        backward(model, step)
        optimizer.step()
        tracker = model[0].weight_fake_quant.tracker
        frozen, transitions = int(tracker.counts[2]), int(tracker.counts[3])
        if step and frozen < 48:
            assert scheduler.rates()[0].rate == pytest.approx(transitions / (48 - frozen))
            seen |= frozen > 0 and transitions > 0
    assert seen, "no step had both frozen weights and transitions"


def test_nothing_left_to_move() -> None:
    """All weights frozen: q stays. No code ever changes: q ends at a bound, and an update of 0 stays 0."""
    with pytest.warns(UserWarning, match="freezes after one or two"):
        model = network(oscillation=Oscillation(momentum=0.9, freeze_threshold=0.5))
    optimizer = torch.optim.SGD(weights_of(model), lr=0.0)
    scheduler = TransitionRateScheduler(optimizer, model, rule="unsmoothed")
    for step in range(300):
        if step == 2:  # the state of one layer says that all of it is frozen
            model[0].weight_fake_quant.tracker.counts[2] = 48
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
    assert scheduler.rates()[0].factor == pytest.approx(1 / 0.99, rel=0.02)  # of the one step before
    assert scheduler.rates()[1].factor == pytest.approx(LARGEST)
    assert all(weight.isfinite().all() for weight in weights_of(model))


@pytest.mark.parametrize("rule", RULES)
def test_on_the_target_the_rate_stays(rule: str) -> None:
    """3 of 24 codes change in each step, and 3/24 is the target."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    fastqat.prepare(model, QConfig(QSpec(bits=2, range="minmax", learn="scale", oscillation=TRACKED), None))
    scale = model[0].weight_fake_quant.scale.item()
    model[0].weight.data.zero_()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.5)
    scheduler = TransitionRateScheduler(optimizer, model, lam=3 / 24 / 2**0.5, rule=rule)
    for step in range(60):
        model(torch.zeros(1, 6))
        wanted = torch.zeros(24)
        wanted[: 3 * ((step + 1) % 2)] = scale  # of which 3 change between 0 and 1
        model[0].weight.grad = (model[0].weight.detach() - wanted.view(4, 6)) / 0.5
        optimizer.step()
        if step:
            assert scheduler.rates()[0].rate == 3 / 24
    found = scheduler.rates()[0]
    assert (found.running, found.target) == pytest.approx((3 / 24, 3 / 24), rel=1e-6)
    assert found.factor == pytest.approx(1.0, rel=2e-5)


@pytest.mark.parametrize(
    "rule, lr, within", (("multiplicative", 0.3, 0.02), ("multiplicative", 0.003, 0.02), ("additive", 0.003, 0.1))
)
def test_transitions_follow_the_target(rule: str, lr: float, within: float) -> None:
    """A toy regression with noisy gradients, between codes: over a window, about N * sum(R) codes change."""
    torch.manual_seed(0)
    steps, begin, n, lam = 1000, 300, 2000, 0.02
    model = nn.Sequential(nn.Linear(n, 1, bias=False))
    config = QConfig(QSpec(bits=3, range="minmax", learn="scale", oscillation=TRACKED), None)
    layer, goal = fastqat.prepare(model, config)[0], torch.rand(n) * 6 - 3.5
    layer.weight_fake_quant.set_grid(torch.ones(1))
    layer.weight.data.copy_(goal)
    schedule = Schedule("cosine", 1.0, 0.25, steps, begin=0.0)
    optimizer = torch.optim.SGD([layer.weight], lr=lr)
    TransitionRateScheduler(optimizer, model, lam=lam, schedule=schedule, rule=rule, gain=3.0, momentum=0.9)
    changed, wanted = 0, 0.0
    for step in range(steps):
        y = layer.quantized_weight("cpu")
        layer.weight.grad = (y.detach() - goal) + torch.randn(1, n)
        optimizer.step()
        if step >= begin:
            changed += int(layer.weight_fake_quant.tracker.counts[3])
            wanted += lam * 3**0.5 * schedule(step) * n
    assert changed == pytest.approx(wanted, rel=within)


def test_learning_rate_schedulers_multiply() -> None:
    """U = q times the rate of the moment, which torch's scheduler halves."""
    model = network()
    optimizer = torch.optim.SGD(weights_of(model), lr=0.1)
    scheduler = TransitionRateScheduler(optimizer, model, lam=0.01, rule="unsmoothed", momentum=0.5)
    halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(6):
        backward(model, step)
        before = [w.detach().clone() for w in weights_of(model)]
        optimizer.step()
        for rates, weight, was in zip(scheduler.rates(), weights_of(model), before, strict=True):
            assert weight.grad is not None
            wanted = was - 0.1 * 0.5**step * rates.factor * weight.grad
            torch.testing.assert_close(weight.detach(), wanted, rtol=1e-5, atol=1e-6)
        halving.step()
    assert scheduler.rates()[0].factor != 1


def test_resumed_is_uninterrupted() -> None:
    """state_dict of model, optimizer and scheduler; then the same steps with the same bits."""

    def run(model: nn.Module, optimizer, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step()

    model = network()
    optimizer = OPTIMIZERS["sgd"](weights_of(model))
    scheduler = TransitionRateScheduler(optimizer, model, lam=0.02)
    run(model, optimizer, range(8))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    run(model, optimizer, range(8, 16))

    other = network()
    other_optimizer = OPTIMIZERS["sgd"](weights_of(other))
    other_scheduler = TransitionRateScheduler(other_optimizer, other, lam=0.02)
    for target, state in zip((other, other_optimizer, other_scheduler), saved, strict=True):
        target.load_state_dict(state)
    run(other, other_optimizer, range(8, 16))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(other), strict=True))
    assert scheduler.rates() == other_scheduler.rates()


def test_a_step_of_evaluation_and_micro_batches_count_once() -> None:
    """Several forward passes in a step, and evaluation between them, are one transition count."""
    model, twin = network(), network()
    optimizers = [OPTIMIZERS["sgd"](weights_of(net)) for net in (model, twin)]
    schedulers = [TransitionRateScheduler(o, net) for o, net in zip(optimizers, (model, twin), strict=True)]
    for step in range(10):
        model.eval()(torch.randn(2, 6))
        model.train()(torch.randn(2, 6))
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            backward(net, step)
            optimizer.step()
    assert schedulers[0].rates() == schedulers[1].rates()


def test_a_tensor_that_was_not_used_says_nothing() -> None:
    """A step without a forward pass of a layer leaves its rate, as the optimizer may still move its weight."""
    model = network()
    optimizer = OPTIMIZERS["sgd"](weights_of(model))
    scheduler = TransitionRateScheduler(optimizer, model)
    for step in range(5):
        backward(model, step)
        optimizer.step()
    before = scheduler.rates()
    optimizer.step()
    assert [(r.running, r.factor) for r in scheduler.rates()] == [(r.running, r.factor) for r in before]


def test_errors() -> None:
    model = network()
    optimizer = torch.optim.SGD(weights_of(model), lr=0.1)
    with pytest.raises(
        ValueError, match=r"model: wanted quantized weights that are tracked .*; got Sequential without"
    ):
        TransitionRateScheduler(optimizer, network(oscillation=None))
    with pytest.raises(ValueError, match="optimizer: wanted one that owns all tracked weights; got one without 2$"):
        TransitionRateScheduler(torch.optim.SGD([model[0].weight], lr=0.1), model)
    for options, message in (
        ({"lam": 0.0}, "lam: wanted a positive number; got 0.0"),
        ({"momentum": 1.0}, "momentum: wanted 0 <= momentum < 1; got 1.0"),
        ({"rule": "S1"}, "rule: wanted one of 'multiplicative', 'additive', 'unsmoothed'; got 'S1'"),
        ({"bounds": (2.0, 3.0)}, "bounds: wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            TransitionRateScheduler(optimizer, model, **options)
    with pytest.raises(TypeError, match="schedule: wanted a fastqat.Schedule or None; got 'cosine'"):
        TransitionRateScheduler(optimizer, model, schedule="cosine")
    scheduler = TransitionRateScheduler(optimizer, model)
    state = scheduler.state_dict()
    state["factor"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"state 'factor': wanted shape \[2\]; got \[3\]"):
        scheduler.load_state_dict(state)
