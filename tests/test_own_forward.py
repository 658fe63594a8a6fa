"""Layers with a forward of their own: the weight that reaches their product is quantized, whatever they do to it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from own_forward_layers import COMPUTED, PATTERNS, Multiplied, Pattern, Routed, SamePadding, Standardized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
CONFIG = QConfig(QSpec(3, 0, learn="scale", grad_scale=None), QSpec(6, learn="scale", grad_scale=None))


def prepared(pattern: Pattern, config: QConfig = CONFIG) -> tuple[Any, Any, Tensor]:
    """A layer in a network, prepared and calibrated; the same in float; and its input."""
    torch.manual_seed(0)
    net = nn.Sequential(pattern.build())
    x = pattern.inputs()
    plain = copy.deepcopy(net)
    fastqat.prepare(net, config)
    if net[0].activation_fake_quant is not None:
        fastqat.calibrate(net, [x])
    return net, plain[0], x


def quantized(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Signed codes by the equation, straight through where the code is not clipped, and with the gradient of LSQ."""
    shape = [-1] + [1] * (x.dim() - 1) if scale.numel() > 1 else [1]
    s, low, high = scale.view(shape), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ratio = x / s
    codes = ratio.detach().round()
    inside = (codes >= low) & (codes <= high)
    y = s * torch.where(inside, ratio + (codes - ratio).detach(), codes.clamp(low, high))
    return (s * codes.clamp(low, high)).detach() + (y - y.detach())


@every_pattern
def test_values_and_gradients(pattern: Pattern) -> None:
    """Of plain torch, with the weight that reaches the product and the input quantized by the equation."""
    net, plain, x = prepared(pattern)
    layer = net[0]
    scale = layer.weight_fake_quant.scale.detach().clone().requires_grad_()
    weight = quantized(pattern.weight(plain), scale, 3)
    mine, theirs, scale_of_x = x, x, None
    if x.is_floating_point():
        assert not torch.equal(layer.activation_fake_quant(x), x)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        scale_of_x = layer.activation_fake_quant.scale.detach().clone().requires_grad_()
        theirs = quantized(theirs, scale_of_x, 6)
    y, expected = net(mine), pattern.plain(plain, theirs, weight)
    assert torch.equal(y, expected)
    assert not torch.equal(y, pattern.plain(plain, theirs, pattern.weight(plain)))
    g = torch.randn_like(y)
    y.backward(g), expected.backward(g)
    own = {name: p.grad for name, p in layer.named_parameters(recurse=False)}
    torch.testing.assert_close(own, {name: p.grad for name, p in plain.named_parameters()}, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight_fake_quant.scale.grad, scale.grad, rtol=1e-4, atol=1e-5)
    if scale_of_x is not None:
        torch.testing.assert_close(layer.activation_fake_quant.scale.grad, scale_of_x.grad, rtol=1e-4, atol=1e-5)


@every_pattern
def test_range_is_that_of_what_is_quantized(pattern: Pattern) -> None:
    """From max|w| of the weight that reaches the product, in each of its output channels."""
    torch.manual_seed(0)
    net = nn.Sequential(pattern.build())
    weight = pattern.weight(net[0]).detach()
    fastqat.prepare(net, QConfig(QSpec(4, 0, range="minmax"), None))
    wide = torch.maximum(weight.flatten(1).amax(1) / 7, -weight.flatten(1).amin(1) / 8)
    torch.testing.assert_close(net[0].weight_fake_quant.scale.detach(), wide, rtol=0.15, atol=0)
    assert net[0].weight_form == ("computed" if isinstance(net[0], COMPUTED) else "as it is")


@every_pattern
def test_counters_of_tracking(pattern: Pattern) -> None:
    """Transitions, oscillations and frozen weights of a quantizer alone that sees what reaches the product."""
    tracked = QSpec(3, 0, oscillation=fastqat.Oscillation(momentum=0.3, freeze_threshold=0.65))
    net, plain, x = prepared(pattern, QConfig(tracked, None))
    fake_quant = net[0].weight_fake_quant
    alone = fastqat.FakeQuant(3, 0, oscillation=fastqat.Oscillation(momentum=0.3, freeze_threshold=0.65))
    alone.right_inverse(pattern.weight(plain).detach().contiguous())
    alone.set_grid(fake_quant.scale.detach().clone())
    start = plain.weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            plain.weight.copy_(start * (1 + 0.4 * (-1) ** step))  # to and fro
            plain.weight.flatten()[step] -= 0.3
            net[0].weight.copy_(plain.weight)
        for _ in range(2):  # a second forward in a step counts nothing
            y = net(x)
        with torch.no_grad():
            expected = alone(pattern.weight(plain).detach().contiguous())
            x_plain = pattern.plain(plain, x, expected)
        torch.testing.assert_close(y, x_plain)  # of other strides, and so summed in another order
        fastqat.step(net), fastqat.step(alone)
    tracker = fake_quant.tracker
    assert tracker.counts[0] > 0
    assert torch.equal(tracker.counts, alone.tracker.counts)
    assert torch.equal(tracker.frozen(), alone.tracker.frozen())
    assert torch.equal(tracker.codes(), alone.tracker.codes())
    if isinstance(net[0], (SamePadding, Multiplied)):
        assert tracker.frozen().any() and tracker.counts[1] > 0


