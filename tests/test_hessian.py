"""The trace of the Hessian, and the strength of EWGS that follows, against networks whose Hessian is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_regularization import Oracle, random
from torch import Tensor, nn

import fastqat
from fastqat import QConfig, QSpec
from fastqat.hessian import hessian_traces

pytestmark = pytest.mark.usefixtures("one_thread")


def quadratic(matrix: np.ndarray, u: Tensor) -> Tensor:
    """u M u / 2, whose Hessian is M for a symmetric M."""
    return 0.5 * u.flatten() @ torch.from_numpy(matrix).to(u.dtype) @ u.flatten()


def symmetric(size: int, seed: int = 0) -> np.ndarray:
    """A positive matrix with couplings."""
    a = np.random.default_rng(seed).normal(size=(size, size))
    return a @ a.T + np.diag(np.arange(size))


def test_trace_of_a_diagonal_is_exact() -> None:
    """One probe has no error there; a second one ends it."""
    x, y = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = quadratic(np.diag([1.0, -2.0, 5.0]), x) + (y**3).sum() + 7 * y.sum()
    assert hessian_traces(loss, [x, y]) == [4.0, 18.0]
    assert hessian_traces(x.sum() * 2, [x, y]) == [0.0, 0.0]


def test_trace_with_couplings() -> None:
    """Unbiased: within the error that 2000 probes have, also where two tensors are coupled."""
    m = symmetric(12)
    u = torch.randn(12, dtype=torch.float64, requires_grad=True)
    parts = [u[:5], u[5:]]
    loss = quadratic(m, torch.cat(parts))
    traces = hessian_traces(loss, parts, probes=2000, tolerance=0.0)
    couplings = m - np.diag(np.diag(m))
    for trace, part in zip(traces, (slice(0, 5), slice(5, 12)), strict=True):
        deviation = np.sqrt(2 * (couplings[part, part] ** 2).sum() + (couplings[part] ** 2).sum()) / np.sqrt(2000)
        assert abs(trace - np.diag(m)[part].sum()) < 4 * deviation
    few = hessian_traces(quadratic(m, torch.cat(parts)), parts, probes=50)
    assert few == hessian_traces(quadratic(m, torch.cat(parts)), parts, probes=50) != traces


def test_probes_end_at_the_tolerance() -> None:
    """A loose tolerance stops early, at the mean so far."""
    m = symmetric(6)
    u = torch.ones(6, dtype=torch.float64, requires_grad=True)
    first = hessian_traces(quadratic(m, u), [u], probes=2, tolerance=0.0)
    assert hessian_traces(quadratic(m, u), [u], probes=50, tolerance=1e9) == first
    assert hessian_traces(quadratic(m, u), [u], probes=50, tolerance=0.0) != first


class Quadratic(nn.Module):
    """A quantized weight, handed out."""

    def __init__(self, w: Tensor, **options: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.quantize = fastqat.FakeQuant(3, range="fixed", estimator="ewgs", **options)

    def forward(self, factor: float) -> Tensor:
        return self.quantize(self.w) * factor


@pytest.mark.parametrize("factors", ([1.0], [1.0, -1.0, 3.0], [0.5, 1.0, 2.0, 100.0]))
@pytest.mark.parametrize("per_channel", (False, True))
def test_delta_of_a_quadratic(factors: list[float], per_channel: bool) -> None:
    """Known Hessian and gradient, in units of the range of the grid as the source has them, then in its steps."""
    w = random(3, 4)
    scale = torch.tensor([0.2, 0.3, 0.6] if per_channel else [0.3])
    model = Quadratic(w, scale=scale, axis=0 if per_channel else None)
    curvature = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    target = random(3, 4, seed=1).double()

    def loss(model: nn.Module, factor: float) -> Tensor:
        return (model(factor).double() - target).square().mul(curvature / 2).sum()

    before = [t.clone() for t in (*model.state_dict().values(), torch.get_rng_state())]
    got = fastqat.ewgs_delta(model, factors, loss)
    assert all(map(torch.equal, before, (*model.state_dict().values(), torch.get_rng_state())))
    assert model.training and not any(p.grad is not None for p in model.parameters())

    s = scale.double().numpy().reshape(-1, 1) * np.ones((3, 4))
    y = Oracle(w, s, -4, 3).y
    range_ = 7 * s  # y = range * x01 + constant
    ratios = []
    for factor in factors[:3]:
        gradient = range_ * factor * curvature.numpy() * (factor * y - target.numpy())
        trace = (range_**2 * factor**2 * curvature.numpy()).sum()
        ratios.append(trace / 12 / (3 * gradient.std(ddof=1)))
    np.testing.assert_allclose(got["quantize"], np.mean(ratios) / 7, rtol=1e-5)


def test_delta_is_not_negative() -> None:
    """A loss that curves downwards has 0, and so has a gradient that does not vary."""
    model = Quadratic(random(3, 4), scale=torch.tensor([0.3]))
    assert fastqat.ewgs_delta(model, [1.0], lambda m, k: -m(k).square().sum()) == {"quantize": 0.0}
    assert fastqat.ewgs_delta(model, [1.0], lambda m, k: m(k).sum()) == {"quantize": 0.0}
    assert fastqat.ewgs_delta(Quadratic(random(1), scale=torch.ones(1)), [1.0], lambda m, k: m(k).square().sum()) == {
        "quantize": 0.0
    }


def test_delta_of_a_network() -> None:
    """Weights and activations of a prepared model; what it gives can be written back, and is used."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    spec = QSpec(4, estimator="ewgs", learn="scale")
    fastqat.prepare(net, QConfig(spec, spec), overrides={"4": {"estimator": "dsq"}})
    batches = [(random(16, 4, seed=k), torch.arange(16) % 3) for k in range(4)]
    fastqat.calibrate(net, batches)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    state = {k: v.clone() for k, v in net.state_dict().items()}
    deltas = fastqat.ewgs_delta(net, iter(batches), loss, num_batches=2)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and net.training
    assert set(deltas) == {"0.weight_fake_quant", "0.activation_fake_quant"}
    assert deltas["0.weight_fake_quant"] > 0
    assert deltas == fastqat.ewgs_delta(net, batches[:2], loss)

    handle = fastqat.quantize_weights_together(net)
    assert fastqat.ewgs_delta(net, batches[:2], loss) == deltas
    handle.remove()
    for name, delta in deltas.items():
        net.get_submodule(name).estimator_strength.fill_(delta)
    assert fastqat.ewgs_delta(net, batches[:2], loss) == deltas  # measured straight through, whatever the strength


