"""Dampening and bin regularization against their equations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_prepare import quantizers
from torch import Tensor, nn

import fastqat
from fastqat import QConfig, QSpec, schedules
from fastqat.regularization import bin_error, dampening

pytestmark = pytest.mark.usefixtures("one_thread")
W = [[0.12, 0.26, -0.9], [0.04, -0.33, 0.51]]
EXAMPLE: dict[str, Any] = {"scale": torch.tensor([0.25]), "qmin": -2, "qmax": 1}
KERNEL_MEAN = [[0.08, 0, 0], [0.0266667, -0.0533333, 0]]


class Oracle:
    """Codes, values and distances of a weight in float64, with a grid's parameters spread to its shape."""

    def __init__(self, w: Tensor, s: Any, qmin: int, qmax: int, z: Any = 0.0, o: Any = 0.0) -> None:
        self.w, self.s = w.detach().double().numpy(), np.asarray(s, np.float64)
        z = np.clip(np.rint(z), qmin, qmax)
        self.code = np.clip(np.rint((self.w - o) / self.s) + z, qmin, qmax)
        self.y = self.s * (self.code - z) + o
        self.low, self.high = self.s * (qmin - z) + o, self.s * (qmax - z) + o
        self.inside = (self.w >= self.low) & (self.w <= self.high)

    def dampening(self, factor: float) -> tuple[float, np.ndarray]:
        """Loss, and its gradient by w."""
        distance = np.where(self.inside, self.w - self.y, 0.0)
        return factor * (distance**2).sum(), 2 * factor * distance

    def bins(self) -> tuple[float, np.ndarray]:
        """Loss as the sum of (mean - grid point)^2 + var over the bins of one scale, and its gradient."""
        loss, gradient = 0.0, np.zeros_like(self.w)
        for code in np.unique(self.code):
            members = self.code == code
            loss += ((self.w - self.y)[members] ** 2).mean()
            gradient[members] = 2 * (self.w - self.y)[members] / members.sum()
        return loss, gradient


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graded(loss: Any, w: Tensor, **grid: Any) -> tuple[float, np.ndarray]:
    """A loss and its gradient by w; asserts that no parameter of the grid gets one."""
    w = w.clone().requires_grad_()
    parameters = {
        k: v.clone().requires_grad_() for k, v in grid.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    value = loss(w, **{**grid, **parameters})
    assert value.shape == () and value.dtype == torch.float32
    value.backward()
    assert all(p.grad is None or not p.grad.any() for p in parameters.values())
    assert w.grad is not None
    return value.item(), w.grad.double().numpy()


def assert_close(got: tuple[float, np.ndarray], want: tuple[float, np.ndarray], tolerance: float = 2e-6) -> None:
    """Loss relative to itself, gradient relative to its largest."""
    assert abs(want[0]) > 0 and np.abs(want[1]).max() > 0
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    np.testing.assert_allclose(got[1], want[1], atol=tolerance * np.abs(want[1]).max(), rtol=0)


# Dampening


@pytest.mark.parametrize(
    ("aggregate", "loss", "factor"), (("sum", 0.0224, 6), ("mean", 0.00373333, 1), ("kernel_mean", 0.00746667, 2))
)
def test_dampening_example(aggregate: str, loss: float, factor: float) -> None:
    """.26 and .51 lie above the range, whose highest value is .25, and -.9 below: they have no gradient."""
    got = graded(dampening, torch.tensor(W), **EXAMPLE, aggregate=aggregate)
    np.testing.assert_allclose(got[0], loss, rtol=2e-6)
    np.testing.assert_allclose(got[1], np.array(KERNEL_MEAN) * factor / 2, atol=1e-6)


def test_dampening_example_per_channel() -> None:
    """The second row on a grid of .5: .04 -> 0, -.33 -> -.5, .51 above .5."""
    scale = torch.tensor([0.25, 0.5])
    got = graded(dampening, torch.tensor(W), scale=scale, qmin=-2, qmax=1, axis=0, aggregate="sum")
    np.testing.assert_allclose(got[0], 0.12**2 + 0.04**2 + 0.17**2, rtol=1e-6)
    np.testing.assert_allclose(got[1], [[0.24, 0, 0], [0.08, 0.34, 0]], atol=1e-6)


def test_bounds_are_inside() -> None:
    """A weight on the highest value has distance 0; beyond a bound nothing pulls, however far."""
    w = torch.tensor([-0.5, -0.50001, 0.25, 0.2500001, -torch.inf, torch.inf, 0.2])
    value, gradient = graded(dampening, w, **EXAMPLE, aggregate="sum")
    np.testing.assert_allclose(value, 0.05**2, rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, 0, 0, 0, 0, 0, -0.1], atol=1e-6)


