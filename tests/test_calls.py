"""Calls that are kept from step to step: whatever changes between two steps, the results are those of one by one."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import fastqat
from fastqat import Dampening, FakeQuant, Oscillation, QConfig, QSpec, Schedule
from fastqat.nn import calls

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
OSCILLATION = Oscillation(0.1, 0.25)
PLAIN = QSpec(3, learn="scale", range="minmax")
TRACKED = QSpec(3, axis=0, learn="scale", oscillation=OSCILLATION, dampening=Dampening(0.3))
STOCHASTIC = QSpec(3, axis=0, learn="scale", estimator="stochastic")
FOLLOWING = QSpec(3, axis=0, range="running_minmax", oscillation=OSCILLATION)
EWGS = QSpec(3, axis=0, learn="scale", estimator="ewgs")


def network(spec: QSpec, together: bool) -> nn.Sequential:
    """Layers whose quantizers see the weight, and in the middle one that sees a view of it."""
    torch.manual_seed(0)
    up = nn.ConvTranspose1d(4, 3, 2)
    net = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (4, 1)), up, nn.Flatten(), nn.Linear(6, 2))
    fastqat.prepare(net, QConfig(spec, None))
    if together:
        fastqat.quantize_weights_together(net)
    return net


def step(net: nn.Module, number: int) -> list[Tensor]:
    """Train for a step, with a kick that makes weights oscillate; returns outputs and gradients."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05)
    y = net(X)
    (y.float() - 1).square().mean().backward()
    optimizer.step()
    seen = [y.detach(), *(torch.zeros(()) if p.grad is None else p.grad for p in net.parameters())]
    net.zero_grad()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("weight"):
                p[..., ::3] += 0.2 * (-1) ** number
    return seen


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def quantizer(net: nn.Module, layer: int = 0) -> FakeQuant:
    return net[layer].weight_fake_quant


def set_attribute(name: str, value: object) -> Callable[[nn.Module], None]:
    """Another value, or another tensor of its own for each network."""
    return lambda net: setattr(quantizer(net), name, copy.deepcopy(value))


def replace_state(name: str) -> Callable[[nn.Module], None]:
    """A tensor of the tracker by another one of the same contents: the old one must not move any more."""

    def change(net: nn.Module) -> None:
        setattr(quantizer(net).tracker, name, getattr(quantizer(net).tracker, name).clone())

    return change


def replace_options(net: nn.Module) -> None:
    tracker = quantizer(net).tracker
    tracker.options = replace(tracker.options, freeze_threshold=Schedule("constant", 0.2))


def set_momentum(net: nn.Module) -> None:
    quantizer(net).tracker.momentum = 0.3


def replace_data(net: nn.Module) -> None:
    net[0].weight.data = net[0].weight.data * 0.7
    quantizer(net).scale.data = quantizer(net).scale.data * 1.2


def transpose_memory(net: nn.Module) -> None:
    net[0].weight.data = net[0].weight.data.t().contiguous().t()


def assign(net: nn.Module) -> None:
    net.load_state_dict(
        {n: t * 0.5 if n.endswith("weight") else t.clone() for n, t in net.state_dict().items()}, assign=True
    )


def follow_another(net: nn.Module) -> None:
    quantizer(net).follows(nn.Parameter(torch.ones(4, 6)))


def evaluate(net: nn.Module) -> None:
    net.eval()
    with torch.inference_mode():
        net(X)
    net.train()


def swap_quantizer(net: nn.Module) -> None:
    net[0].weight_fake_quant = FakeQuant(2, axis=0, learn="scale")


def remove_layer(net: nn.Module) -> None:
    fastqat.remove(net[0])


def calibrate(net: nn.Module) -> None:
    quantizer(net).begin_calibration()
    net(X)
    quantizer(net).end_calibration()


def clamp_by_hook(net: nn.Module) -> None:
    def clamp(layer: nn.Module, inputs: object) -> None:
        layer.weight.data.clamp_(-0.2, 0.2)

    net[0].register_forward_pre_hook(clamp)


def hook_of_quantizer(net: nn.Module) -> None:
    quantizer(net).register_forward_hook(lambda module, inputs, y: y * 2)