class Product(Quadratic):
    """A quantized product of a quantized weight."""

    def __init__(self, w: Tensor) -> None:
        super().__init__(w, scale=torch.tensor([0.3]))
        self.act = fastqat.FakeQuant(4, range="fixed", estimator="ewgs", scale=torch.tensor([0.2]), learn="scale")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.quantize(self.w) * x)


def test_delta_through_another_quantizer() -> None:
    """The second derivative goes straight through a quantizer behind, and stops where that one clips."""
    w, x = random(40), random(40, seed=1)
    model = Product(w)
    y = Oracle(w, 0.3, -4, 3).y
    act = Oracle(torch.from_numpy(y * x.double().numpy()), 0.2, -8, 7)
    inside = np.abs(act.w - act.y) < 0.1001  # others are clipped
    assert 30 < inside.sum() < 40
    c = np.linspace(1, 3, 40)
    got = fastqat.ewgs_delta(
        model, [x], lambda m, x: 0.5 * (m(x).square() * torch.from_numpy(c)).sum(), probes=1000, tolerance=0.0
    )
    slope = 0.3 * x.double().numpy() * inside  # of the product by a step of the weight's grid
    for name, step in (("quantize", slope), ("act", 0.2 * np.ones(40))):
        trace, spread = (step**2 * c).sum(), (step * c * act.y).std(ddof=1)
        deviation = np.sqrt(((slope * 0.2 * c) ** 2).sum() / 1000)  # signs of the other tensor add this to a mean
        assert 4 * deviation < 0.15 * trace
        assert abs(got[name] - trace / 40 / (3 * spread)) < 4 * deviation / 40 / (3 * spread)


BAD_DELTAS: dict[str, tuple[Any, Any, Any, str]] = {
    "no quantizer": (lambda: nn.Linear(2, 2), [1.0], None, "model: wanted a model with quantizers of estimator='ewgs'"),
    "no batch": (lambda: Quadratic(random(3), scale=torch.ones(1)), [], None, "batches: .*none seen by quantize"),
    "a vector": (lambda: Quadratic(random(3), scale=torch.ones(1)), [1.0], lambda m, k: m(k), r"loss: .*got \[3\]"),
    "not finite": (lambda: Quadratic(random(3), scale=torch.ones(1)), [torch.nan], lambda m, k: m(k).sum(), "loss: "),
    "no range": (lambda: nn.Sequential(fastqat.FakeQuant(4, estimator="ewgs")), [1.0], None, "got none for 0: "),
}


@pytest.mark.parametrize("case", BAD_DELTAS)
def test_wrong_uses_of_delta(case: str) -> None:
    """Each names what is missing."""
    make, batches, loss, message = BAD_DELTAS[case]
    with pytest.raises(ValueError, match=message):
        fastqat.ewgs_delta(make(), batches, loss)