SHAPE = (4, 3, 2, 2)
GRIDS: dict[str, dict[str, Any]] = {
    "signed per tensor": {"scale": torch.tensor([0.3]), "qmin": -4, "qmax": 3},
    "unsigned": {"scale": torch.tensor([0.3]), "qmin": 0, "qmax": 7},
    "zero point": {"scale": torch.tensor([0.3]), "zero_point": torch.tensor([2.3]), "qmin": 0, "qmax": 7},
    "zero point beyond": {"scale": torch.tensor([0.3]), "zero_point": torch.tensor([9.3]), "qmin": 0, "qmax": 7},
    "offset": {"scale": torch.tensor([0.3]), "offset": torch.tensor([-0.4]), "qmin": 0, "qmax": 7},
    "channels": {"scale": torch.tensor([0.1, 0.3, 0.5, 0.9]), "qmin": -4, "qmax": 3, "axis": 0},
    "channels of axis 1": {
        "scale": torch.tensor([0.1, 0.3, 0.7]),
        "zero_point": torch.tensor([0.0, 1.6, -2.2]),
        "qmin": -4,
        "qmax": 3,
        "axis": 1,
    },
    "groups": {"scale": 0.1 + torch.arange(12).view(4, 3) / 10, "qmin": -4, "qmax": 3, "axis": 0, "group_size": 4},
    "eps": {"scale": torch.tensor([1e-3]), "qmin": -4, "qmax": 3, "eps": 0.25},
}
of_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def oracle_of(w: Tensor, grid: dict[str, Any]) -> Oracle:
    """The oracle on a grid of GRIDS, for a weight of SHAPE."""

    def spread(name: str) -> np.ndarray:
        if name not in grid:
            return np.zeros(SHAPE)
        p = grid[name].numpy().astype(np.float64)
        if "group_size" in grid:
            return p[:, :, None].repeat(4, 2).reshape(SHAPE)
        return np.broadcast_to(p.reshape([-1 if d == grid.get("axis") else 1 for d in range(4)]), SHAPE)

    scale = np.maximum(spread("scale"), grid.get("eps", 0.0))
    return Oracle(w, scale, grid["qmin"], grid["qmax"], spread("zero_point"), spread("offset"))


@of_grids
@pytest.mark.parametrize("aggregate", ("sum", "mean", "kernel_mean"))
def test_dampening_against_the_equation(grid: dict[str, Any], aggregate: str) -> None:
    """Loss, closed-form gradient, and none for scale, zero point and offset, on every kind of grid."""
    w = random(*SHAPE)
    oracle = oracle_of(w, grid)
    assert 0 < oracle.inside.sum() < w.numel()
    factor = {"sum": 1.0, "mean": 1 / 48, "kernel_mean": 4 / 48}[aggregate]
    assert_close(graded(dampening, w, **grid, aggregate=aggregate), oracle.dampening(factor))


@of_grids
def test_bins_against_the_equation(grid: dict[str, Any]) -> None:
    """The same for bins: channels share a bin by code, and what is beyond the range counts."""
    w = random(*SHAPE)
    oracle = oracle_of(w, grid)
    assert_close(graded(bin_error, w, **grid), oracle.bins())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("dampening", "bins"))
def test_narrow_weights(dtype: torch.dtype, name: str) -> None:
    """The stored values count; the loss is float32, the gradient has the weight's dtype."""
    w = random(*SHAPE).to(dtype)
    oracle = oracle_of(w, GRIDS["channels"])
    loss, want = (dampening, oracle.dampening(4 / 48)) if name == "dampening" else (bin_error, oracle.bins())
    assert_close(graded(loss, w, **GRIDS["channels"]), want, tolerance=2.0**-8)


@pytest.mark.parametrize("loss", (dampening, bin_error))
def test_frozen_weights_count_for_nothing(loss: Any) -> None:
    """Neither in the loss, nor among the members of a bin, nor in the gradient."""
    w, frozen = random(*SHAPE), random(*SHAPE, seed=1) > 0
    rest = w[~frozen]
    options = {"aggregate": "sum"} if loss is dampening else {}
    grid = GRIDS["signed per tensor"]
    value, gradient = graded(loss, w, **grid, **options, frozen=frozen)
    want, of_rest = graded(loss, rest, **grid, **options)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient[~frozen.numpy()], of_rest, rtol=1e-6)
    assert not gradient[frozen.numpy()].any()


# Bins


