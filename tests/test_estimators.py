"""Gradient estimators through FakeQuant, on every backend: against their equations in float64 and against literals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import FakeQuant, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
on_backends = pytest.mark.parametrize("backend", ("reference", "cpu", "cuda-on-host", "triton"), indirect=True)
F64 = np.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fixed(scale: list[float], bits: int, zero_point: Tensor | None = None, **options: Any) -> FakeQuant:
    """A quantizer with this scale, learned."""
    options = {"learn": "scale", **options}
    return FakeQuant(bits, range="fixed", scale=torch.tensor(scale), zero_point=zero_point, **options)


def gradients(quantizer: FakeQuant, x: Tensor, g: Tensor | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result, dx and dscale in float64; g is 1 where none is given."""
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    y = quantizer(x)
    y.backward(torch.ones_like(y) if g is None else g)
    assert x.grad is not None and quantizer.scale.grad is not None
    return y.detach().double().numpy(), x.grad.double().numpy(), quantizer.scale.grad.double().numpy()


def close(got: np.ndarray, want: Any, tolerance: float = 1e-6) -> None:
    """Equal to the precision of float32."""
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# Literal vectors. One scale for each element makes its gradient that of the element.


@on_backends
@pytest.mark.parametrize(
    ("ste_mask", "inside", "at_border"),
    (("unrounded", [0, 1, 1, 1, 1, 1, 1, 0, 0], 3), ("rounded", [0, 1, 1, 1, 1, 1, 1, 1, 0], -0.04)),
)
def test_lsq(backend: str, ste_mask: str, inside: list[int], at_border: float) -> None:
    """LSQ: the masks differ where .76 is the code 3, but lies beyond it."""
    v = torch.tensor([-1.2, -0.41, -0.1, 0.04, 0.26, 0.69, 0.74, 0.76, 3])
    for grad_scale, factor in ((None, 1.0), ("lsq", 1 / math.sqrt(3))):
        y, dx, ds = gradients(fixed([0.25] * 9, 3, axis=0, ste_mask=ste_mask, grad_scale=grad_scale), v)
        close(y, [-1, -0.5, 0, 0, 0.25, 0.75, 0.75, 0.75, 0.75])
        close(dx, inside)
        close(ds / factor, [-4, -0.36, 0.4, -0.16, -0.04, 0.24, 0.04, at_border, 3], 2e-6)


@on_backends
def test_lsq_plus(backend: str) -> None:
    """LSQ+: the offset learns from what is outside."""
    x = torch.tensor([-1, -0.3, -0.1, 0.2, 0.9, 1.2, 1.5])
    quantizer = fixed([0.5] * 7, 2, axis=0, signed=False, ste_mask="unrounded", learn="scale+offset")
    with torch.no_grad():
        quantizer.offset.fill_(-0.2)
    y, dx, ds = gradients(quantizer, x)
    close(y, [-0.2, -0.2, -0.2, 0.3, 0.8, 1.3, 1.3])
    close(dx, [0, 0, 1, 1, 1, 1, 0])
    close(ds, [0, 0, -0.2, 0.2, -0.2, 0.2, 3])
    close(quantizer.offset.grad.numpy(), [1, 1, 0, 0, 0, 0, 1])


@on_backends
@pytest.mark.parametrize(
    ("estimator", "dalpha"),
    (("pact", [0, 0, 0, 0, 0, 0, 1]), ("ste", [0, -0.1, 0.133333, 0.166667, 0.016667, 0.05, 1])),
)
def test_pact(backend: str, estimator: str, dalpha: list[float]) -> None:
    """PACT, and with the straight-through estimator CG-PACT: alpha = 3 s clips, and only clipped values move it."""
    x = torch.tensor([-1, 0.2, 0.4, 1, 1.3, 1.9, 2.5])
    y, dx, ds = gradients(fixed([2 / 3] * 7, 2, axis=0, signed=False, ste_mask="unrounded", estimator=estimator), x)
    close(y, [0, 0, 0.666667, 1.333333, 1.333333, 2, 2])
    close(dx, [0, 1, 1, 1, 1, 1, 0])
    close(ds / 3, dalpha)


