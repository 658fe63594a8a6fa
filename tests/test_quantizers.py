"""The quantizers of the literature: their literals, their equations in float64, and where their ranges begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, prepare, quantizers, ranges
from fastqat.oscillation import latent_codes
from fastqat.ranges import GridSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def made(spec: QSpec, scale: float | None = None) -> FakeQuant:
    """The quantizer of a recipe, with a range."""
    quantizer = FakeQuant(**vars(spec))
    if scale is not None:
        quantizer.set_grid(torch.tensor([scale]))
    return quantizer


def results(quantizer: FakeQuant, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and the gradient of the scale."""
    x = x.clone().requires_grad_()
    quantizer.scale.grad = None
    y = quantizer(x)
    y.backward(g)
    assert x.grad is not None
    return y.detach(), x.grad, torch.zeros(1) if quantizer.scale.grad is None else quantizer.scale.grad.clone()


def each(quantizer: FakeQuant, x: Tensor) -> Tensor:
    """The gradient of the scale by every element alone."""
    return torch.cat([results(quantizer, x, unit)[2] for unit in torch.eye(len(x))])


PACT_X = torch.tensor([-1.0, 0.2, 0.4, 1.0, 1.3, 1.9, 2.2, 2.5])


@pytest.mark.parametrize("recipe", (quantizers.pact, quantizers.cg_pact))
def test_pact_by_hand(recipe: Any) -> None:
    """alpha = 2, 2 bits: the gradient of the scale is 3 times that of alpha."""
    quantizer = made(recipe(2, alpha=2.0))
    y, dx, _ = results(quantizer, PACT_X, torch.ones(8))
    torch.testing.assert_close(y, torch.tensor([0, 0, 2 / 3, 4 / 3, 4 / 3, 2, 2, 2]), rtol=1e-6, atol=0)
    assert dx.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    below = [0.0, -0.1, 0.4 / 3, 0.5 / 3, 0.05 / 3, 0.05]
    of_alpha = [0.0] * 6 + [1.0, 1.0] if recipe is quantizers.pact else [*below, 1.0, 1.0]
    torch.testing.assert_close(each(quantizer, PACT_X) / 3, torch.tensor(of_alpha), rtol=1e-5, atol=1e-6)


def test_lsq_by_hand() -> None:
    """The vector of LSQ with 3 bits: values, straight-through mask, and ds before its factor 1 / sqrt(N qmax)."""
    quantizer = made(quantizers.lsq(3, signed=True), 0.25)
    v = torch.tensor([-1.2, -0.41, -0.1, 0.04, 0.26, 0.69, 0.74, 0.76, 3.0])
    y, dx, _ = results(quantizer, v, torch.ones(9))
    assert y.tolist() == [-1, -0.5, 0, 0, 0.25, 0.75, 0.75, 0.75, 0.75]
    assert dx.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    expected = torch.tensor([-4, -0.36, 0.4, -0.16, -0.04, 0.24, 0.04, 3, 3])
    torch.testing.assert_close(each(quantizer, v) * math.sqrt(9 * 3), expected, rtol=1e-5, atol=1e-5)


def test_lsq_plus_by_hand() -> None:
    """The vector of LSQ+ with 2 bits: offset -0.2, scale 0.5."""
    quantizer = made(quantizers.lsq_plus(2), 0.5)
    quantizer.offset.data.fill_(-0.2)  # type: ignore[union-attr]
    x = torch.tensor([-1.0, -0.3, -0.1, 0.2, 0.9, 1.2, 1.5])
    y, dx, _ = results(quantizer, x, torch.ones(7))
    torch.testing.assert_close(y, torch.tensor([-0.2, -0.2, -0.2, 0.3, 0.8, 1.3, 1.3]), rtol=1e-6, atol=1e-7)
    assert dx.tolist() == [0, 0, 1, 1, 1, 1, 0]
    factor = math.sqrt(7 * 3)
    expected = torch.tensor([0, 0, -0.2, 0.2, -0.2, 0.2, 3])
    torch.testing.assert_close(each(quantizer, x) * factor, expected, rtol=1e-5, atol=1e-6)
    assert quantizer.offset is not None and quantizer.offset.grad is not None
    assert quantizer.offset.grad.item() == pytest.approx(2 * 3 / factor)  # all at once, then one by one


def test_dorefa_activations() -> None:
    """2 bits on [0, 1]; nothing to learn, and nothing that data would set."""
    quantizer = made(quantizers.dorefa_activation(2))
    assert quantizer.initialized and not quantizer.scale.requires_grad
    x = torch.tensor([-0.5, 0.0, 0.1, 0.2, 0.6, 1.0, 1.5])
    y, dx, _ = results(quantizer, x, torch.ones(7))
    torch.testing.assert_close(y, torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 1, 1]), rtol=1e-6, atol=0)
    assert dx.tolist() == [0, 1, 1, 1, 1, 1, 0]