@every_pattern
def test_off_it_is_the_float_layer(pattern: Pattern) -> None:
    """Bit for bit, and so it is after remove."""
    net, plain, x = prepared(pattern)
    with fastqat.fake_quant_enabled(net, False):
        assert torch.equal(net(x), plain(x))
    keys = list(plain.state_dict())
    assert [key.removeprefix("0.") for key in net.state_dict() if "fake_quant" not in key] == keys
    weight = net[0].weight
    fastqat.remove(net)
    assert (
        type(net[0]) is type(plain) and list(net[0].state_dict()) == keys and vars(net[0]).keys() == vars(plain).keys()
    )
    assert net[0].weight is weight and torch.equal(net(x), plain(x))


@every_pattern
def test_keeping_quantized_weights(pattern: Pattern) -> None:
    """The float layer computes what the quantized one did; refused by name where that quantized something else."""
    net, plain, x = prepared(pattern, QConfig(CONFIG.weight, None))
    y = net(x)
    if isinstance(plain, COMPUTED):
        with pytest.raises(ValueError, match=f"layer '0'.*{type(plain).__name__}, whose forward"):
            fastqat.remove(net, keep="quantized")
        assert torch.equal(net(x), y)
    else:
        fastqat.remove(net, keep="quantized")
        assert type(net[0]) is type(plain) and torch.equal(net(x), y)


@every_pattern
def test_copies_and_checkpoints(pattern: Pattern) -> None:
    """A copy, a pickle, a state_dict, activation checkpointing, and all weights together: the same bits."""
    net, plain, x = prepared(pattern)
    y = net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    other = nn.Sequential(copy.deepcopy(plain))
    fastqat.prepare(other, CONFIG)
    other.load_state_dict(net.state_dict())
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False), other):
        assert type(twin[0]) is type(net[0]) and torch.equal(twin(x), y)
    again: Any = checkpoint(net, x, use_reentrant=False)
    again.sum().backward()
    grads = [p.grad for p in net.parameters()]
    assert torch.equal(again, y)
    net.zero_grad()
    fastqat.quantize_weights_together(net)
    together = net(x)
    together.sum().backward()
    assert torch.equal(together, y)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))


def test_together_takes_weights_as_they_are() -> None:
    """And leaves those that are computed to their layers: their quantizers run in each forward."""
    net = nn.Sequential(SamePadding(4, 4, 3), Standardized(4, 4, 3), nn.Conv2d(4, 4, 1))
    fastqat.prepare(net, QConfig(CONFIG.weight, None))
    fastqat.quantize_weights_together(net)
    calls: list[int] = []
    for i, layer in enumerate(net):
        quantizer = layer.weight_fake_quant
        quantizer.forward = lambda *args, i=i, f=quantizer.forward, **k: (calls.append(i), f(*args, **k))[1]
    net(torch.randn(1, 4, 9, 9))
    assert calls == [1]


@every_pattern
def test_compiled(pattern: Pattern) -> None:
    """In one graph, with the values and gradients of the eager layer."""
    net, _, x = prepared(pattern)
    expected = net(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch.compiler.reset()
    backend = "aot_eager" if type(net[0]).__name__ in ("SamePadding", "Standardized", "Scaled") else "eager"
    y = torch.compile(net, backend=backend, fullgraph=True)(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)


@every_pattern
def test_autocast(pattern: Pattern) -> None:
    """Products in bfloat16 with weights on the grid of the float32 ones; lookups stay in float32."""
    net, plain, x = prepared(pattern)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        theirs = net[0].activation_fake_quant(x) if x.is_floating_point() else x
        weight = quantized(pattern.weight(plain), net[0].weight_fake_quant.scale, 3)
        expected = pattern.plain(plain, theirs, weight)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


def test_half_precision() -> None:
    """A weight that a layer casts is quantized before, from its float32 values."""
    cast = next(p for p in PATTERNS if repr(p) == "Cast")
    net, plain, x = prepared(cast, QConfig(CONFIG.weight, None))
    y = net(x.bfloat16())
    weight = quantized(plain.weight, net[0].weight_fake_quant.scale, 3).bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.nn.functional.linear(x.bfloat16(), weight, plain.bias.bfloat16()))


@pytest.mark.parametrize("on", ("input", "output"))
def test_outputs_and_gradients(on: str) -> None:
    """The first floating tensor of what a layer returns is its output, which has the quantizers."""
    gradient = fastqat.GradientQSpec(bits=2)
    net = nn.Sequential(Routed(6, 5))
    fastqat.prepare(net, QConfig(None, QSpec(3), activation_on=on, gradient=gradient))
    x = torch.randn(4, 6, requires_grad=True)
    y, index = net(x)
    codes = torch.unique(y)
    assert (codes.numel() <= 8) == (on == "output") and index.dtype == torch.int64
    seen: list[Tensor] = []
    net[0].bias.register_hook(seen.append)
    (y * torch.randn_like(y)).sum().backward()
    assert len(seen) == 1
    rows = [row for row in fastqat.report(net, x.detach()).quantizers]
    assert {(row.tensor, row.runs) for row in rows} == {(on, 1), ("gradient", 1)}