@on_backends
def test_ewgs(backend: str) -> None:
    """delta = .2 in steps of the grid, .4 below and above a grid point, for both signs of g; none where g is 0."""
    for scale in (1.0, 0.25):
        x = scale * torch.tensor([1.6, 1.6, 2.4, 2.4, 2.4])
        g = torch.tensor([1.0, -1, 1, -1, 0])
        assert gradients(fixed([scale], 4, estimator="ewgs"), x, g)[1] == pytest.approx([0.92, -1.08, 1.08, -0.92, 0])


@on_backends
@pytest.mark.parametrize(
    ("a", "threshold", "point"), ((1, 1.02075, 0.95952), (5, 1.47356, 0.41321), (10, 2.53392, 0.06738))
)
def test_sigmoid(backend: str, a: float, threshold: float, point: float) -> None:
    """Steepest at the threshold between two codes; DSQ of the same slope is the same."""
    x = 0.5 * torch.tensor([-3.5, -3, 0.5, 1, 2.5, -0.5])
    k = a / 2  # of tanh(k f): alpha = 1 - tanh(k / 2) in DSQ
    for options in (
        {"estimator": "sigmoid", "estimator_strength": a},
        {"estimator": "dsq", "estimator_strength": 1 - math.tanh(k / 2)},
    ):
        dx = gradients(fixed([0.5], 4, **options), x)[1]
        close(dx, [threshold, point, threshold, point, threshold, threshold], 1e-5)


@on_backends
def test_psg(backend: str) -> None:
    """lambda * |w - w_hat|, in units of w."""
    x = torch.tensor([0.6, 0.25, -0.99, 0.5, 1.49])
    dx = gradients(fixed([0.5], 3, estimator="psg", estimator_strength=150.0), x, torch.tensor([1.0, 1, -2, 1, 1]))[1]
    close(dx / 150, [0.1, 0.25, -0.02, 0, 0.01], 1e-6)


# The equations


def slope(estimator: str, strength: float, g: np.ndarray, f: np.ndarray, s: np.ndarray) -> np.ndarray:
    """E of an estimator; f is the distance from the grid point in steps."""
    if estimator == "ewgs":
        return 1 + strength * np.sign(g) * f
    if estimator == "psg":
        return strength * np.abs(s * f)
    if estimator in ("sigmoid", "dsq"):
        k = strength / 2 if estimator == "sigmoid" else math.log(2 / strength - 1)
        return k / 2 / math.tanh(k / 2) * (1 - np.tanh(k * (0.5 - np.abs(f))) ** 2)
    return np.ones_like(f)


SHAPE = (3, 4, 2, 6)
GRIDS: dict[str, dict[str, Any]] = {
    "tensor": {"bits": 4, "signed": True},
    "channels": {"bits": 3, "signed": True, "axis": 0, "restricted": True},
    "zero point": {"bits": 3, "axis": 1, "symmetric": False, "learn": "scale+zero_point"},
    "offset": {"bits": 2, "axis": -1, "signed": True, "learn": "scale+offset"},
    "groups": {"bits": 4, "signed": False, "axis": 0, "group_size": 12},
}
ESTIMATORS = {"ste": None, "ewgs": 0.7, "sigmoid": 6.0, "dsq": 0.1, "psg": 2.5, "pact": None}