def test_bins_example() -> None:
    """Bin -2 .16, -1 .0064, 0 .008, 1 .03385."""
    value, gradient = graded(bin_error, torch.tensor(W), **EXAMPLE)
    np.testing.assert_allclose(value, 0.20825, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.12, 0.01, -0.8], [0.04, -0.16, 0.26]], atol=1e-6)


def test_bins_are_mean_and_variance() -> None:
    """(mean - s * code)^2 + the biased variance, where there is one scale; an empty bin adds nothing."""
    w = random(500)
    oracle = Oracle(w, 0.25, -8, 7)
    want = 0.0
    for code in range(-8, 8):
        members = oracle.w[oracle.code == code]
        if code == 5:
            w = w[torch.from_numpy(oracle.code != 5)]
        elif members.size:
            want += (members.mean() - 0.25 * code) ** 2 + members.var()
    got = bin_error(w, torch.tensor([0.25]), qmin=-8, qmax=7)
    np.testing.assert_allclose(got.item(), want, rtol=1e-5)


def test_bins_far_from_zero() -> None:
    """Sums are about the grid point: mean^2 - square of the mean would lose all digits."""
    w = 1000 + random(1000) * 0.01
    got = bin_error(w, torch.tensor([1.0]), torch.tensor([-128.0]), qmin=-128, qmax=127)
    assert got.isfinite()
    wide = bin_error(w, torch.tensor([200.0]), qmin=-8, qmax=7)
    np.testing.assert_allclose(wide.item(), ((w.double() - 1000) ** 2).mean().item(), rtol=1e-4)


# Models


class Net(nn.Module):
    """A linear layer twice, a transposed convolution whose output channels are not in front, and one at 8 bits."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transposed = nn.ConvTranspose2d(2, 6, 3)
        self.first, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
        if shared:
            self.tied.weight = self.first.weight
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(x).mean((2, 3))
        return self.head(self.norm(self.tied(self.first(x).relu()) + x))


def prepared(shared: bool = True, **options: Any) -> nn.Module:
    """Net at 3 bits per channel, its head at 8."""
    spec = QSpec(3, 0, learn="scale", range="minmax", **options)
    return fastqat.prepare(Net(shared), QConfig(spec, None), overrides={"head": {"bits": 8}})


def kernels(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each quantized weight of Net once, [output channels, ...], and its scale spread to that shape."""
    layers = (
        (model.transposed.weight.transpose(0, 1), model.transposed),
        (model.first.weight, model.first),
        (model.head.weight, model.head),
    )
    return [
        (w, layer.weight_fake_quant.scale.detach().view([-1] + [1] * (w.dim() - 1)).expand_as(w)) for w, layer in layers
    ]


