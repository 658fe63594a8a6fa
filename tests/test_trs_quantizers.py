"""The quantizers of TRS: literals, their equations in float64, where their ranges begin, and networks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec, quantizers

pytestmark = pytest.mark.usefixtures("one_thread")


def made(spec: QSpec, scale: float | None = None) -> FakeQuant:
    """The quantizer of a recipe, with a range."""
    quantizer = FakeQuant(**vars(spec))
    if scale is not None:
        quantizer.set_grid(torch.tensor([scale]))
    return quantizer


def trs_in_float64(x: Tensor, s: Tensor, low: int, high: int, unit: int) -> Tensor:
    """clip(unit * x / s, low, high), rounded with a straight-through gradient, divided by the unit."""
    normal = (unit * x / s).clamp(low, high)
    return (normal + (normal.round() - normal).detach()) / unit


GRIDS: dict[str, tuple[Callable[[int], QSpec], Callable[[int], tuple[int, int, int]]]] = {
    "weight": (
        lambda bits: quantizers.trs_weight(bits, learn=True),
        lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1, 2 ** (b - 1)),
    ),
    "weight-restricted": (
        lambda bits: quantizers.trs_weight(bits, learn=True, restricted=True),
        lambda b: (1 - 2 ** (b - 1), 2 ** (b - 1) - 1, 2 ** (b - 1)),
    ),
    "activation": (lambda bits: quantizers.trs_activation(bits, signed=False), lambda b: (0, 2**b - 1, 2**b)),
}


@pytest.mark.parametrize("bits", (2, 3, 8))
@pytest.mark.parametrize("kind", GRIDS)
def test_the_equations(kind: str, bits: int) -> None:
    """Values, dx = g / s inside, and ds by both of its paths, against autograd of the equations in float64."""
    torch.manual_seed(bits)
    recipe, codes = GRIDS[kind]
    low, high, unit = codes(bits)
    quantizer = made(recipe(bits), 0.3)
    x, g = torch.randn(1000) * 0.3 * unit * 0.8, torch.randn(1000)
    given = x.clone().requires_grad_()
    y = quantizer(given)
    y.backward(g)
    scale = torch.tensor(0.3).double().requires_grad_()  # the float32 value
    exact = x.double().requires_grad_()
    wanted = trs_in_float64(exact, scale * unit, low, high, unit)
    wanted.backward(g.double())
    assert exact.grad is not None and scale.grad is not None and given.grad is not None
    torch.testing.assert_close(y.detach().double(), wanted.detach(), rtol=2e-7, atol=0)
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-6, atol=0)
    assert torch.equal(given.grad == 0, exact.grad == 0) and 50 < (exact.grad == 0).sum() < 700
    # Two sums of this size nearly cancel: what is left is off by the last places of either.
    terms = (g.double() / (0.3 * unit) * wanted.detach() * unit).abs().sum().item()
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(scale.grad.item(), rel=1e-5, abs=2e-6 * terms)


def test_weights_by_hand() -> None:
    """2 bits, s = 1: levels -1, -1/2, 0, 1/2; halves go to even codes; inside is what lies from -1 to 1/2."""
    quantizer = made(quantizers.trs_weight(2), 0.5)
    w = torch.tensor([-9.0, -1.0, -0.8, -0.75, -0.3, -0.25, 0.0, 0.2, 0.25, 0.4, 0.5, 0.51, 2.0], requires_grad=True)
    y = quantizer(w)
    assert y.tolist() == [-1, -1, -1, -1, -0.5, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]
    y.backward(torch.full_like(w, 3.0))
    assert w.grad is not None and w.grad.tolist() == [0] + [3] * 10 + [0, 0]
    half = made(quantizers.trs_weight(2), 0.25)  # s = 1/2: dw = g / s
    w.grad = None
    half(w).sum().backward()
    assert w.grad.tolist() == [0, 0, 0, 0, 2, 2, 2, 2, 2, 0, 0, 0, 0]


def test_activations_by_hand() -> None:
    """2 bits, s = 2: levels 0, 1/4, 1/2, 3/4, and ds of every element alone."""
    quantizer = made(quantizers.trs_activation(2, signed=False), 0.5)
    x = torch.tensor([-1.0, 0.0, 0.2, 0.3, 0.75, 1.2, 1.5, 1.6])
    assert quantizer(x).tolist() == [0, 0, 0, 0.25, 0.5, 0.5, 0.75, 0.75]
    found = []
    for element in x:
        quantizer.scale.grad = None
        quantizer(element.view(1)).backward()
        assert quantizer.scale.grad is not None
        found.append(quantizer.scale.grad.item() / 4)
    # d/ds of clip(4 x / s, 0, 3) / 4 is -x / s^2 inside.
    assert found == pytest.approx([0, 0, -0.05, -0.075, -0.1875, -0.3, -0.375, 0], abs=1e-6)


def test_ranges_begin_at_three_standard_deviations() -> None:
    torch.manual_seed(0)
    w = torch.randn(999) * 0.1 + 0.02
    fixed, learned = made(quantizers.trs_weight(3)), made(quantizers.trs_weight(3, learn=True))
    for quantizer in (fixed, learned):
        quantizer(w)
        assert quantizer.scale.item() * 4 == pytest.approx(3 * w.double().std().item(), rel=1e-6)
    assert not fixed.scale.requires_grad and learned.scale.requires_grad
    fixed(w * 7)
    assert fixed.scale.item() * 4 == pytest.approx(3 * w.double().std().item(), rel=1e-6)  # it stays there

    x = torch.randn(999).relu()
    quantizer = made(quantizers.trs_activation(2))
    quantizer(x)
    assert quantizer.codes == (0, 3) and quantizer.scale.requires_grad
    wanted = 3 * x.double().std().item() / math.sqrt(1 - 2 / math.pi)
    assert quantizer.scale.item() * 4 == pytest.approx(wanted, rel=1e-6)
    signed = made(quantizers.trs_activation(2))
    signed(w)
    assert signed.codes == (-2, 1) and signed.scale.item() * 2 == pytest.approx(3 * w.double().std().item(), rel=1e-6)


@pytest.mark.parametrize("recipe", (quantizers.trs_weight, quantizers.trs_activation))
def test_one_bit_is_refused(recipe: Any) -> None:
    with pytest.raises(ValueError, match="bits: wanted 2 to 8: TRS has other grids for 1 bit.*; got 1"):
        recipe(1)
    with pytest.raises(ValueError, match="bits: wanted 1 to 8; got 9"):
        recipe(9)


def network(learn: bool = False, oscillation: Oscillation | None = None) -> nn.Sequential:
    """Two convolutions, each with its batch normalization."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 8):
        layers += [nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers)
    weight = quantizers.trs_weight(2, learn=learn, oscillation=oscillation)
    return fastqat.prepare(model, QConfig(weight, quantizers.trs_activation(2)))  # type: ignore[return-value]