def parameter_shape(axis: int | None, group_size: int | None) -> tuple[int, ...]:
    """Shape of a scale for a tensor of SHAPE."""
    channels = () if axis is None else (SHAPE[axis],)
    return (*channels, 144 // SHAPE[axis] // group_size) if group_size else channels or (1,)


def spread(p: np.ndarray, axis: int | None) -> np.ndarray:
    """A parameter with its value at every element of a tensor of SHAPE."""
    if axis is None:
        return np.broadcast_to(p, SHAPE)
    moved = np.moveaxis(np.empty(SHAPE), axis, 0).shape
    each = p.reshape(len(p), -1).repeat(144 // p.size, 1)
    return np.moveaxis(each.reshape(moved), 0, axis)


def collected(terms: np.ndarray, p: np.ndarray, axis: int | None) -> np.ndarray:
    """Sum of the terms that share an element of p."""
    return (terms if axis is None else np.moveaxis(terms, axis, 0)).reshape(p.size, -1).sum(1).reshape(p.shape)


def check_equations(estimator: str, options: dict[str, Any], ste_mask: str, dtype: torch.dtype) -> None:
    """dx, dscale and dshift of a quantizer with random x, g and parameters."""
    strength, axis = ESTIMATORS[estimator], options.get("axis")
    shape = parameter_shape(axis, options.get("group_size"))
    scale = (0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(1))) * 3 / 2 ** options["bits"]
    shift = random(*shape, seed=2) * (1 if options.get("learn") == "scale+offset" else 4)
    zero_point = shift if "symmetric" in options else None
    options = {"learn": "scale", "range": "fixed", **options, "scale": scale, "zero_point": zero_point}
    q = FakeQuant(estimator=estimator, estimator_strength=strength, ste_mask=ste_mask, **options)
    if q.offset is not None:
        with torch.no_grad():
            q.offset.copy_(shift)
    x, g = random(*SHAPE, seed=3).to(dtype), random(*SHAPE, seed=4).to(dtype)
    x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    g.view(-1)[5:9] = 0
    y, dx, ds = gradients(q, x, g)

    low, high = q.codes
    s = spread(scale.numpy(), axis)
    z = np.clip(np.rint(spread(shift.numpy(), axis)), low, high) if zero_point is not None else 0
    o = spread(shift.numpy(), axis) if q.offset is not None else np.float32(0)
    with np.errstate(invalid="ignore"):
        r = (x.float().numpy() - o) / s  # float32: what decides code and mask
        tested = np.rint(r) if ste_mask == "rounded" else r
        inside = (tested >= low - z) & (tested <= high - z)
    nan = np.isnan(r)
    assert 20 < inside.sum() < 136
    exact = np.where(inside, (x.double().numpy() - o.astype(F64)) / s.astype(F64), 0)
    level, wide = np.clip(np.rint(np.where(nan, 0, r)), low - z, high - z).astype(F64), g.double().numpy()
    e = slope(estimator, strength or 0.0, wide, exact - np.rint(np.where(inside, r, 0)), s.astype(F64))
    precision = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    close(y, np.where(nan, np.nan, s * level + (o if q.offset is not None else 0)), precision)
    close(dx, np.where(inside, wide * e, 0), precision)

    within = level if estimator == "pact" else e * exact
    terms = np.where(nan, 0, wide * (level - np.where(inside, within, 0)))
    want = collected(terms, scale.numpy(), axis)
    total = collected(np.abs(wide * level) + np.abs(np.where(inside, wide * within, 0)), scale.numpy(), axis)
    assert (np.abs(ds - want) <= 1e-6 * total).all()
    shifted = q.offset if q.offset is not None else q.zero_point
    if shifted is not None:
        outside = np.where(nan | inside, 0, wide * (1 if q.offset is not None else -s.astype(F64)))
        close(shifted.grad.double().numpy(), collected(outside, scale.numpy(), axis), 1e-5)


@on_backends
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("ste_mask", ("rounded", "unrounded"))
def test_equations(backend: str, estimator: str, ste_mask: str) -> None:
    """dx = g * E inside; dscale = sum g * (level - E * r) inside, g * level outside; the shift moves by the outside."""
    for options in GRIDS.values():
        check_equations(estimator, options, ste_mask, torch.float32)


@on_backends
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_narrow_dtypes(backend: str, estimator: str) -> None:
    """In bfloat16 and float16 the stored values count, and one rounding."""
    for dtype in (
        (torch.bfloat16, torch.float16) if backend != "triton" else (torch.float16,)
    ):  # its interpreter truncates
        check_equations(estimator, GRIDS["channels"], "rounded", dtype)


INTEGRALS = (
    ("ste", None, 1.0),
    ("ewgs", 0.2, 1.0),
    ("ewgs", 1.5, 1.0),
    *(("sigmoid", a, 1.0) for a in (0.1, 1.0, 5.0, 10.0, 40.0)),
    *(("dsq", alpha, 1.0) for alpha in (0.05, 0.2, 0.4, 0.9)),
    ("psg", 3.0, 3.0 * 0.25 / 4),  # not a surrogate of rounding: lambda * s / 4
)


@on_backends
@pytest.mark.parametrize(("estimator", "strength", "integral"), INTEGRALS)
def test_slope_integrates_to_one(backend: str, estimator: str, strength: float | None, integral: float) -> None:
    """Over one bin, averaged over the sign of g: a surrogate rises by one step from code to code."""
    count = 1024
    middle = (torch.arange(count) + 0.5) / count  # of equal parts of a bin
    x = 0.25 * torch.cat([middle + 1.5, middle + 1.5, middle - 2.5])
    g = torch.cat([torch.ones(count), -torch.ones(count), torch.ones(count)])
    dx = gradients(fixed([0.25], 4, estimator=estimator, estimator_strength=strength), x, g)[1]
    forth, back, elsewhere = dx.reshape(3, count).mean(1)
    assert (forth - back) / 2 == pytest.approx(integral, rel=1e-4) == pytest.approx(elsewhere, rel=1e-4)


@on_backends
def test_strength_is_read_from_the_device(backend: str) -> None:
    """A strength that is changed in place counts from then on; it moves and is saved with the quantizer."""
    q, x = fixed([1.0], 4, estimator="ewgs"), torch.tensor([2.4])
    close(gradients(q, x)[1], [1.08])
    q.estimator_strength.fill_(0.5)
    close(gradients(q, x)[1], [1.2])
    other = fixed([1.0], 4, estimator="ewgs")
    other.load_state_dict(q.state_dict())
    close(gradients(other.half(), x)[1], [1.2])


@pytest.mark.parametrize("estimator", ("sigmoid", "ewgs", "psg", "pact"))
def test_backends_agree(estimator: str) -> None:
    """Values to the bit, gradients to float32."""
    found = []
    for name in ("reference", "cpu", "triton"):
        if fastqat.status()[name] == "available":
            with fastqat.use_backend(name):
                found.append(
                    gradients(fixed([0.3] * 4, 3, axis=0, estimator=estimator), random(4, 300), random(4, 300, seed=1))
                )
    assert len(found) > 1
    for y, dx, ds in found[1:]:
        assert (y == found[0][0]).all()
        close(dx, found[0][1], 1e-6)
        close(ds, found[0][2], 1e-5)


# Stochastic rounding


def drawn(x: Tensor, scale: float, bits: int, *, seed: int = 0, step: int = 0, tensor_id: int = 0) -> np.ndarray:
    """floor(x / s + u) within the codes, float32; u is Philox in Python integers."""
    u = oracle.philox_uniform(torch.tensor([step]), seed, tensor_id, x.numel())[0].numpy().reshape(x.shape)
    r = x.numpy() / np.float32(scale)
    return np.clip(np.floor(r + u), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@on_backends
def test_stochastic_rounding_of_each_element(backend: str) -> None:
    """Every code is that of the counter-based generator: by seed, step and element; gradients are about that code."""
    x, g = 0.7 * random(5, 30), random(5, 30, seed=1)
    q = fixed([0.3], 3, estimator="stochastic", seed=2**40 + 17)
    for step in range(3):
        code = drawn(x, 0.3, 3, seed=2**40 + 17, step=step)
        y, dx, ds = gradients(q, x, g)
        assert (y == (np.float32(0.3) * code).astype(np.float32)).all()
        free = np.floor(x.numpy() / np.float32(0.3) + 1)  # at most one above the code
        inside = (code > -4) & (code < 3)
        assert inside.sum() > 90 and (free >= code)[inside].all()
        close(dx[inside], g.numpy()[inside])
        clipped = (x.numpy() / 0.3 < -5) | (x.numpy() / 0.3 > 4)
        assert clipped.any() and not dx[clipped].any()
        want = np.where(dx != 0, code - x.double().numpy() / np.float64(np.float32(0.3)), code) * g.double().numpy()
        close(ds, [want.sum()], 1e-5)
        fastqat.step(q)


@on_backends
def test_moments_of_stochastic_rounding(backend: str) -> None:
    """Unbiased; variance phi (1 - phi) s^2; s^2 / 6 and mean error s / 3 over uniform values."""
    count, scale = 16384, 0.25
    q = fixed([scale], 4, estimator="stochastic")
    for phi in (0.1, 0.5, 0.85):
        with torch.no_grad():
            y = q(torch.full((count,), scale * (2 + phi))).double() / scale
        assert set(y.tolist()) == {2.0, 3.0}
        assert abs(y.mean() - (2 + phi)) < 4 * math.sqrt(phi * (1 - phi) / count)
        assert abs(y.var() - phi * (1 - phi)) < 0.01
    x = scale * (torch.arange(count) / count * 6 - 3)
    with torch.no_grad():
        error = (q(x) - x).double() / scale
    assert abs(error.square().mean() - 1 / 6) < 0.005 and abs(error.abs().mean() - 1 / 3) < 0.005
    with torch.no_grad():
        nearest = (q.eval()(x) - x).double() / scale
    assert abs(nearest.square().mean() - 1 / 12) < 1e-3 and abs(nearest.abs().mean() - 1 / 4) < 1e-3


@on_backends
def test_a_recomputed_forward_draws_the_same(backend: str) -> None:
    """Within a step, also under activation checkpointing; another step, seed or place in the model draws anew."""
    x, q = random(64), fixed([0.3], 4, estimator="stochastic")
    y, dx, ds = gradients(q, x)
    again = gradients(q, x)
    assert all((one == two).all() for one, two in zip((y, dx, ds), again, strict=True))
    leaf = x.clone().requires_grad_()
    q.zero_grad()
    checkpoint(lambda t: q(t).square(), leaf, use_reentrant=False).sum().backward()
    close(leaf.grad.numpy(), 2 * y * dx)
    fastqat.step(q)
    assert (gradients(q, x)[0] != y).any()
    assert (gradients(fixed([0.3], 4, estimator="stochastic", seed=1), x)[0] != y).any()


@on_backends
def test_evaluation_rounds_to_nearest(backend: str) -> None:
    """And its gradient is about the nearest code."""
    x = random(64)
    one = gradients(fixed([0.3], 4, estimator="stochastic").eval(), x)
    two = gradients(fixed([0.3], 4), x)
    for a, b in zip(one, two, strict=True):
        close(a, b)


def test_each_weight_of_a_model_draws_its_own() -> None:
    """Two layers of equal weights are rounded differently: tensors have ids by their order in the model."""
    layers = [nn.Linear(16, 16, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    model = fastqat.prepare(nn.Sequential(*layers), QConfig(QSpec(4, estimator="stochastic"), None))
    one, two = (layer.weight_fake_quant(layer.weight) for layer in model)
    assert not torch.equal(one, two)
    scale = model[0].weight_fake_quant.scale.item()
    for k, y in enumerate((one, two)):
        code = drawn(model[k].weight.detach(), scale, 4, tensor_id=model[k].weight_fake_quant.tensor_id)
        assert (y.detach().numpy() == np.float32(scale) * code.astype(np.float32)).all()


WRONG = (
    ({"estimator": "lsq"}, ValueError, "estimator: wanted one of 'ste'"),
    (
        {"estimator": "ste", "estimator_strength": 1.0},
        ValueError,
        "estimator_strength: wanted none for estimator='ste'",
    ),
    ({"estimator": "dsq", "estimator_strength": 1.0}, ValueError, r"estimator_strength: wanted a number in \(0, 1\)"),
    ({"estimator": "psg", "estimator_strength": -1}, ValueError, "estimator_strength: wanted a positive number"),
    ({"estimator": "ewgs", "estimator_strength": "0.2"}, TypeError, "estimator_strength: wanted a number"),
    ({"estimator": "stochastic", "seed": 0.5}, TypeError, "seed: wanted an int"),
)


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_wrong_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Named, with what was wanted."""
    with pytest.raises(kind, match=message):
        FakeQuant(4, **options)
