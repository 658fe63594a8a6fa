"""Ranges that are searched for: histograms, SQNR and cross-entropy against brute force in float64."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from test_ranges import BATCHES, assert_grid, calibrated, grid, of_granularities, of_grids, rows, squared_errors
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QSpec, ranges
from fastqat.ranges.histogram import Histogram
from fastqat.ranges.search import step_sizes

pytestmark = pytest.mark.usefixtures("one_thread")


def fractions(low: np.ndarray, high: np.ndarray, symmetric: bool, bits: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The candidates of "mse" and "cross_entropy": fractions of a range, as documented."""
    pairs = [(k / 100,) * 2 for k in range(1, 101)] if symmetric else product(np.arange(1, 17) / 16, repeat=2)
    return [grid(low * a, high * b, symmetric, bits) for a, b in pairs]


def codes_of(symmetric: bool, bits: int = 4) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def found(fq: FakeQuant, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, float64 in order of the rows."""
    scale = fq.scale.detach().double().flatten().numpy()
    return scale, np.zeros_like(scale) if symmetric else fq.zero_point.detach().double().flatten().numpy()


@of_grids
@of_granularities
@pytest.mark.parametrize("bits", (2, 8))
def test_mse_of_many_tensors(options: dict[str, Any], symmetric: bool, bits: int) -> None:
    """No fraction of the range of all tensors has less error on all of them; the largest tensor is the last."""
    each = [rows(x, **options) for x in BATCHES]
    every = np.concatenate(each, 1)
    candidates = fractions(every.min(1), every.max(1), symmetric, bits)
    errors = [squared_errors(each, s, z, *codes_of(symmetric, bits)) for s, z in candidates]
    fq = calibrated(BATCHES, bits=bits, range="mse", symmetric=symmetric, **options)
    scale, zero = found(fq, symmetric)
    # Bins are finer than steps, but 12 values of a row may lie in them as they like.
    tolerance = 1.1 if every.shape[1] < 20 and bits == 8 else 1.001
    assert (squared_errors(each, scale, zero, *codes_of(symmetric, bits)) < np.min(errors, 0) * tolerance).all()
    assert np.isclose(scale, [s for s, _ in candidates], rtol=1e-5).any(0).all()


@of_grids
def test_mse_of_one_tensor(symmetric: bool) -> None:
    """The first tensor that a quantizer meets: the best of the candidates to the digit, here of 8 bits and a spike."""
    x = BATCHES[0].clone()
    x[0, 0] = 300.0
    fq = FakeQuant(8, range="mse", symmetric=symmetric, signed=symmetric)
    fq(x)
    each = [rows(x)]
    candidates = fractions(each[0].min(1), each[0].max(1), symmetric, 8)
    best = min(squared_errors(each, s, z, *codes_of(symmetric, 8)) for s, z in candidates)
    np.testing.assert_allclose(squared_errors(each, *found(fq, symmetric), *codes_of(symmetric, 8)), best, rtol=1e-5)


@of_grids
@pytest.mark.parametrize("name", ("mse", "sqnr", "percentile"))
def test_a_larger_tensor_counts_whenever_it_comes(name: str, symmetric: bool) -> None:
    """The range is the same in any order of the tensors."""
    options = {"range": name, "symmetric": symmetric, "axis": 0}
    forth, back = calibrated(BATCHES, **options), calibrated(BATCHES[::-1], **options)
    torch.testing.assert_close(forth.scale, back.scale, rtol=1e-5, atol=0)
    alone = calibrated(BATCHES[:1], **options)
    assert (forth.scale > 1.2 * alone.scale).all()


def in_bins(count: int, bins: int, exponent: int, seed: int) -> Tensor:
    """[3, count] values in the middles of the bins between -2^exponent and 2^exponent, and zeros."""
    k = torch.randint(-bins, bins, (3, count), generator=torch.Generator().manual_seed(seed))
    x = (k + 0.5) * 2.0**exponent / bins
    x[:, ::7] = 0
    x[:, :2] = torch.tensor([1, -1]) * (1 - 0.5 / bins) * 2.0**exponent  # both ends
    return x


@pytest.mark.parametrize("beyond", (1.0, 3.0))
@pytest.mark.parametrize("codes", ((-8, 7), (0, 15), (-1, 1), (0, 255)), ids=str)
def test_histogram(codes: tuple[int, int], beyond: float) -> None:
    """Values in the middles of bins: squared errors as they are, those outside the grid with their weight."""
    generator = torch.Generator().manual_seed(4)
    x = in_bins(400, 64, 3, seed=0)
    histogram = Histogram(64)
    for part in x.split(130, 1):
        histogram.add(part, x.abs().amax(1))
    bad = torch.tensor([[torch.nan, torch.inf, -torch.inf]]).expand(3, 3)
    histogram.add(bad, torch.zeros(3))
    scales = torch.rand(9, 3, generator=generator) * 8 / (codes[1] - codes[0]) + 0.01
    zeros = torch.randint(codes[0], codes[1] + 1, (9, 3), generator=generator) + 0.3
    got = histogram.squared_errors(scales, zeros, *codes, beyond)
    s, z, v = scales.double()[..., None], zeros.round().double()[..., None].clamp(*codes), x.double()[None]
    y = s * ((v / s).round().add(z).clamp(*codes) - z)
    outside = (v < s * (codes[0] - z)) | (v > s * (codes[1] - z))
    wanted = torch.where(outside, beyond, 1.0) * (y - v) ** 2
    torch.testing.assert_close(got, wanted.sum(2), rtol=1e-9, atol=1e-9)


def test_histogram_grows_and_joins() -> None:
    """Bins that become wider, in one row more than in another, hold the same values; so do two histograms in one."""
    small, large = in_bins(300, 64, -3, seed=1), in_bins(300, 64, 5, seed=2)
    large[1] *= 2.0**-8  # this row does not grow
    parts = [Histogram(64), Histogram(64)]
    parts[0].add(torch.zeros(3, 5), torch.zeros(3))  # says nothing of the width
    for part, x in zip(parts, (small, large), strict=True):
        part.add(x, x.abs().amax(1))
    both = copy.deepcopy(parts[0])
    both.add(large, large.abs().amax(1))
    assert both.exponent is not None and both.exponent.tolist() == [5, -3, 5]
    every = torch.cat([small, large], 1)
    for row, values in enumerate(every):
        edges = (torch.arange(-64, 65) * 2.0 ** both.exponent[row].item() / 64).numpy()
        wanted = np.histogram(values[values != 0].numpy(), edges)[0]
        assert both.counts[row].tolist() == wanted.tolist()
    for first, second in (parts, parts[::-1]):
        joined = copy.deepcopy(first)
        joined.join(copy.deepcopy(second))
        assert torch.equal(joined.counts, both.counts) and torch.equal(joined.exponent, both.exponent)


def aimet_candidates(low: float, high: float, symmetric: bool, levels: int) -> list[tuple[float, float]]:
    """Bounds that AIMET's tf_enhanced tries: 101 step sizes, or 17 step sizes with 21 offsets each, and all."""
    low, high = min(low, 0.0), max(high, 0.0)
    high = max(high, low + 0.01)
    if symmetric:
        return [(low * k / 100, high * k / 100) for k in range(1, 102)]
    tried = []
    for k, i in product(range(1, 18), range(21)):
        step = (high - low) / levels * k / 16
        offset = -levels + levels * i / 20
        a, b = max(step * offset, low), min(step * offset + step * levels, high)
        if b > a:
            tried.append((a, b))
    return [*tried, (low, high)]


@of_grids
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_sqnr(symmetric: bool, bits: int) -> None:
    """The candidate whose errors inside and 3 times those outside are least; the values lie in middles of bins."""
    # Heavy tails, to one side: 512 bins on a side, of the exponent of the largest value.
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4000, generator=generator) ** 3 + 0.2
    width = 2.0 ** torch.frexp(x.abs().max()).exponent.item() / 512
    x = ((x / width).floor() + 0.5) * width
    codes = codes_of(symmetric, bits)
    v = x.double().numpy()

    def cost(s: float, z: float) -> float:
        z = float(np.clip(np.rint(z), *codes))
        y = s * (np.clip(np.rint(v / s + z), *codes) - z)
        outside = (v < s * (codes[0] - z)) | (v > s * (codes[1] - z))
        return float((np.where(outside, 3, 1) * (y - v) ** 2).sum())

    bounds = aimet_candidates(v.min(), v.max(), symmetric, codes[1] - codes[0])
    tried = [grid(np.float64(low), np.float64(high), symmetric, bits) for low, high in bounds]
    costs = [cost(float(s), float(z)) for s, z in tried]
    assert bits == 8 or min(costs) < 0.9 * costs[-1]  # not simply the whole range
    fq = calibrated([x[:1000], x[1000:]], bits=bits, range="sqnr", symmetric=symmetric, signed=symmetric)
    scale, zero = (float(value[0]) for value in found(fq, symmetric))
    assert cost(scale, zero) == pytest.approx(min(costs), rel=1e-5)
    assert min(abs(s / scale - 1) + abs(z - zero) for s, z in tried) < 1e-4


