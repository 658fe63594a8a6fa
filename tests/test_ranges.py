"""Range estimators against numpy and brute force in float64, and ranges that follow the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATORS = ("minmax", "running_minmax", "percentile", "mse", "sqnr")
GRANULARITIES = ({}, {"axis": 0}, {"axis": 1}, {"axis": 0, "group_size": 50})
BATCHES = [(1 + k) * torch.randn(4, 200, generator=torch.Generator().manual_seed(k)) + 0.3 for k in range(3)]
of_granularities = pytest.mark.parametrize("options", GRANULARITIES, ids=str)
of_grids = pytest.mark.parametrize("symmetric", (True, False))


def rows(x: Tensor, axis: int | None = None, group_size: int | None = None) -> np.ndarray:
    """[scales, elements], float64."""
    x = x.double().numpy()
    return (
        x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(-1, group_size or x.size // x.shape[axis])
    )


def grid(low: np.ndarray, high: np.ndarray, symmetric: bool, bits: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """methods.md 1.1: s = max(|low|, |high|) / p signed, or (high - low) / (2^b - 1) with z = -low / s."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        return np.maximum(-low, high) / (2 ** (bits - 1) - 1), np.zeros_like(low)
    s = (high - low) / (2**bits - 1)
    return s, -low / s


def calibrated(batches: list[Tensor], bits: int = 4, **options: Any) -> FakeQuant:
    """A quantizer that has been calibrated with these batches."""
    net = nn.Sequential(FakeQuant(bits, **options))
    fastqat.calibrate(net, batches)
    return net[0]


def assert_grid(fq: FakeQuant, scale: np.ndarray, zero_point: np.ndarray, rtol: float = 1e-5) -> None:
    """Scale and zero point of a quantizer, in order of the rows."""
    np.testing.assert_allclose(fq.scale.detach().flatten().numpy(), scale, rtol=rtol)
    if fq.zero_point is not None:
        np.testing.assert_allclose(fq.zero_point.detach().flatten().numpy(), zero_point, rtol=1e-4)


@of_grids
@of_granularities
def test_minmax(options: dict[str, Any], symmetric: bool) -> None:
    """Extremes of all batches."""
    every = np.concatenate([rows(x, **options) for x in BATCHES], 1)
    fq = calibrated(BATCHES, range="minmax", symmetric=symmetric, **options)
    assert_grid(fq, *grid(every.min(1), every.max(1), symmetric))


def test_offset_grid() -> None:
    """An affine range on the offset grid: the lowest code stands for the lowest value."""
    fq = calibrated(BATCHES[:1], range="minmax", symmetric=False, learn="scale+offset", axis=0)
    low, high = rows(BATCHES[0], 0).min(1), rows(BATCHES[0], 0).max(1)
    assert fq.codes == (0, 15) and fq.zero_point is None
    np.testing.assert_allclose(fq.scale.detach(), (high - low) / 15, rtol=1e-5)
    np.testing.assert_allclose(fq.offset.detach(), low, rtol=1e-5)


@of_grids
@of_granularities
def test_running_minmax(options: dict[str, Any], symmetric: bool) -> None:
    """Moving average of the extremes, by hand."""
    each = [rows(x, **options) for x in BATCHES]
    low, high = (
        0.7 * (0.7 * b[0] + 0.3 * b[1]) + 0.3 * b[2]
        for b in ([f(1) for f in fs] for fs in zip(*((r.min, r.max) for r in each), strict=True))
    )
    fq = calibrated(BATCHES, range="running_minmax", momentum=0.7, symmetric=symmetric, **options)
    assert_grid(fq, *grid(low, high, symmetric))


@of_grids
@pytest.mark.parametrize("options", ({}, {"axis": 0}, {"axis": 0, "group_size": 50}), ids=str)
@pytest.mark.parametrize("percentile", (98.0, 100.0))
def test_percentile(options: dict[str, Any], symmetric: bool, percentile: float) -> None:
    """numpy's percentiles of each batch, averaged over the batches."""
    each = [rows(x, **options) for x in BATCHES]  # rows of 800, 200 and 50: 98 % of each is a whole number
    high = np.mean([np.percentile(r, percentile, axis=1, method="inverted_cdf") for r in each], 0)
    low = np.mean([-np.percentile(-r, percentile, axis=1, method="inverted_cdf") for r in each], 0)
    fq = calibrated(BATCHES, range="percentile", percentile=percentile, symmetric=symmetric, **options)
    assert_grid(fq, *grid(low, high, symmetric))


def squared_errors(each: list[np.ndarray], scale: np.ndarray, zero: np.ndarray, low: int, high: int) -> np.ndarray:
    """Sum over all batches of (QDQ(x) - x)^2 of each row."""
    s, z = scale[:, None], np.clip(np.rint(zero), low, high)[:, None]
    return sum(((s * (np.clip(np.rint(x / s) + z, low, high) - z) - x) ** 2).sum(1) for x in each)


