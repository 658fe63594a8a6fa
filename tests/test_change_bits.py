"""A change of bit-width keeps the range, the memory and the graph, for every grid that there is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec, prepare, quantizers

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
# Learned and given ranges: the distance of the outermost levels stays, and the place of the lowest where it can.
SPANNED = {
    "signed": QSpec(4, signed=True, learn="scale"),
    "unsigned": QSpec(4, signed=False, learn="scale"),
    "restricted": QSpec(4, restricted=True, learn="scale"),
    "affine": QSpec(4, symmetric=False, learn="scale+zero_point"),
    "offset": quantizers.lsq_plus(4),
    "lowest": quantizers.lbt_weight(4),
    "per channel": QSpec(4, 0, learn="scale"),
    "groups": QSpec(4, 1, group_size=9, symmetric=False, learn="scale"),
    "percentile": QSpec(4, 1, symmetric=False, range="percentile"),
}
# Where a quantizer of the other bit-width, which has seen the same, has the same grid.
EQUAL = {
    "pact": quantizers.pact(4, alpha=2.0),
    "cg_pact": quantizers.cg_pact(4, alpha=2.0),
    "dorefa weight": quantizers.dorefa_weight(4),
    "sat": quantizers.dorefa_weight(4, rescale="std"),
    "dorefa activation": quantizers.dorefa_activation(4),
    "trs weight": quantizers.trs_weight(4),
    "trs restricted": quantizers.trs_weight(4, restricted=True),
    "trs activation": quantizers.trs_activation(4),
    "minmax": QSpec(4, range="minmax"),
    "minmax per channel": QSpec(4, 1, range="minmax", symmetric=False),
    "running_minmax": QSpec(4, range="running_minmax", signed=False),
    "in_hindsight": QSpec(4, range="in_hindsight", symmetric=False),
    "in_hindsight symmetric": QSpec(4, range="in_hindsight", restricted=True),
}
ALL = SPANNED | EQUAL
of_all = pytest.mark.parametrize("name", ALL)


def made(spec: QSpec, **changes: Any) -> FakeQuant:
    """A quantizer that has seen two tensors in training."""
    quantizer = FakeQuant(**{**vars(spec), **changes})
    for factor in (1.0, 0.5):
        quantizer(factor * X)
    return quantizer


def ends(quantizer: FakeQuant) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of the grid, by its equations in float64."""
    qmin, qmax = quantizer.qrange.double()
    scale = quantizer.scale.detach().double()
    if quantizer.count_from == "lowest":
        return -scale * qmax / 2, scale * qmax / 2
    if quantizer.offset is not None:
        return scale * qmin + quantizer.offset.detach().double(), scale * qmax + quantizer.offset.detach().double()
    zero = 0 if quantizer.zero_point is None else quantizer.zero_point.detach().double()
    return scale * (qmin - zero), scale * (qmax - zero)


def tensors(quantizer: FakeQuant) -> dict[str, Tensor]:
    """All tensors of its grid and its range."""
    return {**dict(quantizer.named_parameters()), **dict(quantizer.named_buffers())}


@pytest.mark.parametrize("bits", (2, 3, 8))
@pytest.mark.parametrize("name", SPANNED)
def test_the_range_stays(name: str, bits: int) -> None:
    quantizer = made(SPANNED[name])
    low, high = ends(quantizer)
    quantizer.change_bits(bits)
    new_low, new_high = ends(quantizer)
    assert quantizer.bits == bits and quantizer.qrange.tolist() == list(quantizer.codes)
    assert quantizer.codes[1] - quantizer.codes[0] == 2**bits - 1 - quantizer.restricted
    torch.testing.assert_close(new_high - new_low, high - low, rtol=1e-6, atol=0)
    if name not in ("signed", "per channel"):  # whose lowest level is one further from 0 than the highest
        torch.testing.assert_close(new_low, low, rtol=1e-5, atol=1e-6)
    if quantizer.axis is None:
        levels = quantizer.eval()(torch.linspace(-9, 9, 4000)).unique()
        assert len(levels) == 2**bits - quantizer.restricted