@pytest.mark.parametrize(("low", "high"), ((-1.0, 3.0), (0.0, 2.0), (-4.0, 0.0), (-1e-3, 2e-3)))
@of_grids
def test_candidates_of_sqnr(symmetric: bool, low: float, high: float) -> None:
    """As AIMET's, each offset with the step size as it was meant; none is wider than the range."""
    codes = codes_of(symmetric)
    spec = ranges.GridSpec(None, None, *codes, symmetric)
    scales, zeros = step_sizes(spec, torch.tensor([low]), torch.tensor([high]))
    got = torch.stack([scales.flatten(), zeros.flatten()], 1).double()
    tried = aimet_candidates(low, high, symmetric, 15)
    wanted = torch.tensor(
        [[float(v) for v in grid(np.float64(a), np.float64(b), symmetric)] for a, b in tried], dtype=torch.float64
    )
    for grids in (got, wanted):
        grids[:, 0] /= wanted[:, 0].max()
    distance = torch.cdist(got, wanted)
    assert max(distance.amin(0).max(), distance.amin(1).max()) < 1e-4


def test_sqnr_of_small_values() -> None:
    """A range has an extent of 0.01 at least."""
    fq = calibrated([torch.linspace(0, 1e-5, 50)], bits=8, range="sqnr")
    assert fq.scale.item() == pytest.approx(0.01 / 100 / 255, rel=1e-5)