def widen(net: nn.Module) -> None:
    """More rows for a scale per tensor: the pull of the dampening is another one."""
    net[4].weight.data, net[4].bias.data = torch.linspace(-1, 1, 30).view(5, 6), torch.zeros(5)


# What happens between two steps: the quantizers that there are, and what is done.
CHANGES: dict[str, tuple[QSpec, Callable[[nn.Module], object]]] = {
    "nothing": (TRACKED, lambda net: None),
    "memory of weight and scale": (TRACKED, replace_data),
    "strides of a weight": (TRACKED, transpose_memory),
    "shape of a weight": (replace(PLAIN, dampening=Dampening(0.3, "mean")), widen),
    "weight": (TRACKED, lambda net: net[0]._parameters.update(weight=nn.Parameter(net[0].weight.detach() * 0.5))),
    "scale": (TRACKED, set_attribute("scale", nn.Parameter(torch.full((4,), 0.1)))),
    "everything by load_state_dict": (TRACKED, assign),
    "count of steps": (STOCHASTIC, set_attribute("step", torch.tensor([40]))),
    "strength": (EWGS, set_attribute("estimator_strength", torch.tensor([0.9]))),
    **{f"state {name}": (TRACKED, replace_state(name)) for name in fastqat.multi_tensor.STATE},
    "fewer bits": (TRACKED, set_attribute("bits", 2)),
    "too many bits to be tracked": (TRACKED, set_attribute("bits", 6)),
    "dtype": (TRACKED, lambda net: net.bfloat16().float()),
    "factor": (TRACKED, set_attribute("grad_scale", 0.3)),
    "mask": (TRACKED, set_attribute("ste_mask", "unrounded")),
    "eps": (TRACKED, set_attribute("eps", 0.5)),
    "seed": (STOCHASTIC, set_attribute("seed", 5)),
    "number of the tensor": (STOCHASTIC, set_attribute("tensor_id", 77)),
    "dampening": (TRACKED, set_attribute("dampening", Dampening(Schedule("linear", 0.0, 2.0, 9, 0.0), "sum"))),
    "threshold": (TRACKED, replace_options),
    "momentum": (TRACKED, set_momentum),
    "frozen layer": (TRACKED, lambda net: net[4].requires_grad_(False)),
    "followed weight": (TRACKED, follow_another),
    "evaluation": (TRACKED, evaluate),
    "a layer in evaluation": (TRACKED, lambda net: net[0].eval()),
    "quantizer": (TRACKED, swap_quantizer),
    "layer that is none any more": (TRACKED, remove_layer),
    "calibration": (TRACKED, calibrate),
    "switched off": (TRACKED, set_attribute("fake_quant_enabled", False)),
    "hook of a layer": (replace(TRACKED, dampening=None), clamp_by_hook),
    "hook of a quantizer": (TRACKED, hook_of_quantizer),
    "range that stops following": (FOLLOWING, set_attribute("observer_enabled", False)),
}


def trained(together: bool, spec: QSpec, change: Callable[[nn.Module], object]) -> list[Tensor]:
    net, seen = network(spec, together), []
    for number in range(12):
        if number == 6:
            change(net)
        seen += step(net, number)
    trackers = [m.tracker for m in net.modules() if getattr(m, "tracker", None) is not None]
    return [*seen, *net.state_dict().values(), *(t.codes() for t in trackers)]


@pytest.mark.filterwarnings("ignore:FakeQuant.bits")
@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_two_steps(name: str) -> None:
    assert equal(trained(False, *CHANGES[name]), trained(True, *CHANGES[name]))


def test_a_range_that_begins_to_follow() -> None:
    seen = []
    for together in (False, True):
        net = network(FOLLOWING, together)
        quantizer(net).observer_enabled = False
        seen.append(step(net, 0) + step(net, 1))
        quantizer(net).observer_enabled = True
        seen[-1] += [*step(net, 2), *step(net, 3), *net.state_dict().values()]
    assert equal(*seen)


def kept_call(net: nn.Module) -> calls.Call:
    (call,) = net.weight_buckets.buckets[0].calls()
    return call