@pytest.mark.parametrize("bits", (2, 3, 8))
@pytest.mark.parametrize("name", EQUAL)
def test_the_grid_is_that_of_a_quantizer_of_these_bits(name: str, bits: int) -> None:
    """Values and gradients now, and where a range follows the data, of the steps that come."""
    changed, other = made(EQUAL[name]), made(EQUAL[name], bits=bits)
    changed.change_bits(bits)
    for key, value in tensors(other).items():
        torch.testing.assert_close(tensors(changed)[key], value, rtol=1e-6, atol=1e-7, msg=key)
    for training in (False, True):
        found = []
        for quantizer in (changed.train(training), other.train(training)):
            x = (0.3 * X + 0.1).requires_grad_()
            y = quantizer(x)
            y.square().sum().backward()
            found.append((y.detach(), x.grad))
        for one, another in zip(*found, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-6)


@of_all
def test_to_and_fro(name: str) -> None:
    """100 changes and back: the memory stays where it is, and the range does not wander."""
    quantizer = made(ALL[name])
    before = {key: (t, t.data_ptr(), t.clone()) for key, t in tensors(quantizer).items()}
    for _ in range(25):
        for bits in (3, 8, 2, 4):
            quantizer.change_bits(bits)
    for key, (tensor, address, value) in before.items():
        now = tensors(quantizer)[key]
        assert now is tensor and now.data_ptr() == address, key
        torch.testing.assert_close(now, value, rtol=2e-6, atol=2e-6, msg=key)


@of_all
def test_for_a_while(name: str) -> None:
    """grid_at changes nothing, write_grid what it is given: a pass at other bits, and every bit is as before."""
    quantizer = made(ALL[name]).eval()
    before, y = {key: t.clone() for key, t in tensors(quantizer).items()}, quantizer(X)
    here, there = quantizer.grid_at(4), quantizer.grid_at(2)
    assert all(torch.equal(t, before[key]) for key, t in tensors(quantizer).items())
    assert torch.equal(here.scale, quantizer.scale) and here.scale.data_ptr() != quantizer.scale.data_ptr()
    quantizer.write_grid(there)
    other = made(ALL[name]).eval()
    other.change_bits(2)
    assert torch.equal(quantizer(X), other(X)) and not torch.equal(y, other(X))
    quantizer.write_grid(here)
    assert all(torch.equal(t, before[key]) for key, t in tensors(quantizer).items()) and torch.equal(quantizer(X), y)


@of_all
def test_before_the_first_tensor(name: str) -> None:
    """Nothing is scaled that is not there."""
    quantizer = FakeQuant(**vars(ALL[name]))
    quantizer.change_bits(3)
    other = FakeQuant(**{**vars(ALL[name]), "bits": 3})
    assert quantizer.initialized == other.initialized
    torch.testing.assert_close(quantizer(X), other(X), rtol=1e-6, atol=1e-7)


@of_all
def test_errors(name: str) -> None:
    """Named, and nothing is changed."""
    quantizer = made(ALL[name])
    before = {key: t.clone() for key, t in tensors(quantizer).items()}
    fewest = 2 if quantizer.restricted or quantizer.normalize else 1
    for bits in (0, 9, -1, *([1] if fewest == 2 else [])):
        with pytest.raises(ValueError, match=f"bits: wanted {fewest} to 8; got {bits}"):
            quantizer.change_bits(bits)
    wrong: Any
    for wrong in (2.0, True, "4", None):
        with pytest.raises(TypeError, match=f"bits: wanted an int from {fewest} to 8; got"):
            quantizer.change_bits(wrong)
    assert quantizer.bits == 4 and all(torch.equal(t, before[key]) for key, t in tensors(quantizer).items())


def test_one_bit() -> None:
    """Two levels as far apart as the outermost before."""
    signed, unsigned = (QSpec(2, signed=sign, range="fixed") for sign in (True, False))
    for spec, wanted in ((signed, {-3.0, 0.0}), (unsigned, {0.0, 3.0})):
        quantizer = FakeQuant(**vars(spec), scale=torch.ones(1))
        quantizer.change_bits(1)
        assert set(quantizer(torch.linspace(-5, 5, 21)).tolist()) == wanted