def lbt_in_float64(x: Tensor, bound: Tensor, bits: int, signed: bool) -> Tensor:
    """The equations of LBT's quantizers, rounded with a straight-through gradient."""
    levels = 2**bits - (2 if signed else 1)
    unit = ((x / bound.abs() + 1) / 2 if signed else x / bound).clamp(0, 1)
    rounded = unit + ((unit * levels).round() / levels - unit).detach()
    return (2 * rounded - 1) * bound if signed else rounded * bound


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("signed", (True, False))
def test_lbt_is_its_equations(bits: int, signed: bool) -> None:
    """Values, dx, and the gradient of the bound by both of its paths, against autograd in float64."""
    torch.manual_seed(bits)
    recipe = quantizers.lbt_weight(bits) if signed else quantizers.lbt_activation(bits, signed=False)
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    quantizer = made(recipe, 0.3)
    x = torch.cat([torch.randn(999) * 0.3 * top, torch.tensor([torch.nan])])
    g = torch.randn(1000)
    y, dx, dscale = results(quantizer, x, g)
    scale = torch.tensor(0.3).double().requires_grad_()  # the float32 value
    exact = x[:-1].double().requires_grad_()
    wanted = lbt_in_float64(exact, scale * top, bits, signed)
    wanted.backward(g[:-1].double())
    assert exact.grad is not None and scale.grad is not None
    torch.testing.assert_close(y[:-1].double(), wanted.detach(), rtol=1e-6, atol=1e-6 * 0.3 * top)
    torch.testing.assert_close(dx[:-1].double(), exact.grad, rtol=1e-12, atol=0)
    assert torch.equal(dx[:-1] == 0, exact.grad == 0) and dx[-1] == 0 and y[-1].isnan()
    assert dscale.item() == pytest.approx(scale.grad.item(), rel=1e-4)
    assert 0 < (exact.grad == 0).sum() < 700  # some lie outside


def test_lbt_rounds_halves_as_they_are_counted_from_the_lowest() -> None:
    """Scale 1, 3 bits: levels -3 to 3, and w + 3 = 2.5 goes to 2, where rint(-0.5) would be 0."""
    w = torch.tensor([-9.0, -2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 9.0])
    counted = made(quantizers.lbt_weight(3), 1.0)
    assert counted.codes == (0, 6)
    assert counted(w).tolist() == [-3, -3, -1, -1, 0, 1, 1, 3, 3]
    assert made(quantizers.lbt_weight(3, count_from="zero"), 1.0)(w).tolist() == [-3, -2, -2, 0, 0, 0, 2, 2, 3]
    scale, zero_point = counted.calculate_qparams()
    assert scale.item() == 1 and zero_point.tolist() == [3]
    assert latent_codes(w, counted).tolist() == [-6, 0.5, 1.5, 2.5, 3, 3.5, 4.5, 5.5, 12]


