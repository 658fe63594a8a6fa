"""Time is counted in optimizer steps: which events advance a quantizer, and which must not."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import FakeQuant, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def layer() -> nn.Linear:
    """A linear layer with a quantized weight; `.parametrizations.weight[0]` is its quantizer."""
    linear = nn.Linear(6, 4)
    parametrize.register_parametrization(linear, "weight", FakeQuant(4, axis=0, learn="scale"))
    return linear


def time_of(linear: nn.Module) -> int:
    """Steps that the layer's quantizer has counted."""
    return linear.parametrizations.weight[0].step.item()


def backward(linear: nn.Module) -> None:
    """Gradients of all parameters."""
    linear(X).square().sum().backward()


def test_step_by_hand() -> None:
    """One quantizer, or all of a model; an error where there is none."""
    net = nn.Sequential(FakeQuant(4), nn.Sequential(FakeQuant(4)))
    memory = net[0].step.data_ptr()
    fastqat.step(net)
    fastqat.step(net[0])
    assert [net[0].step.tolist(), net[1][0].step.tolist()] == [[2], [1]]
    assert net[0].step.dtype == torch.int64 and net[0].step.data_ptr() == memory
    with pytest.raises(ValueError, match="target: wanted a module that contains quantizers; got Linear with none"):
        fastqat.step(nn.Linear(2, 2))


@pytest.mark.parametrize("options", ({}, {"foreach": True}, {"fused": True}), ids=("default", "foreach", "fused"))
@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.Adam))
def test_an_optimizer_step_is_a_step(optimizer: type, options: dict[str, bool]) -> None:
    """Exactly one, in every implementation."""
    linear = layer()
    steps = optimizer(linear.parameters(), lr=0.01, **options)
    for count in range(1, 4):
        backward(linear)
        assert time_of(linear) == count - 1
        steps.step()
        steps.zero_grad()
        assert time_of(linear) == count


def test_compiled_optimizer_step() -> None:
    """The hook runs once around a compiled step."""
    torch._dynamo.reset()
    linear = layer()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.01)
    run = torch.compile(optimizer.step, backend="aot_eager")
    for count in range(1, 4):
        backward(linear)
        run()
        assert time_of(linear) == count


def test_two_optimizers_count_once() -> None:
    """The one that owns the weight counts; that of the quantizer's parameters does not, nor one of another layer."""
    linear, other = layer(), layer()
    quantizer = linear.parametrizations.weight[0]
    weights = torch.optim.SGD([linear.parametrizations.weight.original, linear.bias], lr=0.01)
    ranges = torch.optim.Adam(fastqat.quantizer_parameters(linear), lr=1e-5)
    strangers = torch.optim.SGD(other.parameters(), lr=0.01)
    assert ranges.param_groups[0]["params"] == [quantizer.scale]
    backward(linear)
    for optimizer, count in ((ranges, 0), (weights, 1), (ranges, 1), (strangers, 1), (weights, 2)):
        optimizer.step()
        assert time_of(linear) == count
    assert time_of(other) == 1


def test_groups_of_one_optimizer_count_once() -> None:
    """Weight and scale in two groups; a weight that two quantizers follow advances both."""
    linear = layer()
    quantizer, second = linear.parametrizations.weight[0], FakeQuant(2)
    second.follows(linear.parametrizations.weight.original)
    groups = [{"params": [linear.parametrizations.weight.original]}, {"params": [quantizer.scale, linear.bias]}]
    torch.optim.SGD(groups, lr=0.01).step()
    assert time_of(linear) == 1 and second.step.item() == 1


def only_evaluation(linear: nn.Module) -> None:
    """Evaluation, with and without gradients."""
    linear.eval()
    backward(linear)
    with torch.no_grad():
        linear(X)


def accumulation(linear: nn.Module) -> None:
    """Several backward passes before a step."""
    for _ in range(3):
        backward(linear)


def recomputation(linear: nn.Module) -> None:
    """Both kinds of activation checkpointing."""
    for reentrant in (True, False):
        checkpoint(linear, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()


def second_reading(linear: nn.Module) -> None:
    """The weight is read, and nothing is done with it."""
    assert torch.equal(linear.weight, linear.weight)


def skipped_step(linear: nn.Module) -> None:
    """A gradient scaler that found an infinity does not step."""
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(linear(X).sum() * torch.inf).backward()
    scaler.step(optimizer)


def function_transforms(linear: nn.Module) -> None:
    """torch.func writes nothing."""
    torch.func.grad(lambda x: linear(x).sum())(X)
    torch.func.functional_call(linear, dict(linear.named_parameters()), X)


@pytest.mark.parametrize(
    "event", (only_evaluation, accumulation, recomputation, second_reading, skipped_step, function_transforms)
)
def test_what_is_no_step(event: Callable[[nn.Module], None]) -> None:
    """No time passes, and no state changes."""
    linear = layer()
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    event(linear)
    assert time_of(linear) == 0
    assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())


def test_a_copy_follows_its_own_weight() -> None:
    """A deep copy counts its own optimizer's steps, the original those of its own."""
    linear = layer()
    twin = copy.deepcopy(linear)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (linear, twin)]
    backward(linear), backward(twin)
    optimizers[1].step()
    assert [time_of(linear), time_of(twin)] == [0, 1]
    optimizers[0].step()
    assert [time_of(linear), time_of(twin)] == [1, 1]


def test_a_copy_of_a_prepared_model() -> None:
    """The quantizers of activations live in the time of their layer's weight, in a copy too."""
    net = fastqat.prepare(nn.Sequential(nn.Linear(6, 4)), QConfig(QSpec(4, 0), QSpec(4, range="running_minmax")))
    for model in (net, copy.deepcopy(net)):
        model(X)
        torch.optim.SGD([model[0].weight], lr=0.01).step()
        quantizers = (model[0].weight_fake_quant, model[0].activation_fake_quant)
        assert [q.step.item() for q in quantizers] == [1, 1] and all(q.tracked for q in quantizers)


def test_a_lone_copy_follows_no_weight() -> None:
    """A copy without its weight takes every tensor again, as an untracked quantizer does."""
    fq, weight = FakeQuant(4, range="minmax"), nn.Parameter(X.clone())
    fq(weight)
    twin = copy.deepcopy(fq)
    assert not twin.tracked
    fq(9 * X), twin(9 * X)
    assert bool(twin.scale > fq.scale)


def test_a_weight_that_is_replaced() -> None:
    """The quantizer follows the Parameter that it sees, and forgets the one before."""
    fq = FakeQuant(4)
    old, new = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    fq(old), fq(new)
    torch.optim.SGD([old], lr=0.1).step()
    assert fq.step.item() == 0
    torch.optim.SGD([new], lr=0.1).step()
    assert fq.step.item() == 1


def test_a_quantizer_that_is_gone_is_not_kept() -> None:
    """Following a weight keeps neither of the two alive."""
    weight, kept = nn.Parameter(torch.ones(3)), FakeQuant(4)
    collected: list[str] = []

    def watch(module: nn.Module, p: Tensor) -> None:
        import weakref

        weakref.finalize(module, collected.append, "module")
        weakref.finalize(p, collected.append, "weight")

    gone, dropped = FakeQuant(4), nn.Parameter(torch.ones(3))
    gone(weight), kept(dropped)
    watch(gone, dropped)
    del gone, dropped
    gc.collect()
    assert sorted(collected) == ["module", "weight"]
    torch.optim.SGD([weight], lr=0.1).step()
