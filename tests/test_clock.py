"""Ways to train that compute what plain SGD does leave a prepared model in the same state, time and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock_networks import LR, STEPS, Iterate, assert_equal_states, backward, network, plain, quantizers, times, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastqat

pytestmark = pytest.mark.usefixtures("one_thread")


class Lookahead(torch.optim.Optimizer):
    """Calls its base optimizer; its slow weights are all of the fast ones (alpha = 1)."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__([p for group in base.param_groups for p in group["params"]], {})
        self.base = base

    def step(self, closure: Any = None) -> None:
        self.base.step()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization of radius 0, in both forms of its users."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__([p for group in base.param_groups for p in group["params"]], {})
        self.base = base

    def first_step(self) -> None:
        """Climb by the radius, which is 0."""

    def second_step(self) -> None:
        self.base.step()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Twice(torch.optim.SGD):
    """A subclass whose step calls that of its base class: torch runs the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Unseen:
    """An optimizer that is none of torch's."""

    def __init__(self, params: Any) -> None:
        self.params = list(params)

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.add_(p.grad, alpha=-LR)


def sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=LR, **options)


def with_optimizer(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Iterate]:
    def way(net: nn.Module) -> Iterate:
        optimizer = make(net)

        def iterate(x: Tensor) -> None:
            backward(net, x)
            optimizer.step()

        return iterate

    return way


def lookahead_of_two(net: nn.Module) -> Any:
    return Lookahead(Lookahead(sgd(net)))


def sgd_after_another_class_was_used(net: nn.Module) -> Any:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # its step has the hooks from now on
    return Twice(net.parameters(), lr=LR)


def sam_with_closure(net: nn.Module) -> Iterate:
    optimizer = SAM(sgd(net))

    def iterate(x: Tensor) -> None:
        backward(net, x)
        optimizer.step(lambda: backward(net, x))

    return iterate


def sam_in_two_phases(net: nn.Module) -> Iterate:
    optimizer = SAM(sgd(net))

    def iterate(x: Tensor) -> None:
        backward(net, x)
        optimizer.first_step()
        backward(net, x)
        optimizer.second_step()

    return iterate


def two_optimizers(net: nn.Module) -> Iterate:
    """One for the weights, one for the ranges, which is the first to step."""
    ranges = fastqat.quantizer_parameters(net)
    others = [p for p in net.parameters() if all(p is not r for r in ranges)]
    optimizers = [torch.optim.SGD(ranges, lr=LR), torch.optim.SGD(others, lr=LR)]

    def iterate(x: Tensor) -> None:
        backward(net, x)
        for optimizer in optimizers:
            optimizer.step()

    return iterate


def an_optimizer_for_each_parameter(net: nn.Module) -> Iterate:
    """Each steps in the backward pass, as soon as its gradient is there."""
    for p in net.parameters():
        if p.requires_grad:
            optimizer = torch.optim.SGD([p], lr=LR)
            p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    return lambda x: (backward(net, x), None)[1]


def optimizers_in_a_checkpointed_backward(net: Any) -> Iterate:
    """Layers are computed again in the backward pass, when others have been changed already."""
    an_optimizer_for_each_parameter(net)

    def iterate(x: Tensor) -> None:
        net.zero_grad()
        for layer in net:
            x = checkpoint(layer, x, use_reentrant=False)
        x.square().mean().backward()

    return iterate


def flat_buffer(net: nn.Module) -> Iterate:
    """All weights are views of one tensor, which is what the optimizer has."""
    ps = [p for p in net.parameters() if p.requires_grad]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in ps]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in ps]
    for p, part, grad in zip(ps, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        p.data, p.grad = part.view_as(p), grad.view_as(p)
    optimizer = torch.optim.SGD([flat], lr=LR)

    def iterate(x: Tensor) -> None:
        flat.grad.zero_()  # type: ignore[union-attr]
        net(x).square().mean().backward()
        optimizer.step()

    return iterate


def unseen_optimizer(net: nn.Module) -> Iterate:
    optimizer = Unseen(net.parameters())

    def iterate(x: Tensor) -> None:
        backward(net, x)
        optimizer.step()
        fastqat.step(net)

    return iterate


def master_copies(net: nn.Module) -> Iterate:
    """The optimizer has copies in float32, which are written back."""
    pairs = [(p, p.detach().clone()) for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([master for _, master in pairs], lr=LR)

    def iterate(x: Tensor) -> None:
        backward(net, x)
        for p, master in pairs:
            master.grad = p.grad
        optimizer.step()
        with torch.no_grad():
            for p, master in pairs:
                p.copy_(master)
        fastqat.step(net)

    return iterate


def by_hand_as_well(net: nn.Module) -> Iterate:
    """Whoever calls fastqat.step beside an optimizer that is seen."""
    optimizer = sgd(net)

    def iterate(x: Tensor) -> None:
        backward(net, x)
        optimizer.step()
        fastqat.step(net)

    return iterate


def after_a_step_that_failed(net: nn.Module) -> Iterate:
    """An error in a wrapper, or in the closure of an optimizer, silences no step that comes later."""

    class Failing(Lookahead):
        def step(self, closure: Any = None) -> None:
            raise FloatingPointError

    for broken in (Failing(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)), sgd(net)):
        with pytest.raises((FloatingPointError, ZeroDivisionError)):
            broken.step(lambda: 1 / 0)
    return plain(net)


def accumulated(net: nn.Module) -> Iterate:
    """Two micro-batches a step, of the same images: twice the gradient, half the learning rate."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LR / 2)

    def iterate(x: Tensor) -> None:
        net.zero_grad()
        for _ in range(2):
            net(x).square().mean().backward()
        optimizer.step()

    return iterate


SAME: dict[str, Callable[[nn.Module], Iterate]] = {
    "foreach": with_optimizer(lambda net: sgd(net, foreach=True)),
    "fused": with_optimizer(lambda net: sgd(net, fused=True)),
    "lookahead": with_optimizer(lambda net: Lookahead(sgd(net))),
    "lookahead of lookahead": with_optimizer(lookahead_of_two),
    "super().step()": with_optimizer(sgd_after_another_class_was_used),
    "sam, closure": sam_with_closure,
    "sam, two phases": sam_in_two_phases,
    "two optimizers": two_optimizers,
    "optimizers in backward": an_optimizer_for_each_parameter,
    "optimizers in backward, checkpointed": optimizers_in_a_checkpointed_backward,
    "flat buffer": flat_buffer,
    "unseen": unseen_optimizer,
    "master copies": master_copies,
    "by hand as well": by_hand_as_well,
    "after a failure": after_a_step_that_failed,
    "accumulated": accumulated,
}


@pytest.mark.parametrize("way", SAME.values(), ids=SAME)
@pytest.mark.parametrize("together", (False, True), ids=("alone", "together"))
def test_equals_the_plain_run(way: Callable[[nn.Module], Iterate], together: bool) -> None:
    """Counts, frequencies, frozen weights, ranges and the noise of gradients: all state, to the bit."""
    wanted, found = network(), network()
    if together:
        fastqat.quantize_weights_together(found)
    train(wanted, plain(wanted))
    train(found, way(found))
    assert times(found) == times(wanted) == {STEPS}
    assert sum(int(q.tracker.counts[1]) for q in quantizers(wanted) if getattr(q, "tracker", None)) > 0
    assert_equal_states(found, wanted)