def test_counting_from_the_lowest_compiles_once() -> None:
    """One graph for all bit-widths, and the gradients of the eager one."""
    torch.compiler.reset()
    w, g = torch.randn(6, 5), torch.randn(6, 5)
    quantizer = FakeQuant(**vars(quantizers.lbt_weight(4, axis=0)))
    quantizer(w)
    graphs: list[Any] = []

    def backend(graph: Any, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(quantizer, fullgraph=True, backend=backend)
    for bits in (4, 3, 8):
        quantizer.bits = bits
        for one, other in zip(results(quantizer, w, g), results(compiled, w, g), strict=True):
            assert torch.equal(one, other)
    assert len(graphs) == 1 and "grid=symmetric from the lowest" in str(quantizer)


def test_a_scale_below_its_floor_recovers() -> None:
    """The grid stays symmetric about 0 with the floor for its scale, and the scale keeps its gradient."""
    quantizer = made(quantizers.lbt_weight(3, eps=0.5), 1.0)
    quantizer.scale.data.fill_(-2.0)
    y, _, dscale = results(quantizer, torch.tensor([-9.0, 0.0, 0.6, 9.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert y.tolist() == [-1.5, 0.0, 0.5, 1.5] and dscale.item() == 3


def test_where_the_range_begins() -> None:
    """3 standard deviations, of the whole normal distribution where x has its half; LSQ's 2 mean|x| / sqrt(qmax)."""
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) + 0.5
    std = float(x.double().std())
    for spec, expected in (
        (quantizers.lbt_weight(4), 3 * std / 7),
        (quantizers.lbt_activation(4, signed=True), 3 * std / 7),
        (quantizers.lsq(4, signed=True), 2 * float(x.double().abs().mean()) / math.sqrt(7)),
    ):
        quantizer = made(spec)
        quantizer(x)
        assert quantizer.scale.item() == pytest.approx(expected, rel=1e-6), spec.range
    quantizer = made(quantizers.lbt_activation(4))
    quantizer(x.relu())
    half = float(x.relu().double().std()) / math.sqrt(1 - 2 / math.pi)
    assert quantizer.scale.item() == pytest.approx(3 * half / 15, rel=1e-6) and quantizer.codes == (0, 15)
    quantizer = made(quantizers.lbt_activation(4))
    quantizer(x)
    assert quantizer.scale.item() == pytest.approx(3 * std / 7, rel=1e-6) and quantizer.codes == (-8, 7)


@pytest.mark.parametrize("axis", (None, 1))
def test_spread_of_several_tensors(axis: int | None) -> None:
    """That of all their finite values at once, in whatever parts and processes they come."""
    parts = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) * n + 5 for n in (4, 1, 7)]
    parts[0][0, 0] = torch.nan
    rows = torch.cat(parts).double()
    rows = rows.t() if axis == 1 else rows.reshape(1, -1)
    expected = torch.stack([3 * row[row.isfinite()].std() / 7 for row in rows])
    one, other = (ranges.estimator("std", GridSpec(axis, None, -7, 7, True), momentum=0, percentile=99) for _ in "12")
    for part in parts[:2]:
        one.observe(part)
    other.observe(parts[2])
    one.join(other)  # type: ignore[attr-defined]
    torch.testing.assert_close(one.grid()[0], expected.float(), rtol=1e-6, atol=0)
    zeros = ranges.estimator("std", GridSpec(axis, None, -7, 7, True), momentum=0, percentile=99)
    zeros.observe(torch.zeros(4, 3))
    assert (zeros.grid()[0] == 1).all()


def trained(config: QConfig, together: bool) -> nn.Module:
    """A network after three steps of training."""
    torch.manual_seed(1)
    net = prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), config)
    if together:
        fastqat.quantize_weights_together(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    return net


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "lbt": QConfig(quantizers.lbt_weight(4, axis=0), quantizers.lbt_activation(4, signed=True)),
    "lsq": QConfig(quantizers.lsq(4, axis=0), quantizers.lsq(4)),
    "pact": QConfig(quantizers.lsq(4), quantizers.pact(4, alpha=None)),
    "tracked": QConfig(quantizers.lbt_weight(4, oscillation=fastqat.Oscillation()), quantizers.dorefa_activation(4)),
    "lsq+": QConfig(None, quantizers.lsq_plus(4)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_in_a_network(name: str) -> None:
    """prepare takes them; weights together are those alone, step by step; a checkpoint restores them."""
    alone = trained(CONFIGS[name], together=False)
    state = alone.state_dict()
    assert all(t.double().isfinite().all() for t in state.values())
    if name != "lsq+":
        other = trained(CONFIGS[name], together=True).state_dict()
        assert [key for key, t in state.items() if not torch.equal(t, other[key])] == []
    begun = prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), CONFIGS[name])
    begun.load_state_dict(state)
    assert torch.equal(begun.eval()(X), alone.eval()(X))


def test_levels_of_lbt_weights() -> None:
    """At most 15 of 4 bits, 0 among them, and as many below it as above."""
    net: Any = trained(CONFIGS["lbt"], together=False)
    quantizer = net[0].weight_fake_quant
    for row, scale in zip(quantizer(torch.linspace(-9, 9, 999).expand(8, 999)), quantizer.scale, strict=True):
        assert torch.equal(torch.unique((row / scale).round()), torch.arange(-7.0, 8.0))
    assert (quantizer(torch.zeros(8, 6)) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"count_from": "lowest"}, "count_from='lowest': wanted a restricted grid"),
        ({"count_from": "lowest", "restricted": True, "range": "minmax"}, "count_from='lowest'"),
        ({"count_from": "highest"}, "count_from: wanted one of"),
        ({"fixed_range": (0.0, 1.0)}, "fixed_range: wanted range='fixed'"),
        ({"fixed_range": (0.0, 1.0), "range": "fixed", "axis": 0}, "fixed_range: wanted range='fixed' and axis=None"),
        ({"fixed_range": (1.0, 0.0), "range": "fixed"}, "fixed_range: wanted finite bounds"),
        ({"fixed_range": (0.0, math.inf), "range": "fixed"}, "fixed_range: wanted finite bounds"),
        ({"fixed_range": (-1.0, 1.0), "range": "fixed", "signed": False}, "fixed_range: wanted no negative"),
        ({"range": "std", "symmetric": False}, "range: wanted a symmetric grid with 'std'"),
    ),
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    """The error names the option."""
    with pytest.raises(ValueError, match=message):
        QSpec(**options)


def test_a_fixed_range_says_the_sign_and_the_grid() -> None:
    """[-1, 1] is signed, [0, 1] is not, and an affine grid of [-1, 3] has its zero at a quarter."""
    options: dict[str, Any] = {"bits": 3, "range": "fixed"}
    signed = FakeQuant(**options, fixed_range=(-1.0, 1.0))
    assert signed.codes == (-4, 3) and signed.scale.item() == pytest.approx(1 / 3)
    assert FakeQuant(**options, fixed_range=(0.0, 1.0)).codes == (0, 7)
    affine = FakeQuant(**options, fixed_range=(-1.0, 3.0), symmetric=False)
    assert affine.scale.item() == pytest.approx(4 / 7) and affine.zero_point is not None
    assert affine.zero_point.item() == pytest.approx(7 / 4)
    with pytest.raises(ValueError, match="scale, zero_point: wanted none beside fixed_range"):
        FakeQuant(**options, fixed_range=(0.0, 1.0), scale=torch.ones(1))
