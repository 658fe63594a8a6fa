"""What fails half-way leaves all as it was: calibration, and the state of AdaQAT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, ranges

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def network(activations: str = "mse") -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    return fastqat.prepare(net, QConfig(weight=QSpec(bits=4, axis=0), activation=QSpec(bits=4, range=activations)))


def facts(net: nn.Module) -> dict[str, Any]:
    """State, and what quantizers know besides."""
    known = {n: (q.initialized, q.bits, q.signed) for n, q in net.named_modules() if isinstance(q, FakeQuant)}
    return {**{name: value.clone() for name, value in net.state_dict().items()}, **known}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v.nan_to_num(-7), b[k].nan_to_num(-7)) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


class Stopped:
    """Batches that end in an error."""

    def __init__(self, error: type[BaseException], after: int) -> None:
        self.error, self.after = error, after

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.after):
            yield 5 * X
        raise self.error


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError, StopAsyncIteration))
@pytest.mark.parametrize("calibrated", (False, True))
@pytest.mark.parametrize("activations", ("mse", "running_minmax", "in_hindsight"))
def test_an_interrupted_calibration(error: type[BaseException], calibrated: bool, activations: str) -> None:
    """Between batches; and inside of one, where some quantizers have seen it and others have not."""
    net = network(activations)
    if calibrated:
        fastqat.calibrate(net, [X])
    before = facts(net)

    def fails(*_: object) -> None:
        raise error

    for after in (0, 1, 2):
        with pytest.raises(error):
            fastqat.calibrate(net, Stopped(error, after))
        assert same(facts(net), before)
    hook = net[3].register_forward_pre_hook(fails)
    with pytest.raises(error):
        fastqat.calibrate(net, [5 * X])
    hook.remove()
    assert same(facts(net), before) and all(m.training for m in net.modules())
    fastqat.calibrate(net, [X])
    fresh = network(activations)
    fastqat.calibrate(fresh, [X])
    assert torch.equal(net.eval()(X), fresh.eval()(X))


def test_an_estimator_that_fails_writes_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of its own quantizer nor of those before it."""
    net = network("running_minmax")
    fastqat.calibrate(net, [X])
    before, calls, original = facts(net), [], ranges.RunningMinMax.grid

    def grid(self: ranges.RunningMinMax) -> tuple[Tensor, Tensor]:
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        return original(self)

    monkeypatch.setattr(ranges.RunningMinMax, "grid", grid)
    with pytest.raises(MemoryError):
        fastqat.calibrate(net, [5 * X])
    assert len(calls) == 3 and same(facts(net), before)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.pop(name)


FAILURES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another width": lambda state: state["widths"].update(other={}),
    "a last width without a number": lambda state: list(state["widths"].values())[-1].pop("seen"),
    "a last width out of bounds": lambda state: list(state["widths"].values())[-1].update(value=9.5),
    "no differences": without("differences"),
    "fewer differences": lambda state: state["differences"]["uppers"].pop(),
    "a broken covariance": lambda state: state["differences"]["covariance"].pop(),
    "no step": without("step"),
    "no history": without("history"),
    "a shorter history": lambda state: state["history"]["loss"].pop(),
}


@pytest.mark.parametrize("change", FAILURES.values(), ids=FAILURES)
def test_a_broken_state_of_adaqat(change: Callable[[dict[str, Any]], object]) -> None:
    """The numbers, the differences, the history and the bit-widths of quantizers stay."""
    net = network()
    fastqat.calibrate(net, [X])
    widths = fastqat.AdaQAT(net, lam=0.3, lr_weight=0.4, lr_activation=0.2, per_layer=True, fixed=[])

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = net(X).square().mean()
            loss.backward()
            widths.step(loss, lambda: net(X).square().mean())

    train(2)
    saved = copy.deepcopy(widths.state_dict())
    train(2)
    before, model = copy.deepcopy(widths.state_dict()), facts(net)
    assert saved != before
    broken = copy.deepcopy(saved)
    change(broken)
    with pytest.raises((ValueError, KeyError, TypeError)):
        widths.load_state_dict(broken)
    assert widths.state_dict() == before and same(facts(net), model)
    widths.load_state_dict(saved)
    assert widths.state_dict() == saved
