"""Learned scales that no optimizer holds, and scales at their floor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastqat
from fastqat import QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNED = QConfig(QSpec(4, 0, learn="scale"), QSpec(4, learn="scale"))


def learned() -> nn.Module:
    torch.manual_seed(0)
    return fastqat.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LEARNED)


def weights_of(net: nn.Module) -> list[nn.Parameter]:
    scales = {id(p) for p in fastqat.quantizer_parameters(net)}
    return [p for p in net.parameters() if id(p) not in scales]


def backward(net: nn.Module) -> None:
    net(torch.randn(8, 4)).square().sum().backward()


def test_scales_that_no_optimizer_holds() -> None:
    """One warning after the second step, with the first layer, their number, and the cure."""
    net = learned()
    optimizer = torch.optim.SGD(weights_of(net), lr=0.01)
    backward(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    wanted = r"quantizer of layer '[02]': wanted its learned scale in an optimizer; .*\(4 quantizers.*parameter_groups"
    with pytest.warns(UserWarning, match=wanted) as caught:
        for _ in range(3):
            optimizer.zero_grad()
            backward(net)
            optimizer.step()
    assert len(caught) == 1


def test_the_scales_that_are_missed_are_named() -> None:
    """Those of one layer, where an optimizer has the others."""
    net: Any = learned()
    missed = net[2].weight_fake_quant.scale
    optimizer = torch.optim.SGD([p for p in net.parameters() if p is not missed], lr=0.01)
    with pytest.warns(UserWarning, match=r"quantizer of layer '2': .*\(1 quantizers in all\)"):
        for _ in range(2):
            backward(net)
            optimizer.step()


def _together(net: Any) -> Callable[[], object]:
    return torch.optim.Adam(net.parameters(), lr=0.01).step


def _two_optimizers(net: Any) -> Callable[[], object]:
    weights = torch.optim.SGD(weights_of(net), lr=0.01)
    scales = torch.optim.SGD(fastqat.quantizer_parameters(net), lr=0.01)
    return lambda: (weights.step(), scales.step())


def _later(net: Any) -> Callable[[], object]:
    """The scales have a warm-up in which only weights are trained."""
    weights = torch.optim.SGD(weights_of(net), lr=0.01)
    scales = torch.optim.SGD(fastqat.quantizer_parameters(net), lr=0.01)
    steps = iter((weights, weights, weights, scales))
    return lambda: next(steps).step()


def _frozen(net: Any) -> Callable[[], object]:
    for scale in fastqat.quantizer_parameters(net):
        scale.requires_grad_(False)
    return torch.optim.SGD(weights_of(net), lr=0.01).step


def _without_gradient(net: Any) -> Callable[[], object]:
    optimizer = torch.optim.SGD(weights_of(net), lr=0.01)

    def step() -> None:
        for scale in fastqat.quantizer_parameters(net):
            scale.grad = None
        optimizer.step()

    return step


def _flat(net: Any) -> Callable[[], object]:
    scales = fastqat.quantizer_parameters(net)
    buffer = torch.cat([scale.detach() for scale in scales])
    for scale, part in zip(scales, buffer.split([s.numel() for s in scales]), strict=True):
        scale.data = part
    return torch.optim.SGD([*weights_of(net), nn.Parameter(buffer)], lr=0.01).step


@pytest.mark.parametrize("way", (_together, _two_optimizers, _later, _frozen, _without_gradient, _flat))
def test_no_false_alarm(way: Callable[[Any], Callable[[], object]]) -> None:
    """Scales in an optimizer of their own or in a flat buffer, not to be learned, or without a gradient."""
    net = learned()
    backward(net)
    step = way(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            backward(net)
            step()


def test_scales_at_their_floor() -> None:
    """Counted by name, and said by the report; NaN too, but no range that is not set or grows from zero."""
    net: Any = learned()
    net.append(nn.Linear(2, 3))
    nn.init.zeros_(net[3].weight)
    fastqat.prepare(net[3], QConfig(QSpec(4, 0), None))
    net(torch.randn(8, 4))
    assert fastqat.scales_at_floor(net) == {}
    assert "FLOOR" not in str(fastqat.report(net))
    with torch.no_grad():
        net[0].weight_fake_quant.scale[1:] = torch.tensor([1e-8, -1.0, torch.nan])
        net[2].activation_fake_quant.scale.fill_(1e-9)
        net[3].weight.fill_(1e-9)
        net(torch.randn(8, 4))
    assert fastqat.scales_at_floor(net) == {"0.weight_fake_quant": 3, "2.activation_fake_quant": 1}
    report = fastqat.report(net)
    counts = {(row.layer, row.tensor): row.at_floor for row in report.quantizers if row.at_floor}
    assert counts == {("0", "weight"): 3, ("2", "input"): 1}
    assert "SCALES AT THEIR FLOOR: 3 of 4 in 0 (weight), 1 of 1 in 2 (input)" in str(report)
    assert "grows from zero" in {row.note for row in report.quantizers}
