"""Quantized gradients: their grids against the equations, their time and state, both products of a backward pass."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import gradients
from fastqat.nn import GradientFakeQuant, GradientQSpec
from fastqat.nn.gradient import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


def options(method: str, **others: Any) -> dict[str, Any]:
    return {"method": method, **({"gamma": 0.7} if method == "fixed" else {}), **others}


def quantizer(**others: Any) -> tuple[GradientFakeQuant, torch.optim.Optimizer]:
    """A quantizer in training, and the optimizer whose steps are its time."""
    made, weight = GradientFakeQuant(GradientQSpec(**others)), nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    made.follows(weight)
    made.weight = weight  # kept alive
    return made, torch.optim.SGD([weight], lr=0.0)


def prepared(model: nn.Module, **others: Any) -> nn.Module:
    config = fastqat.QConfig(weight=None, activation=None, gradient=GradientQSpec(**others))
    return fastqat.prepare(model, config)


def expected(g: Tensor, gamma: float, bits: int, seed: int, tensor_id: int, step: int) -> tuple[Tensor, Tensor]:
    """Noise, clip and round on the symmetric grid: g_hat in float64, and the scale."""
    qmax = 2 ** (bits - 1) - 1
    scale = (torch.tensor(gamma, dtype=torch.float32) * g.abs().amax()) / qmax
    u = fastqat.functional.philox_uniform(g.shape, seed=seed, tensor_id=tensor_id, step=torch.tensor([step]))
    code = ((g / scale) + u).floor().clamp(-qmax, qmax)
    return code.double() * scale.double(), scale


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_both_products_take_the_same_quantized_gradient(kind: str) -> None:
    """dW, dx and db of a layer come from one g_hat; the gradient that came in stays as it was."""
    torch.manual_seed(0)
    layer: Any = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 1)
    model: Any = prepared(nn.Sequential(layer), method="fixed", gamma=0.7, seed=3)
    x = torch.randn((40, 6) if kind == "linear" else (10, 6, 2, 2), requires_grad=True)
    model[0].gradient_fake_quant.tensor_id = 5
    for _ in range(2):
        fastqat.step(model)
    y = model(x)
    y.retain_grad()
    came = torch.randn(y.shape) ** 3
    y.backward(came.clone())
    g_hat = expected(came, 0.7, 4, 3, 5, 2)[0]
    assert torch.equal(y.grad, came)
    rows = (lambda t: t) if kind == "linear" else (lambda t: t.movedim(1, -1).reshape(-1, t.shape[1]))
    g_rows, x_rows, weight = rows(g_hat), rows(x.detach().double()), layer.weight.detach().double().view(5, 6)
    for found, wanted in (
        (layer.weight.grad.view(5, 6), g_rows.T @ x_rows),
        (layer.bias.grad, g_rows.sum(0)),
        (rows(x.grad), g_rows @ weight),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    plain = came.double()
    assert not torch.allclose(layer.bias.grad.double(), rows(plain).sum(0), rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["lbt", "minmax", "fixed", "dsgc"])
def test_levels(method: str, bits: int) -> None:
    """At most 2^b - 1 levels within [-c, c], 0 stays 0 without noise, and g itself is left alone."""
    torch.manual_seed(1)
    g = torch.randn(3000) ** 3
    g[:100] = 0.0
    before = g.clone()
    for rounding in ("stochastic", "nearest"):
        made, _ = quantizer(**options(method, bits=bits, rounding=rounding))
        y = made.quantize(g)
        assert torch.equal(g, before)
        assert y.unique().numel() <= 2**bits - 1
        assert float(y.abs().amax()) <= float(made.limit) * (1 + 1e-6)
        assert float(made.limit) == pytest.approx(float(made.gamma * g.abs().amax()), rel=1e-6)
        if rounding == "nearest":
            assert not y[:100].any()


def test_gamma_of_one_is_minmax() -> None:
    torch.manual_seed(2)
    g = torch.randn(500)
    found = [quantizer(**each)[0].quantize(g) for each in ({"method": "minmax"}, {"method": "fixed", "gamma": 1.0})]
    wanted = expected(g, 1.0, 4, 0, 0, 0)[0].float()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], wanted)


def test_stochastic_rounding_is_unbiased_inside() -> None:
    torch.manual_seed(3)
    g, count = torch.randn(200), 400
    total = torch.zeros(200, dtype=torch.float64)
    for seed in range(count):
        made, _ = quantizer(method="fixed", gamma=0.8, seed=seed)
        total += made.quantize(g).double()
    inside = g.abs() <= made.limit
    bound = 4 * float(made.scale) / (2 * math.sqrt(count))
    assert float((total / count - g)[inside].abs().max()) <= bound
    assert float((total / count - g)[~inside].abs().min()) > bound / 10  # saturated


def test_noise_is_that_of_the_step() -> None:
    torch.manual_seed(11)
    g = torch.randn(200)
    made, optimizer = quantizer(method="minmax")
    first = made.quantize(g)
    assert torch.equal(made.quantize(g), first)
    optimizer.step()
    second = made.quantize(g)
    assert not torch.equal(second, first)
    assert torch.equal(second, expected(g, 1.0, 4, 0, 0, 1)[0].float())


@pytest.mark.parametrize("method", ["fixed", "running_minmax"])
def test_what_is_watched(method: str) -> None:
    """Share beyond the grid, error of the top 2 %, largest magnitude; only while it is asked for."""
    torch.manual_seed(12)
    g = torch.randn(500) ** 3
    made, optimizer = quantizer(**options(method, alpha=0.02))
    made.quantize(torch.randn(500))
    assert made.watched is None
    optimizer.step()
    made.watch()
    y = made.quantize(g).double()
    assert made.watched is not None
    beyond, error, largest = made.watched.tolist()
    if method == "fixed":
        low, high = -0.7 * g.abs().amax(), 0.7 * g.abs().amax()
    else:
        low, high = made.get_buffer("range_low"), made.get_buffer("range_high")
    assert beyond == pytest.approx(float(((g < low) | (g > high)).double().mean())) and beyond > 0
    top = g.abs().argsort(descending=True)[:10]
    wanted = float((g.double() - y).abs()[top].mean() / g.abs().amax())
    assert error == pytest.approx(wanted, rel=1e-5) and largest == float(g.abs().amax())
    made.watch(False)
    assert made.watched is None


@pytest.mark.parametrize("alpha", [1e-3, 0.2])
def test_first_gamma_is_the_quantile(alpha: float) -> None:
    torch.manual_seed(4)
    g = torch.distributions.Laplace(0.0, 2.0).sample((30_000,))
    made, _ = quantizer(alpha=alpha)
    made.quantize(g)
    assert int(made.beyond) == int((g.abs() > made.limit).sum())
    assert abs(int(made.beyond) - int(30_000 * alpha / 15)) <= 1
    assert int(made.seen) == 30_000


def test_gamma_moves_by_one_stride_per_step() -> None:
    """By the counts of the step before, of all its backward passes, and by 0 or +-1e-3 exactly."""
    torch.manual_seed(5)
    made, optimizer = quantizer(gamma=0.5, alpha=0.05)
    gamma, directions = made.gamma.clone(), set()
    for step in range(60):
        width = 1.0 + 0.02 * step
        beyond = seen = 0
        for _ in range(2):  # micro-batches
            g = torch.randn(1000) ** (1 if step % 3 else 9) * width
            made.quantize(g)
            assert torch.equal(made.gamma, gamma)
            beyond, seen = beyond + int((g.abs() > gamma * g.abs().amax()).sum()), seen + 1000
            assert (int(made.beyond), int(made.seen)) == (beyond, seen)
        optimizer.step()
        direction = (beyond * 15 > 0.05 * seen) - (beyond * 15 < 0.05 * seen)
        directions.add(direction)
        gamma = (gamma + torch.tensor(1e-3) * direction).clamp(1e-3, 1.0)
    assert {-1, 1} <= directions


@pytest.mark.parametrize("name", ["laplace", "gauss"])
def test_gamma_comes_to_rest_at_the_quantile(name: str) -> None:
    """On a stream: a fraction alpha / (2^b - 1) lies beyond. On one tensor: a two-cycle of +-1e-3 around it."""
    torch.manual_seed(6)
    stream = torch.distributions.Laplace(0.0, 1.0) if name == "laplace" else torch.distributions.Normal(0.0, 1.0)
    alpha, n = 0.02, 10_000
    inside = torch.tensor(1 - alpha / 15, dtype=torch.float64)
    quantile = -math.log(1 - inside) if name == "laplace" else math.sqrt(2) * float(torch.erfinv(inside))
    made, optimizer = quantizer(gamma=0.5, alpha=alpha, gamma_step=5e-3, rounding="nearest")
    rest, gammas = [], []
    for step in range(260):
        g = stream.sample((n,))
        made.quantize(g)
        if step >= 130:
            rest.append(quantile / float(g.abs().amax()))
            gammas.append(float(made.gamma))
        optimizer.step()
    assert sum(gammas) / len(gammas) == pytest.approx(sum(rest) / len(rest), abs=0.02)

    made, optimizer = quantizer(alpha=alpha, rounding="nearest")
    seen = []
    for _ in range(40):
        made.quantize(g)
        seen.append(float(made.gamma))
        optimizer.step()
    of_tensor = float(g.abs().quantile(1 - alpha / 15)) / float(g.abs().amax())
    assert len({round(each, 5) for each in seen[20:]}) == 2
    assert max(seen[20:]) - min(seen[20:]) == pytest.approx(1e-3, abs=1e-6)
    assert abs(seen[-1] - of_tensor) < 2e-3


def test_values_that_say_nothing() -> None:
    """Zeros, and gradients without a finite value, leave gamma and its counts; NaN stays NaN, Inf saturates."""
    made, optimizer = quantizer(alpha=0.1)
    zeros = torch.zeros(64)
    assert torch.equal(made.quantize(zeros), zeros) and not made.initialized
    torch.manual_seed(7)
    g = torch.randn(2000)
    made.quantize(g)
    optimizer.step()
    made.quantize(g)
    gamma = made.gamma.clone()
    for bad in (zeros, torch.full((64,), torch.nan), torch.full((64,), torch.inf)):
        for _ in range(2):
            optimizer.step()
            made.quantize(bad)
        assert int(made.seen) == 0
    assert float((made.gamma - gamma).abs()) <= 1.1e-3  # by the step before them
    some = g.clone()
    some[:2] = torch.tensor([torch.nan, -torch.inf])
    y = made.quantize(some)
    assert y[0].isnan() and float(y[1]) == -float(made.limit) and y[2:].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_loss_scaling(method: str) -> None:
    """A scaled loss scales the quantized gradient and moves nothing else; what overflows stays to be seen."""
    torch.manual_seed(8)
    g, found = torch.randn(3, 1000), []
    for factor in (1.0, 1024.0, 2.0**-90):
        made, optimizer = quantizer(**options(method, alpha=0.1))
        ys = []
        for each in g:
            ys.append(made.quantize(each * factor) / factor)
            optimizer.step()
        found.append((made.get_buffer("gamma") if made.symmetric else torch.zeros(1), torch.stack(ys)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    for bad in (torch.inf, -torch.inf, torch.nan):
        half = g[0].half()
        half[5] = bad
        assert made.quantize(half).isnan().all()
    assert made.quantize(g[0].half()).isfinite().all() and made.quantize(g[0].half()).dtype == torch.float16


def test_in_hindsight_takes_the_ranges_of_the_steps_before() -> None:
    """Literals, and the identity: in hindsight at t is the running range at t - 1, to the bit."""
    hindsight, first = quantizer(method="in_hindsight", bits=8)
    running, second = quantizer(method="running_minmax", bits=8)
    wanted, before = [(-1.0, 2.0), (-1.0, 2.0), (-1.1, 1.9), (-1.04, 2.01), (-1.336, 1.859)], None
    # the last gradient is one that only asks for the range
    for (low, high), bounds in zip([(-1, 2), (-2, 1), (-0.5, 3), (-4, 0.5), (-1, 1)], wanted, strict=True):
        g = torch.cat([torch.linspace(low, high, 33)])
        y = hindsight.quantize(g)
        used = torch.cat([hindsight.get_buffer("range_low"), hindsight.get_buffer("range_high")])
        torch.testing.assert_close(used, torch.tensor(bounds), rtol=1e-6, atol=1e-6)
        assert before is None or torch.equal(used, before)
        scale = (bounds[1] - bounds[0]) / 255
        assert float(y.amax()) <= bounds[1] + 0.6 * scale and float(y.amin()) >= bounds[0] - 0.6 * scale
        running.quantize(g)
        before = torch.cat([running.get_buffer("range_low"), running.get_buffer("range_high")])
        first.step()
        second.step()
    constant, optimizer = quantizer(method="running_minmax", momentum=0.0)
    for scale in (1.0, 5.0, 2.0):  # with momentum 0 the range is that of the gradient itself, within a step too
        constant.quantize(torch.tensor([-scale, scale]))
        assert float(constant.get_buffer("range_high")) == scale
    optimizer.step()


def test_clip_that_keeps_the_direction() -> None:
    """DSGC's gamma among all candidates, by brute force in float64; found anew after so many steps."""
    torch.manual_seed(9)
    g = torch.distributions.StudentT(2.0).sample((2000,))
    made, optimizer = quantizer(method="dsgc", candidates=20, period=3, rounding="nearest")
    cosines = []
    for k in range(1, 21):
        s = k / 20 * g.double().abs().amax() / 7
        q = (g.double() / s).round().clamp(-7, 7) * s
        cosines.append(float(torch.nn.functional.cosine_similarity(g.double(), q, dim=0)))
    best = (1 + max(range(20), key=cosines.__getitem__)) / 20
    made.quantize(g)
    assert float(made.gamma) == pytest.approx(best)
    other = torch.randn(2000)
    for searched in (False, False, True):
        optimizer.step()
        made.quantize(other)
        assert (float(made.gamma) != pytest.approx(best)) == searched