def test_loss_of_a_model() -> None:
    """The sum over the weights, each once: also those of 8 bits, and of transposed convolutions by output channel."""
    model = prepared()
    want, gradients = 0.0, []
    for w, scale in kernels(model):
        bits = 8 if w.shape[0] == 3 else 3
        oracle = Oracle(w, scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        loss, gradient = oracle.dampening(0.7 * w.shape[0] / w.numel())
        want += loss
        gradients.append(gradient)
    loss = fastqat.dampening_loss(model, 0.7)
    loss.backward()
    np.testing.assert_allclose(loss.item(), want, rtol=1e-5)
    for (w, _), gradient in zip(kernels(model), gradients, strict=True):
        p = next(p for p in model.parameters() if p.data_ptr() == w.data_ptr())
        got = p.grad.transpose(0, 1) if w.dim() == 4 else p.grad
        np.testing.assert_allclose(got.numpy(), gradient, atol=1e-8)  # w - q(w) is small beside w at 8 bits
    assert all(q.scale.grad is None for q in quantizers(model))


def test_bins_of_a_model() -> None:
    """The sum over the weights of the sum over their bins."""
    model = prepared()
    want = sum(
        Oracle(w, scale, *((-128, 127) if w.shape[0] == 3 else (-4, 3))).bins()[0] for w, scale in kernels(model)
    )
    np.testing.assert_allclose(fastqat.bin_regularization(model).item(), want, rtol=1e-5)
    np.testing.assert_allclose(fastqat.bin_regularization(model, 3.0).item(), 3 * want, rtol=1e-5)


def test_parametrized_weights() -> None:
    """FakeQuant as a parametrization, behind another one too: it is what reaches the quantizer that counts."""

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer, plain = nn.Linear(5, 4), nn.Linear(5, 4)
    for parametrization in (Double(), fastqat.FakeQuant(3, 0)):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
    with torch.no_grad():
        plain.weight.copy_(2 * layer.parametrizations.weight.original)
    fastqat.prepare(model := nn.Sequential(plain), QConfig(QSpec(3, 0), None))
    assert fastqat.dampening_loss(model).item() > 0
    assert fastqat.dampening_loss(layer).item() == fastqat.dampening_loss(model).item()


def test_weight_of_the_loss() -> None:
    """A number, a tensor, or a schedule of the optimizer steps that the quantizers have counted."""
    model = prepared()
    whole = fastqat.dampening_loss(model, 1.0).item()
    assert fastqat.dampening_loss(model, torch.tensor([0.25])).item() == pytest.approx(0.25 * whole)
    assert fastqat.dampening_loss(model, 0).item() == 0
    annealed = schedules.linear(0.0, 1.0, steps=4, begin=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(6):
        part = min(step / 4, 1.0)
        assert fastqat.dampening_loss(model, annealed).item() == pytest.approx(part * whole)
        fastqat.dampening_loss(model, annealed).backward()
        optimizer.step()


def test_quantizers_without_effect_count_for_nothing() -> None:
    """Switched off, or without a range yet."""
    model = prepared()
    whole = fastqat.dampening_loss(model).item()
    model.head.weight_fake_quant.fake_quant_enabled = False
    assert 0 < fastqat.dampening_loss(model).item() < whole
    with fastqat.fake_quant_enabled(model, False):
        assert fastqat.dampening_loss(model).item() == fastqat.bin_regularization(model).item() == 0
    with torch.no_grad():
        (layer := nn.Linear(3, 3)).weight.zero_()
    fastqat.prepare(zeros := nn.Sequential(layer), QConfig(QSpec(3, 0), None))
    assert fastqat.dampening_loss(zeros).item() == 0


@pytest.mark.parametrize(
    ("backend", "aggregate", "freezes"),
    (
        ("reference", "sum", False),
        ("reference", "mean", True),
        *((backend, "kernel_mean", True) for backend in ("reference", "cpu", "triton")),
    ),
    indirect=("backend",),
)
def test_decoupled_dampening_is_the_same(backend: str, aggregate: str, freezes: bool) -> None:
    """QSpec(dampening=...) adds the gradient of the loss to that of the task, while weights freeze too."""
    oscillation = fastqat.Oscillation(0.1, 0.25 if freezes else None, max_bits=3)
    annealed = schedules.linear(0.0, 2.0, steps=8, begin=0.0)
    # A weight that two layers quantize goes through the quantizer twice, and would be pulled twice.
    folded = prepared(False, oscillation=oscillation, dampening=fastqat.Dampening(annealed, aggregate))
    plain = prepared(False, oscillation=oscillation)
    x, pairs = random(8, 2, 4, 4), list(zip(folded.parameters(), plain.parameters(), strict=True))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in (folded, plain)]
    for step in range(8):
        folded(x).square().mean().backward()
        (plain(x).square().mean() + fastqat.dampening_loss(plain, annealed, aggregate)).backward()
        for one, two in pairs:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for one, two in pairs:
                if one.dim() > 1:  # no scale
                    one += (noise := 0.1 * random(*one.shape, seed=step))
                    two += noise
    trackers = [q.tracker for q in quantizers(plain) if q.tracker is not None]
    assert any(tracker.frozen().any() for tracker in trackers) == freezes
    assert not all(tracker.frozen().all() for tracker in trackers)


def test_compiled() -> None:
    """Both losses are one graph, with the same values and gradients."""
    model = prepared(oscillation=fastqat.Oscillation(0.1, 0.25, max_bits=3))
    model(random(8, 2, 4, 4))

    def losses() -> Tensor:
        return fastqat.dampening_loss(model) + fastqat.bin_regularization(model)

    weights = [w for w in model.parameters() if w.dim() > 1]
    results = []
    for function in (losses, torch.compile(losses, backend="aot_eager", fullgraph=True)):
        loss = function()
        results.append([loss, *torch.autograd.grad(loss, weights)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "aggregate": (lambda: dampening(torch.tensor(W), **EXAMPLE, aggregate="max"), ValueError, "aggregate: wanted"),
    "frozen": (lambda: dampening(torch.tensor(W), **EXAMPLE, frozen=torch.zeros(2, 3)), ValueError, "frozen: wanted"),
    "scale": (lambda: bin_error(torch.tensor(W), torch.ones(2), qmin=0, qmax=3), ValueError, r"scale: .*\[1\]"),
    "no weights": (lambda: fastqat.dampening_loss(Net()), ValueError, "model: .* got Net without any"),
    "weight": (lambda: fastqat.bin_regularization(prepared(), -1.0), ValueError, "weight: wanted"),
    "text": (lambda: fastqat.dampening_loss(prepared(), "0.1"), TypeError, "weight: wanted"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    """Named, with what was wanted and what came."""
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call()
