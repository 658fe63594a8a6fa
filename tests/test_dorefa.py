"""Weights of DoReFa and SAT as quantizers of layers: literals, gradients in float64, and where else they turn up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, oscillation, prepare, quantizers
from fastqat.dorefa import dorefa_fake_quantize
from fastqat.quantizers import cg_pact, dorefa_weight

pytestmark = pytest.mark.usefixtures("one_thread")

W = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.2, 0.7, 1.5]).view(7, 1)
LITERALS = {
    2: [-1, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1 / 3, 1],
    3: [-1, -0.428571, -0.142857, 0.142857, 0.142857, 0.714286, 1],
    4: [-1, -0.466667, -0.066667, 0.066667, 0.2, 0.6, 1],
}
RESCALES = (None, "constant", "std")


def linear(w: Tensor, bits: int, rescale: str | None = None) -> Any:
    """A layer with this weight, whose output for the identity is the quantized weight, transposed."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = nn.Parameter(w.clone())
    return prepare(layer, QConfig(dorefa_weight(bits, rescale=rescale), None))


def values(layer: Any) -> Tensor:
    """The weight that a layer computes with."""
    return layer(torch.eye(layer.in_features, dtype=layer.weight.dtype)).T


def network(rescale: str | None = None) -> nn.Sequential:
    """Two layers of either kind, prepared."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return prepare(net, QConfig(dorefa_weight(3, rescale=rescale), cg_pact(4)))  # type: ignore[return-value]


X = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def in_float64(w: Tensor, bits: int, rescale: str | None) -> Tensor:
    """The equations: rounded with a straight-through gradient, with autograd through tanh and the maximum."""
    n = 2**bits - 1
    t = w.tanh()
    unit = t / (2 * t.abs().amax()) + 0.5
    q = 2 * (unit + ((unit * n).round() / n - unit).detach()) - 1
    if rescale is None:
        return q
    kernel = w[0, 0].numel()
    wanted = w.std() if rescale == "std" else (w.shape[0] * kernel) ** -0.5
    return q * (wanted / q.std()).detach()


@pytest.mark.parametrize("bits", LITERALS)
def test_literals(bits: int) -> None:
    """There is no level at 0; 0 lies between two, and goes to the even of the codes, which is the upper one."""
    torch.testing.assert_close(values(linear(W, bits))[:, 0], torch.tensor(LITERALS[bits]), rtol=0, atol=1e-6)
    found = linear(W, bits).weight_fake_quant
    assert found.codes == (0, 2**bits - 1) and not found.scale.requires_grad and found.initialized
    assert values(linear(W, 8)).abs().min().item() == pytest.approx(1 / 255)


def test_rescaled_literals() -> None:
    """The vector of SAT has n_out = 16; that of this layer is 7, or that of a convolution 7 x 2 x 1."""
    wanted = torch.tensor([-0.384261, -0.128087, -0.128087, 0.128087, 0.128087, 0.128087, 0.384261])
    torch.testing.assert_close(values(linear(W, 2, "constant"))[:, 0], wanted * 4 / 7**0.5, rtol=0, atol=2e-6)
    conv = nn.Conv2d(1, 7, (2, 1), bias=False)
    conv.weight = nn.Parameter(W.repeat(1, 2).view(7, 1, 2, 1))
    prepare(conv, QConfig(dorefa_weight(2, rescale="constant"), None))
    found = conv(torch.eye(2).view(2, 1, 2, 1)).view(2, 7)
    assert torch.equal(found[0], found[1]) and found.std().item() == pytest.approx(14**-0.5, rel=1e-6)
    assert values(linear(W, 3, "std")).std().item() == pytest.approx(W.std().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("bits", (2, 3, 8))
def test_values_and_gradients(bits: int, rescale: str | None, dtype: torch.dtype) -> None:
    """Of a convolution, against autograd in float64 of the equations; a maximum that several weights have too."""
    torch.manual_seed(bits)
    w = torch.randn(4, 3, 2, 2)
    w[0, 0, 0, 0], w[3, 2, 1, 1] = 3.0, -3.0
    w, g = w.to(dtype), torch.randn(4, 3, 2, 2).to(dtype)
    quantizer = FakeQuant(**vars(dorefa_weight(bits, rescale=rescale)))
    weight, exact = nn.Parameter(w.clone()), w.double().requires_grad_()
    y, wanted = quantizer(weight), in_float64(exact, bits, rescale)
    y.backward(g)
    wanted.backward(g.double())
    assert weight.grad is not None and exact.grad is not None and y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted.detach(), rtol=max(eps, 1e-6), atol=1e-7)
    atol = 1e-6 * float(exact.grad.abs().max())
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=max(eps, 2e-5), atol=atol)


def test_the_factor_has_no_gradient_and_is_rounded_once() -> None:
    """The gradient is the factor times that without it; a narrower result is the float32 one, rounded."""
    w, g = torch.randn(6, 5), torch.randn(6, 5)
    n, grads, ys = torch.tensor([7], dtype=torch.int32), [], []
    for rescale in (None, "std"):
        weight = w.clone().requires_grad_()
        ys.append(dorefa_fake_quantize(weight, n, rescale))
        grads.append(torch.autograd.grad(ys[-1], weight, g)[0])
        low = dorefa_fake_quantize(w, n, rescale, torch.bfloat16)
        assert torch.equal(low, ys[-1].detach().bfloat16())
    factor = (ys[1] / ys[0]).detach()
    torch.testing.assert_close(factor, factor[:1, :1].expand(6, 5), rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[1], grads[0] * factor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rescale", RESCALES)
def test_a_weight_of_zeros(rescale: str | None) -> None:
    """All on the upper of the two middle levels, with no gradient and no NaN; nothing to rescale."""
    layer = linear(torch.zeros(3, 2), 3, rescale)
    y = values(layer)
    y.sum().backward()
    assert y.unique().tolist() == [pytest.approx(1 / 7)] and not layer.weight.grad.any()


def test_autocast() -> None:
    """The weight of a layer is in the dtype of autocast from one pass over the float32 one."""
    layer = linear(torch.randn(4, 3), 3, "constant")
    exact = values(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.quantized_weight("cpu")
        values(layer).sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, exact.bfloat16())
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()


def test_compiled_once_for_all_bit_widths() -> None:
    """One graph; values and gradients of eager."""
    torch._dynamo.reset()
    counter, found = CompileCounterWithBackend("aot_eager"), []
    for compiled in (False, True):
        net = network("constant")
        net(X)
        call = torch.compile(net, fullgraph=True, backend=counter) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        ys = []
        for bits in (3, 2, 8, 4, 3):
            fastqat.set_bit_widths(net, {"*": (bits, bits)})
            y = call(X)
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ys.append(y.detach())
        found.append([*ys, *net.state_dict().values()])
    assert counter.frame_count == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing(use_reentrant: bool) -> None:
    grads = []
    for recompute in (False, True):
        net = network("std")
        x = X.clone().requires_grad_()
        y: Any = checkpoint(net, x, use_reentrant=use_reentrant) if recompute else net(x)
        y.square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_function_transforms() -> None:
    """functional_call with other weights; transforms are refused, and so is a second derivative."""
    net = network("constant")
    other = {name: p.detach().flip(0) for name, p in net.named_parameters() if name.endswith("weight")}
    twin = copy.deepcopy(net)
    for name, weight in other.items():
        twin.get_parameter(name).data.copy_(weight)
    y = functional_call(net, other, (X,))
    assert torch.equal(y, twin(X)) and not torch.equal(y, net(X))
    with pytest.raises(NotImplementedError, match="DoReFa: wanted no torch.func transform, but functional_call alone"):
        grad(lambda weights: functional_call(net, weights, (X,)).sum())(other)
    weight = torch.randn(3, 2, requires_grad=True)
    (dw,) = torch.autograd.grad(
        dorefa_fake_quantize(weight, torch.tensor([3], dtype=torch.int32)).square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dw.sum().backward()


def test_copies_and_state_dicts() -> None:
    """A copy computes the same; so does a model that was prepared at other bits, once it is loaded."""
    net = network("constant")
    fastqat.set_bit_widths(net, {"0": (5, 6), "3": (2, 8)})
    y = net(X)
    assert torch.equal(copy.deepcopy(net)(X), y)
    fresh = network("constant")
    with pytest.warns(UserWarning, match="the checkpoint has 5 bits, and the model had"):
        fresh.load_state_dict(net.state_dict())
    assert fastqat.bit_widths(fresh) == {"0": (5, 6), "3": (2, 8)} and torch.equal(fresh(X), y)


def test_the_bit_width_is_that_of_the_grid() -> None:
    """Setting it goes with the scale, which is that of the levels; a loaded one of 1 bit is refused."""
    quantizer = FakeQuant(**vars(dorefa_weight(4)))
    quantizer.bits = 2
    assert quantizer.codes == (0, 3) and quantizer.scale.item() == pytest.approx(2 / 3)
    assert quantizer.zero_point is not None and quantizer.zero_point.item() == pytest.approx(1.5)
    for change in (quantizer.change_bits, lambda bits: setattr(quantizer, "bits", bits)):
        with pytest.raises(ValueError, match="bits: wanted 2 to 8; got 1"):
            change(1)
    state = {**quantizer.state_dict(), "qrange": torch.tensor([0, 1], dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="qrange: wanted at least 2 bits"):
        FakeQuant(**vars(dorefa_weight(4))).load_state_dict(state)


def test_weights_together_leave_it_to_its_layer() -> None:
    """Beside a weight that is quantized with others; the results are those without."""
    ys = []
    for together in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        prepare(net, QConfig(QSpec(4, 0), None), overrides={"1": QConfig(dorefa_weight(3, rescale="std"), None)})
        if together:
            fastqat.quantize_weights_together(net)
        ys.append(net(torch.ones(2, 4)))
        ys[-1].sum().backward()
        assert all(layer.weight.grad.any() for layer in net)
    assert torch.equal(*ys)


def test_parametrization_and_export() -> None:
    """As a parametrization of a weight; an exported network computes the same."""
    layer = linear(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), 3, "constant")
    other = nn.Linear(3, 4, bias=False)
    other.weight = nn.Parameter(layer.weight.detach().clone())
    quantizer = FakeQuant(**vars(dorefa_weight(3, rescale="constant")))
    nn.utils.parametrize.register_parametrization(other, "weight", quantizer)
    x = torch.ones(2, 3)
    assert torch.equal(other(x), layer(x))
    exported = torch.export.export(layer.eval(), (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_what_says_what_it_is() -> None:
    net = network("constant")
    assert "FakeQuant(bits=3, codes=0..7, grid=SAT, constant)" in str(net)
    assert "grid=DoReFa)" in str(FakeQuant(**vars(dorefa_weight(3))))
    rows = [row for row in fastqat.report(net, X).quantizers if row.tensor == "weight"]
    assert [(row.grid, row.range, row.runs) for row in rows] == [("SAT, constant", "max|tanh|", 1)] * 2
    assert "0..7 SAT, constant" in str(fastqat.report(net)) and "affine" not in str(fastqat.report(net))
    assert [row.bits_weight for row in fastqat.cost(net, X[:1]).layers] == [3, 3]


def test_latent_codes_and_summaries() -> None:
    """Where the normalized weight lies among the codes: rint of it is the code; nothing is tracked."""
    net = network()
    weight = oscillation.quantized_weights(net)[0]
    latent = oscillation.latent_codes(weight.latent(), weight.quantizer)
    wanted = (weight.quantizer(weight.latent()) * 7 + 7) / 2
    assert (latent - wanted).abs().max() <= 0.5 + 1e-5 and latent.abs().max() == 7
    assert set(oscillation.oscillation_summary(net)["untracked"]) == {"0", "3"}


def test_removal_writes_its_values() -> None:
    """Each weight once, also where two layers share one: what is quantized already would be quantized otherwise."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[0].weight = net[2].weight = nn.Parameter(torch.linspace(-2, 2, 16).view(4, 4))
    prepare(net, QConfig(dorefa_weight(4), None))
    quantizer: Any = net[0].weight_fake_quant
    once = quantizer(net[0].weight).detach()
    assert not torch.equal(quantizer(once), once)
    fastqat.remove(net, keep="quantized")
    assert type(net[0]) is nn.Linear and torch.equal(net[0].weight, once) and net[2].weight is net[0].weight