@pytest.mark.parametrize("learn", (False, True))
def test_together_is_one_by_one(learn: bool) -> None:
    """Weights in one call give the bits of each by itself, forward and backward, tracked or not."""
    x = torch.rand(4, 3, 8, 8)
    results = []
    for together in (False, True):
        model = network(learn, Oscillation())
        model(x)
        if together:
            fastqat.quantize_weights_together(model)
        model.zero_grad()
        model(x).square().mean().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(results[0]) == len(results[1]) > 6
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_calibration_takes_weights_in_their_own_unit() -> None:
    """Statistics of BN are those of the float network: behind weights divided by s, ranges would be 1 / s of them."""
    torch.manual_seed(1)
    model, x = network(), torch.rand(16, 3, 12, 12)
    y = nn.functional.conv2d(x, model[0].weight.detach(), model[0].bias)
    floats = [x, (y / math.sqrt(1 + model[1].eps)).relu()]
    fastqat.calibrate(model.train(), [x], progress=False)
    for layer, taken in zip((model[0], model[3]), floats, strict=True):
        wanted = 3 * taken.double().std().item() / math.sqrt(1 - 2 / math.pi)
        assert layer.activation_fake_quant.scale.item() * 4 == pytest.approx(wanted, rel=1e-5)
    assert all(m.fake_quant_enabled for m in model.modules() if isinstance(m, FakeQuant))


def test_compiled_and_autocast() -> None:
    """One graph, the eager gradients; under autocast codes of the float32 weight, in bfloat16."""
    torch.compiler.reset()
    model, x = network(learn=True), torch.rand(4, 3, 8, 8)
    model(x)
    model.zero_grad()
    model(x).square().mean().backward()
    eager = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="eager")(x).square().mean().backward()
    compiled = [p.grad for p in model.parameters() if p.requires_grad]
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        weight = model[0].quantized_weight("cpu")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.float(), model[0].quantized_weight("cpu"))