@of_grids
@pytest.mark.parametrize("name", ESTIMATORS)
def test_channels_without_data(name: str, symmetric: bool) -> None:
    """A channel of zeros, or of nothing finite, takes the largest scale of the others; stray values do not count."""
    x = BATCHES[0].clone()
    x[1], x[2] = 0, torch.nan
    x[3, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    fq = calibrated([x], axis=0, range=name, symmetric=symmetric)
    clean = x[3].clone()
    clean[:3] = 0
    alone = calibrated([torch.stack([x[0], clean])], axis=0, range=name, symmetric=symmetric)
    assert torch.equal(fq.scale[[0, 3]], alone.scale)
    assert fq.scale[1] == fq.scale[2] == alone.scale.max()
    assert bool((fq(x)[1] == 0).all()) and bool(fq(x)[2].isnan().all())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_data_at_all(name: str) -> None:
    """All zeros: the scale is 1."""
    assert calibrated([torch.zeros(3, 4)], axis=0, range=name).scale.tolist() == [1.0] * 3


@of_grids
@pytest.mark.parametrize("name", ("minmax", "running_minmax"))
def test_following(name: str, symmetric: bool) -> None:
    """While training the range follows every tensor; in evaluation and where it is learned it never moves."""
    fq = FakeQuant(4, axis=0, range=name, symmetric=symmetric, signed=symmetric)
    each = [rows(x, 0) for x in BATCHES]
    low, high = each[0].min(1), each[0].max(1)
    fq(BATCHES[0])
    for batch, r in zip(BATCHES[1:], each[1:], strict=True):
        m = 0.9 if name == "running_minmax" else 0.0
        if name == "running_minmax" and batch is BATCHES[1]:  # the first tensor sets the range, and is seen again below
            low, high = m * low + (1 - m) * each[0].min(1), m * high + (1 - m) * each[0].max(1)
        low, high = m * low + (1 - m) * r.min(1), m * high + (1 - m) * r.max(1)
        y = fq(batch)
        assert_grid(fq, *grid(low, high, symmetric))
        assert torch.equal(y, fq.eval()(batch))  # what it gave is of the range that it has now
        before = fq.state_dict()
        before = {k: v.clone() for k, v in before.items()}
        fq(99 * batch)
        assert all(torch.equal(v, before[k]) for k, v in fq.state_dict().items())
        fq.train()


@pytest.mark.parametrize("name", ("minmax", "running_minmax"))
def test_a_tensor_of_nan_moves_no_range(name: str) -> None:
    """Nor does one of infinities, nor a channel of them; the range goes on with the next one."""
    fq = FakeQuant(4, axis=0, range=name)
    fq(BATCHES[0])
    before = {k: v.clone() for k, v in fq.state_dict().items()}
    for bad in (torch.nan, torch.inf):
        fq(torch.full((4, 7), bad))
        assert all(torch.equal(v, before[k]) for k, v in fq.state_dict().items())
    x = BATCHES[1].clone()
    x[2] = torch.nan
    fq(x)
    moved = fq.scale != before["scale"]
    assert moved.tolist() == [True, True, False, True]
    late = FakeQuant(4, range=name, signed=True)
    late(torch.full((3,), torch.nan))
    late(BATCHES[0])
    assert_grid(late, *grid(rows(BATCHES[0]).min(1), rows(BATCHES[0]).max(1), True))


def test_calibration_is_the_range_of_its_step() -> None:
    """A tracked quantizer keeps it until its weight's next step."""
    net = nn.Sequential(FakeQuant(4, range="running_minmax", signed=True))
    weight = nn.Parameter(torch.zeros(3))
    net[0].follows(weight)
    fastqat.calibrate(net, BATCHES)
    before = net[0].scale.detach().clone()
    net(9 * BATCHES[0])
    assert torch.equal(net[0].scale, before)
    torch.optim.SGD([weight]).step()
    net(9 * BATCHES[0])
    assert bool(net[0].scale > before)


def test_learned_ranges_do_not_follow() -> None:
    """Only gradients move them."""
    fq = FakeQuant(4, range="running_minmax", learn="scale")
    fq(BATCHES[0])
    before = fq.scale.detach().clone()
    fq(9 * BATCHES[1])
    assert torch.equal(fq.scale, before)


@pytest.mark.parametrize("name", ("minmax", "running_minmax"))
def test_first_tensor_of_a_step(name: str) -> None:
    """A tracked quantizer takes one tensor in a step; the next forward of that step sees the same range."""
    fq, weight = FakeQuant(4, range=name, signed=True), nn.Parameter(torch.zeros(3))
    fq.follows(weight)
    m = 0.9 if name == "running_minmax" else 0.0
    fq(BATCHES[0])
    extent = BATCHES[0].abs().max().double() if name == "minmax" else None
    low, high = rows(BATCHES[0]).min(1), rows(BATCHES[0]).max(1)
    assert extent is None or np.isclose(max(-low, high), extent)
    fq(BATCHES[1])  # still the step in which the range was set
    assert_grid(fq, *grid(low, high, True))
    torch.optim.SGD([weight]).step()
    low, high = (m * a + (1 - m) * b for a, b in ((low, rows(BATCHES[1]).min(1)), (high, rows(BATCHES[1]).max(1))))
    for batch in (BATCHES[1], BATCHES[2], BATCHES[0]):
        fq(batch)
        assert_grid(fq, *grid(low, high, True))