def test_what_it_cannot_be() -> None:
    """Each is refused by name, and says what is wanted."""
    fixed = r"normalize='tanh': wanted fixed_range=\(-1, 1\), nothing learned, .*; got "
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits: wanted . to 8; got {bits}"):
            dorefa_weight(bits)
    options: tuple[dict[str, Any], ...] = (
        {"learn": "scale"},
        {"estimator": "ewgs"},
        {"oscillation": fastqat.Oscillation()},
        {"dampening": fastqat.Dampening()},
        {"fixed_range": (-2.0, 2.0)},
    )
    for each in options:
        with pytest.raises(ValueError, match=f"{fixed}.*{next(iter(each))}="):
            dorefa_weight(3, **each)
    for changes in ({"symmetric": True}, {"signed": True}):
        with pytest.raises(ValueError, match="normalize='tanh': wanted codes that count from 0: .*; got symmetric="):
            dorefa_weight(3, **changes)
    with pytest.raises(ValueError, match="fixed_range: wanted range='fixed' and axis=None"):
        dorefa_weight(3, axis=0)
    with pytest.raises(ValueError, match="rescale: wanted one of None, 'constant', 'std'; got 'mean'"):
        dorefa_weight(3, rescale="mean")
    with pytest.raises(ValueError, match="rescale: wanted normalize='tanh' beside it; got normalize=None"):
        QSpec(3, rescale="std")
    with pytest.raises(ValueError, match="activation: wanted a QSpec without normalize='tanh', which is for weights"):
        QConfig(None, dorefa_weight(3))
    net = network()
    quantizer = net[0].weight_fake_quant
    with pytest.raises(NotImplementedError, match="calculate_qparams: wanted a grid with a level at 0 .*; got DoReFa"):
        quantizer.calculate_qparams()
    for loss in (fastqat.dampening_loss, fastqat.bin_regularization):
        with pytest.raises(ValueError, match="wanted a grid of the values of the weight themselves; got .*DoReFa"):
            loss(net)
    ewgs = prepare(nn.Linear(3, 2), QConfig(dorefa_weight(3), quantizers.lsq(4, estimator="ewgs")))
    ewgs(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"quantizers without normalize; got weight_fake_quant \(tanh\)"):
        fastqat.ewgs_delta(ewgs, [torch.ones(1, 3)], lambda model, x: model(x).sum())
