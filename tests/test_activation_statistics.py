"""What quantizers clip and how much noise they add, against numpy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, activation_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = [(1 + k) * torch.randn(5, 4, generator=torch.Generator().manual_seed(k)) for k in range(2)]
GRIDS = ((None, {"signed": True}), (2.4, {}), (None, {"activation": "relu"}))
SCALES = {None: [0.3], 1: [0.1, 0.2, 0.3, 2.0]}


def fixed(axis: int | None = None, zero: float | None = None, **options: Any) -> FakeQuant:
    """A quantizer of 3 bits with scales, and codes, that are known."""
    scale = torch.tensor(SCALES[axis])
    zero_point = None if zero is None else torch.full_like(scale, zero)
    options = {"range": "fixed", "symmetric": zero is None, **options}
    return FakeQuant(3, axis, scale=scale, zero_point=zero_point, **options)


@pytest.mark.parametrize("axis", (None, 1))
@pytest.mark.parametrize(
    ("zero", "options"), ((None, {"signed": True}), (2.4, {}), (None, {"activation": "relu"})), ids=str
)
def test_statistics(axis: int | None, zero: float | None, options: dict[str, Any]) -> None:
    """Of all batches together: extremes, the fraction outside the grid, and the noise."""
    relu = options.get("activation") == "relu"
    net = nn.Sequential(fixed(axis, zero, **({"signed": False} if relu else {}), **options))
    (row,) = activation_statistics(net, BATCHES)
    x = torch.cat(BATCHES).double().numpy()
    x = np.maximum(x, 0) if relu else x
    s, z = np.array(SCALES[axis]).astype(np.float32).astype(np.float64), np.rint(zero or 0)
    qmin, qmax = (-4, 3) if options.get("signed") else (0, 7)
    low, high = s * (qmin - z), s * (qmax - z)
    y = s * (np.clip(np.rint(x / s) + z, qmin, qmax) - z)
    assert (row.layer, row.tensor, row.bits, row.values) == ("0", "tensor", 3, 40)
    assert (row.low, row.high) == pytest.approx((x.min(), x.max()))
    assert (row.range_low, row.range_high) == pytest.approx((low.min(), high.max()))
    assert row.clipped == pytest.approx(((x < low) | (x > high)).mean()) and row.clipped > 0.05
    assert row.sqnr == pytest.approx(10 * math.log10((x**2).sum() / ((x - y) ** 2).sum()), rel=1e-5)


def test_offset_grid() -> None:
    """Its bounds are those of the offset."""
    fq = FakeQuant(3, symmetric=False, learn="scale+offset", range="minmax")
    fq(torch.linspace(-2, 5, 30))
    (row,) = activation_statistics(nn.Sequential(fq), [torch.tensor([-3.0, -2.0, 4.0, 6.0])])
    assert (row.range_low, row.range_high, row.clipped) == pytest.approx((-2, 5, 0.5))


class Net(nn.Module):
    """Layers, one of them never called, and a quantizer that a module calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.never = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)
        self.own = FakeQuant(5, range="running_minmax")

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.two(self.one(x).relu()))


def test_layers_are_named_and_nothing_changes() -> None:
    """Of inputs and outputs; ranges, modes, hooks, random numbers and gradients are as they were."""
    torch.manual_seed(0)
    following = QSpec(4, range="running_minmax", estimator="stochastic")
    net = fastqat.prepare(
        Net(), QConfig(QSpec(4, 0), following), overrides={"two": QConfig(None, QSpec(4), activation_on="output")}
    )
    net(BATCHES[0])
    net.one.eval()
    net.own.fake_quant_enabled = False
    before = {key: value.clone() for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    modes, drawn = [m.training for m in net.modules()], torch.get_rng_state()
    rows = activation_statistics(net, BATCHES)
    assert [(row.layer, row.tensor, row.bits, row.values) for row in rows] == [
        ("one", "input", 4, 40),
        ("two", "output", 4, 30),
        ("never", "input", 4, 0),
        ("own", "tensor", 5, 30),
    ]
    assert math.isnan(rows[2].sqnr) and math.isnan(rows[2].clipped)
    assert rows[3].sqnr > 0  # switched off in the model, and measured
    after = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)  # NaN: no range yet
    assert modes == [m.training for m in net.modules()] and torch.equal(drawn, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in net.modules()) and not net.own.fake_quant_enabled
    assert not net.never.activation_fake_quant.initialized and all(p.grad is None for p in net.parameters())


def test_values_that_are_none() -> None:
    """NaN and infinities do not count; without an error the ratio is infinite; nothing seen is no number."""
    net = nn.Sequential(fixed(signed=True))
    (row,) = activation_statistics(net, [torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0, 0.25])])
    assert (row.values, row.low, row.high, row.clipped) == (2, 0.25, 2.0, 0.5)
    errors = (2 - 0.9) ** 2 + (0.25 - 0.3) ** 2
    assert row.sqnr == pytest.approx(10 * math.log10((2**2 + 0.25**2) / errors), rel=1e-5)
    (row,) = activation_statistics(net, [net[0].scale.detach() * 3])
    assert row.sqnr == math.inf and row.clipped == 0
    (row,) = activation_statistics(net, [torch.full((3,), torch.nan), torch.empty(0)])
    assert row.values == 0 and math.isnan(row.low) and math.isnan(row.sqnr)


def test_errors() -> None:
    with pytest.raises(ValueError, match="model: wanted a model with quantizers of activations; got Linear"):
        activation_statistics(nn.Linear(2, 2), [torch.zeros(1, 2)])
    net = nn.Sequential(fixed())
    with pytest.raises(ValueError, match="batches: wanted at least one; got none"):
        activation_statistics(net, [])
    with pytest.raises(TypeError):
        activation_statistics(net, [torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    assert not net[0]._forward_pre_hooks and net.training