def test_error_of_large_gradients() -> None:
    g = torch.tensor([0.1, -4.0, 0.2, 3.0, -0.3, 0.0, 1.0, 0.5, 0.25, 2.0])
    q = torch.tensor([0.0, -3.5, 0.0, 3.5, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0])
    assert float(gradients.large_error(g, q, 0.1)) == 0.5 / 4
    assert float(gradients.large_error(g, q, 0.3)) == pytest.approx((0.5 + 0.5 + 0.0) / 3 / 4)
    assert float(gradients.large_error(g, q, 1e-6)) == 0.5 / 4  # at least one


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 4))


def train(model: nn.Module, batches: range, run: Any = None, pieces: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in batches:
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        for piece in x.chunk(pieces):
            (run or model)(piece).square().mean().backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_resumed_to_the_bit(method: str) -> None:
    whole, half, resumed = (prepared(network(), **options(method, period=2, seed=None)) for _ in range(3))
    for each in resumed.modules():
        if isinstance(each, GradientFakeQuant):
            each.seed += 1  # as another process draws another one
            each.get_buffer("drawn_seed").add_(1)
    train(whole, range(6))
    train(half, range(3))
    state = copy.deepcopy(half.state_dict())
    resumed.load_state_dict(state)
    train(resumed, range(3, 6))
    assert same(whole, resumed)
    assert not same(whole, half)


@pytest.mark.parametrize("method", ["lbt", "in_hindsight"])
def test_compiled(method: str) -> None:
    """Forward and backward in one graph each, once, with the bits of eager training."""
    eager, model = (prepared(network()[:2], method=method) for _ in range(2))
    train(eager, range(4))
    with pytest.raises(Exception, match="layer '0'.*eagerly"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(8, 3, 8, 8))
    torch._dynamo.reset()
    train(model, range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, range(1, 4), torch.compile(model, backend="aot_eager", fullgraph=True))
    assert same(eager, model)


def test_checkpointing_and_micro_batches() -> None:
    plain, recomputed, pieces = (prepared(network(), alpha=0.1) for _ in range(3))
    for model in (plain, recomputed, pieces):
        train(model, range(1))
    train(plain, range(1, 4))
    train(recomputed, range(1, 4), lambda x: checkpoint(recomputed, x, use_reentrant=False, preserve_rng_state=False))
    weights = [dict(model.named_parameters()) for model in (plain, recomputed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    gammas = [{n: b for n, b in model.named_buffers() if "gradient_fake_quant" in n} for model in (plain, recomputed)]
    assert all(torch.equal(gammas[0][name], gammas[1][name]) for name in gammas[0])
    layer: Any = pieces[0]
    before = layer.gradient_fake_quant.gamma.clone()
    train(pieces, range(1, 2), pieces=4)
    assert float((layer.gradient_fake_quant.gamma - before).abs()) <= 1.1e-3
    assert int(layer.gradient_fake_quant.seen) == 8 * 6 * 36  # of all pieces


def test_switched_off_or_in_evaluation_nothing_happens() -> None:
    model, plain = prepared(network(), bits=2), network()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    with fastqat.fake_quant_enabled(model, False):
        model(x).square().sum().backward()
    plain(x).square().sum().backward()
    own = dict(model.named_parameters())
    assert all(torch.equal(p.grad, own[name].grad) for name, p in plain.named_parameters())
    for each in (model, plain):
        each.zero_grad()
        each.eval()(x).square().sum().backward()
    assert all(torch.equal(p.grad, own[name].grad) for name, p in plain.named_parameters())
    assert before.keys() == model.state_dict().keys()
    model.train()
    model(x).square().sum().backward()
    assert not torch.equal(plain[0].weight.grad, model[0].weight.grad)


def test_second_derivative_goes_straight_through() -> None:
    """Through the quantization of the first gradient; on its way it is a gradient of the layer's output itself."""
    model: Any = prepared(nn.Sequential(nn.Linear(3, 3, bias=False)), method="minmax", rounding="nearest")
    x = torch.randn(5, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    weight = model[0].weight.detach().double()
    g = 2 * weight.sum(1)
    g_hat = (g / (g.abs().amax() / 7)).round() * g.abs().amax() / 7
    torch.testing.assert_close(ddx.double(), (g_hat @ weight).expand(5, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model: Any = prepared(network(), method="minmax")
    with torch.autocast("cpu", dtype):
        y = model(torch.randn(4, 3, 8, 8))
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model[0].gradient_fake_quant.scale.dtype == torch.float32


def test_layers_of_prepare() -> None:
    """Every kind of layer with two products has one, an embedding none; numbers of noise differ."""
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "linear": nn.Linear(8, 8),
            "convolution": nn.ConvTranspose1d(8, 4, 2),
        }
    )
    config = fastqat.QConfig(gradient=GradientQSpec())
    fastqat.prepare(model, config, overrides={"linear": {"bits": 6}})
    rows = {(row.layer, row.tensor): row.bits for row in fastqat.report(model).quantizers if row.tensor == "gradient"}
    layers = ("attention", "attention.out_proj", "linear", "convolution")
    assert rows == {(name, "gradient"): 6 if name == "linear" else 4 for name in layers}
    numbers = [m.tensor_id for m in model.modules() if hasattr(m, "tensor_id")]
    assert len(set(numbers)) == len(numbers)
    q, _ = model["attention"](*[torch.randn(3, 2, 8)] * 3)
    q.square().sum().backward()
    assert all(m.initialized for n, m in model.named_modules() if n.startswith("attention") and n.endswith("gradient"))
    fastqat.remove(model)
    assert not any(isinstance(m, GradientFakeQuant) for m in model.modules())


def test_a_layer_without_gradient_is_named() -> None:
    model: Any = prepared(network())
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="layer '0'.*needs a gradient"):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 8, 8))  # once
    assert not model[0].gradient_fake_quant.initialized and model[2].gradient_fake_quant.initialized


def test_noise_without_a_seed() -> None:
    model: Any = prepared(network(), seed=None)
    assert model[0].gradient_fake_quant.seed != model[2].gradient_fake_quant.seed
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="layer '0': seed: wanted a number"):
            model(torch.randn(2, 3, 8, 8))
        with pytest.raises(ValueError, match="seed: wanted a number"):
            GradientQSpec(seed=None)
        GradientQSpec(seed=None, rounding="nearest")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"method": "lpt"}, "method"),
        ({"method": "fixed"}, "gamma: wanted a number"),
        ({"method": "minmax", "gamma": 0.5}, "gamma: wanted none"),
        ({"gamma": 1.5}, "gamma: wanted a number in"),
        ({"alpha": 0.0}, "alpha"),
        ({"gamma_step": -1.0}, "gamma_step"),
        ({"momentum": 1.0}, "momentum"),
        ({"period": 0}, "period"),
        ({"rounding": "up"}, "rounding"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientQSpec(**wrong)


def test_wrong_types_and_states() -> None:
    for wrong in ({"alpha": "a"}, {"seed": 0.5}, {"period": True}):
        with pytest.raises(TypeError):
            GradientQSpec(**wrong)
    with pytest.raises(TypeError, match="gradient: wanted a GradientQSpec"):
        fastqat.QConfig(gradient=fastqat.QSpec())
    lbt = prepared(network(), alpha=0.5)
    train(lbt, range(1))
    with pytest.raises(RuntimeError, match="gamma: wanted 1.0 of method='minmax'"):
        prepared(network(), method="minmax").load_state_dict(lbt.state_dict())