def test_one_call_is_kept() -> None:
    """Through steps of training, new memory of a weight, and a forward pass under a tensor mode."""
    net = network(TRACKED, True)
    step(net, 0)
    call = kept_call(net)
    for number, change in enumerate((step, step)):
        change(net, number)
        net[0].weight.data = net[0].weight.data.clone()
    with FakeTensorMode(allow_non_fake_inputs=True):
        net(X)
    step(net, 3)
    assert kept_call(net) is call


def test_nothing_is_kept_of_a_forward_pass_with_fake_tensors() -> None:
    """The first forward pass, by which a compiler or a planner of memory looks at the network."""
    alone, together = network(EWGS, False), network(EWGS, True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        together(X)
    assert equal(step(alone, 0), step(together, 0))


def test_training_after_inference() -> None:
    """The call that inference mode made is the one that training takes."""
    alone, together = network(TRACKED, False), network(TRACKED, True)
    for net in (alone, together):
        with torch.inference_mode():
            net(X)
    assert equal(step(alone, 0), step(together, 0))


def test_layers_freeze_and_thaw() -> None:
    """A layer without gradients has a value without a graph, whatever was before."""
    net, seen = network(TRACKED, True), []
    for wanted in (True, False, True):
        net[0].requires_grad_(wanted)
        quantizer(net).requires_grad_(wanted)
        net(X)
        seen.append(net[0].weight_fake_quant.together.value is not None)  # what has no graph is not kept
    assert seen == [True, False, True]


def test_autocast_on_and_off() -> None:
    net, seen = network(TRACKED, True), []
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            net(X)
        seen.append(quantizer(net).together.value.dtype)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


WRONG = {
    "shape": (lambda scale: scale[:1], ValueError, "scale: wanted shape"),
    "dtype": (lambda scale: scale.double(), TypeError, "scale: wanted float32"),
    "device": (lambda scale: scale.to("meta"), ValueError, "scale: wanted device"),
}


@pytest.mark.parametrize("what", WRONG)
def test_scales_that_have_become_wrong(what: str) -> None:
    """Named as ever, and nothing of the call before is used: it goes on once the scale is right again."""
    net = network(TRACKED, True)
    step(net, 0)
    change, kind, message = WRONG[what]
    other = nn.Parameter(change(quantizer(net).scale.detach().clone()))
    torch.utils.swap_tensors(quantizer(net).scale, other)
    with pytest.raises(kind, match=message):
        net(X)
    torch.utils.swap_tensors(quantizer(net).scale, other)
    alone = copy.deepcopy(net)
    alone.weight_buckets.remove()
    assert equal(step(net, 1), step(alone, 1))


@pytest.mark.parametrize("name", ["scale", "qrange", "step", "estimator_strength"])
def test_what_changes_before_the_backward_pass(name: str) -> None:
    """Gradients of what is not there any more are an error, not wrong numbers."""
    net = network(EWGS, True)
    y = net(X)
    with torch.no_grad():
        getattr(quantizer(net), name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_and_files() -> None:
    """A copy after some steps goes its own way, and a call is no part of it."""
    net = network(TRACKED, True)
    step(net, 0)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = [copy.deepcopy(net), torch.load(file, weights_only=False)]
    before = [t.clone() for t in net.state_dict().values()]
    first, second = ([step(other, n) for n in (1, 2)] for other in copies)
    assert equal(before, list(net.state_dict().values()))
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(equal(a, step(net, n)) for n, a in enumerate(first, 1))


def test_weights_of_a_function_call() -> None:
    """They are those of the call alone, and what they were computed from is not kept."""
    nets = [network(TRACKED, together) for together in (False, True)]
    seen, factors = [], [torch.tensor(0.5, requires_grad=True) for _ in nets]
    for net, factor in zip(nets, factors, strict=True):
        seen.append(step(net, 0))
        weight = net[0].weight * factor
        functional_call(net, {"0.weight": weight}, X).sum().backward()
        seen[-1] += [factor.grad, *step(net, 1)]
    assert equal(*seen)
    weight = nets[1][0].weight * factors[1]
    alive = weakref.ref(weight)
    with torch.no_grad():
        functional_call(nets[1].eval(), {"0.weight": weight}, X)
    del weight
    gc.collect()
    assert alive() is None