def cross_entropy(v: np.ndarray, s: float, z: float, codes: tuple[int, int]) -> float:
    """-sum softmax(v) log softmax(v_hat) over all rows."""
    z = float(np.clip(np.rint(z), *codes))
    y = s * (np.clip(np.rint(v / s) + z, *codes) - z)
    p = np.exp(v - v.max(1, keepdims=True))
    q = y - y.max(1, keepdims=True)
    log_q = q - np.log(np.exp(q).sum(1, keepdims=True))
    return float(-(p / p.sum(1, keepdims=True) * log_q).sum())


@of_grids
def test_cross_entropy(symmetric: bool) -> None:
    """No candidate of the range of all batches leaves less cross-entropy; the last batch has the largest logits."""
    batches = [k * torch.randn(6, 10, generator=torch.Generator().manual_seed(k)) for k in (1, 4)]
    batches[0][2, 3] = torch.nan  # an example that says nothing
    clean = [x[x.isfinite().all(1)].double().numpy() for x in batches]
    low, high = (np.array(f([f(x) for x in clean])) for f in (np.min, np.max))
    finite = torch.cat([x[x.isfinite()] for x in batches])
    low, high = (np.float64(b) for b in (finite.min(), finite.max()))
    codes = codes_of(symmetric, 3)
    candidates = fractions(low, high, symmetric, 3)
    losses = [sum(cross_entropy(v, float(s), float(z), codes) for v in clean) for s, z in candidates]
    fq = calibrated(batches, bits=3, range="cross_entropy", symmetric=symmetric, signed=symmetric)
    scale, zero = candidates[int(np.argmin(losses))]
    assert min(losses) < 0.98 * losses[-1]
    assert_grid(fq, np.array([scale]), np.array([zero]))
    mse = calibrated(batches, bits=3, range="mse", symmetric=symmetric, signed=symmetric)
    assert not torch.equal(mse.scale, fq.scale)


def test_cross_entropy_wants_one_scale() -> None:
    with pytest.raises(ValueError, match=r"axis: wanted axis=None beside range='cross_entropy', .*; got 1"):
        QSpec(range="cross_entropy", axis=1)
    assert calibrated([torch.zeros(2, 5)], range="cross_entropy").scale.item() == 1
    fq = FakeQuant(4, range="cross_entropy")
    fq(torch.linspace(-1, 1, 5))  # a vector is the logits of one example
    assert fq.initialized
    with pytest.raises(ValueError, match="range: wanted one of .*'sqnr', .*'cross_entropy'.*; got 'entropy'"):
        QSpec(range="entropy")


def test_estimators_keep_no_view() -> None:
    """What changes a tensor in place behind the quantizer changes no range."""

    class Reuses(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.fq = FakeQuant(4, range=name, signed=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.fq(x).mul_(0)

    for name in (*ranges.ESTIMATORS, *ranges.OF_LOGITS):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        net = Reuses(name)
        fastqat.calibrate(net, [x.clone()])
        assert torch.equal(net.fq.scale, calibrated([x], range=name, signed=True).scale), name