def test_the_optimizer_goes_on() -> None:
    """The moments of a learned scale stay with it, and it goes on learning; PACT's alpha stays where it was."""
    quantizer = made(quantizers.cg_pact(4, alpha=2.0))
    optimizer = torch.optim.Adam([quantizer.scale], lr=0.01)
    for bits in (4, 2, 8):
        before = quantizer.scale.item() * (2**quantizer.bits - 1)
        quantizer.change_bits(bits)
        assert quantizer.scale.item() * (2**bits - 1) == pytest.approx(before, rel=1e-6)
        moved = quantizer.scale.item()
        quantizer(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert quantizer.scale.item() != moved and quantizer.scale.item() > 0
    assert optimizer.state[quantizer.scale]["step"] == 3


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    """Not a gradient of another grid than the one that there was."""
    for spec in (QSpec(4, learn="scale"), quantizers.dorefa_weight(4, rescale="std"), QSpec(4, estimator="ewgs")):
        quantizer, x = made(spec), X.clone().requires_grad_()
        y = quantizer(x)
        quantizer.change_bits(3)
        if spec.normalize == "tanh":  # whose gradient knows of no grid
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("name", ("per channel", "offset", "lowest", "in_hindsight", "trs weight"))
def test_compiled_once(name: str) -> None:
    """No graph for another bit-width: the values of eager."""
    torch._dynamo.reset()
    counter, found = CompileCounterWithBackend("eager"), []
    for compiled in (False, True):
        quantizer = made(ALL[name])
        call: Any = torch.compile(quantizer, fullgraph=True, backend=counter) if compiled else quantizer
        found.append([])
        for bits in (4, 3, 8, 2, 4):
            quantizer.change_bits(bits)
            found[-1].append(call(0.7 * X).detach())
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def tracked(max_bits: int = 4) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Two layers whose weights are tracked, quantized together, and two steps of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    options = Oscillation(momentum=0.1, max_bits=max_bits)
    prepare(net, QConfig(QSpec(4, 0, learn="scale", grad_scale="lsq", oscillation=options), None))
    fastqat.quantize_weights_together(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    return net, optimizer


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        net(X[:, :, 0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_tracking_begins_anew() -> None:
    """Without a warning, and in the memory that there is; the weights together are those one by one."""
    net, optimizer = tracked()
    train(net, optimizer, 9)
    layer: Any = net[0]
    tracker = layer.weight_fake_quant.tracker
    assert tracker.has_tracked and tracker.counts[0] > 0
    addresses = [t.data_ptr() for t in tracker.buffers()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastqat.set_bit_widths(net, {"0": (2, None)})
    assert layer.weight_fake_quant.tracker is tracker and [t.data_ptr() for t in tracker.buffers()] == addresses
    assert not tracker.has_tracked and not tracker.words.any() and tracker.clock.tolist() == [1, -1, 0]
    assert net[1].weight_fake_quant.tracker.has_tracked  # type: ignore[union-attr]
    y = net(X[:, :, 0])
    net.weight_buckets.remove()  # type: ignore[operator, union-attr]
    assert torch.equal(net(X[:, :, 0]), y)
    train(net, optimizer, 2)
    assert tracker.has_tracked and int(tracker.codes().abs().max()) <= 2


def test_tracking_of_wider_codes() -> None:
    """Words grow with the codes; what has more bits than are tracked is not tracked, and is again afterwards."""
    net, optimizer = tracked(max_bits=7)
    layer: Any = net[0]
    train(net, optimizer, 2)
    for bits, tracks in ((7, True), (8, False), (3, True)):
        layer.weight_fake_quant.change_bits(bits)
        train(net, optimizer, 2)
        assert (layer.weight_fake_quant.tracker is not None) == tracks
        if tracks:
            found = layer.weight_fake_quant.tracker
            weight = layer.weight_fake_quant(layer.weight).detach()
            codes = (weight / layer.weight_fake_quant.scale.detach().view(-1, 1)).round()
            assert found.has_tracked and torch.equal(found.codes(), codes.int())


def test_bit_widths_of_a_model() -> None:
    """By the names that cost has; what is in float has none."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    prepare(net, QConfig(QSpec(4, 0), QSpec(5)), overrides={"2": QConfig(QSpec(3), None), "3": None})
    net(X[:, :, 0])
    assert fastqat.bit_widths(net) == {"0": (4, 5), "2": (3, None)}
    assert {row.layer: (row.bits_weight, row.bits_activation) for row in fastqat.cost(net, X[:, :, 0]).layers} == {
        "0": (4, 5),
        "2": (3, 32),
        "3": (32, 32),
    }
    fastqat.set_bit_widths(net, {"*": (2, None), "0": (8, 6)})
    assert fastqat.bit_widths(net) == {"0": (8, 6), "2": (2, None)}
    found = {row.layer: row for row in fastqat.cost(net, X[:, :, 0]).layers}
    assert found["0"].weight_bits == 16 * 8 and found["2"].bit_operations == found["2"].macs * 2 * 32
    fastqat.set_bit_widths(net, fastqat.bit_widths(net))
    assert fastqat.bit_widths(net) == {"0": (8, 6), "2": (2, None)} and fastqat.bit_widths(nn.Linear(2, 2)) == {}


def test_layers_that_share_a_weight() -> None:
    """One is enough; two that want different bits are refused."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    prepare(net, QConfig(QSpec(4), QSpec(4)))
    net(X[:, :, 0])
    fastqat.set_bit_widths(net, {"1": (3, 2)})
    assert fastqat.bit_widths(net) == {"0": (3, 4), "1": (3, 2)}
    with pytest.raises(ValueError, match="layer '0', weight; layer '1', weight: wanted the same bits .*; got 5 and 6"):
        fastqat.set_bit_widths(net, {"0": (5, 5), "1": (6, 6)})
    assert fastqat.bit_widths(net) == {"0": (3, 4), "1": (3, 2)}


def test_attention_has_several_weights() -> None:
    net = prepare(nn.MultiheadAttention(4, 2, kdim=3, vdim=3), QConfig(QSpec(4, 0), QSpec(4)))
    fastqat.set_bit_widths(net, {"*": (3, 5)})
    assert fastqat.bit_widths(net) == {"": (3, 5), "out_proj": (3, 5)}
    assert {q.bits for q in net.weight_quantizers().values()} == {3}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("widths", "kind", "message"),
    (
        (
            {"2.weight": (3, 3)},
            ValueError,
            "bit-widths: wanted a pattern that matches the name of a layer that is quan",
        ),
        ({"0": (9, 3)}, ValueError, "layer '0', weight: bits: wanted 1 to 8; got 9"),
        ({"0": (3, 0)}, ValueError, "layer '0', activation: bits: wanted 1 to 8; got 0"),
        ({"0": (3, 4), "1": (1, None)}, ValueError, "layer '1', weight: bits: wanted 2 to 8; got 1"),
        ({"1": (3, 4)}, ValueError, "layer '1': wanted None for its activation, which is in float; got 4 bits"),
        ({"0": (3.0, 4)}, TypeError, "layer '0', weight: bits: wanted an int from 1 to 8; got 3.0"),
        ({"0": 4}, TypeError, r"bit-widths of '0': wanted \(bits of weight, bits of activation\); got 4"),
        (
            {"0": (1, 2, 3)},
            TypeError,
            r"bit-widths of '0': wanted \(bits of weight, bits of activation\); got \(1, 2, 3",
        ),
    ),
)
def test_wrong_bit_widths(widths: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Named, and the model is as it was."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prepare(net, QConfig(QSpec(4), QSpec(4)), overrides={"1": QConfig(QSpec(4, restricted=True), None)})
    with pytest.raises(kind, match=message):
        fastqat.set_bit_widths(net, widths)
    assert fastqat.bit_widths(net) == {"0": (4, 4), "1": (4, None)}
