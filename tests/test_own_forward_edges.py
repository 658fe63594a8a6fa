"""What layers with a forward of their own may do otherwise: refused by name, or right all the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_forward_layers import Multiplied, SamePadding, Scaled, Standardized
from torch import Tensor, nn

import fastqat
from fastqat import QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = QConfig(QSpec(4, 0), QSpec(4))
WEIGHTS = QConfig(QSpec(3, 0), None)


class Einsum(nn.Linear):
    """Writes its product in a way that is not known."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class Gate(nn.Linear):
    """Has a weight for no product."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0]


class Unused(nn.Linear):
    """Has a weight for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Halves(nn.Linear):
    """Computes with both halves of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weight.chunk(2)
        return F.linear(x, a) * F.linear(x, b)


class Double(nn.Linear):
    """Computes in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.weight.double()).float()


class Moody(nn.Linear):
    """Computes otherwise in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight) if self.training else self.weight)


class Called(nn.Linear):
    """Does more when it is called."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Attention(nn.MultiheadAttention):
    """An attention that computes something else."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.in_proj_weight)


class Quantized(nn.Linear):
    """A quantized layer of someone else."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight_fake_quant = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_fake_quant(self.weight), self.bias)


class Masked(nn.Conv2d):
    """Writes zeros into its weight before it computes with it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.ones(3, 3).triu())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.weight.data *= self.mask
        return super().forward(x)


class TwoInputs(nn.Linear):
    """Wants arguments that nobody can guess."""

    def forward(self, names: list[str], x: Tensor, *, times: float) -> Tensor:
        return F.linear(x, self.weight, self.bias) * times * len(names)


class MaskedTwoInputs(TwoInputs):
    """Writes zeros into its weight."""

    def forward(self, names: list[str], x: Tensor, *, times: float) -> Tensor:
        self.weight.data[1] = 0.0
        return super().forward(names, x, times=times)


class Holder(nn.Module):
    """Knows them."""

    def __init__(self, layer: TwoInputs) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(["a"], x, times=2.0)


class Noisy(nn.Linear):
    """Draws numbers, counts its calls, and keeps a running mean: a run of it leaves a trace."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm, self.seen = nn.BatchNorm1d(args[0]), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += 1
        return F.linear(self.norm(x) + torch.randn(1), F.dropout(self.weight, 0.5, self.training))


@pytest.mark.parametrize(
    ("layer", "reason"),
    (
        (Einsum(4, 4), "its forward hands its weight to einsum, not to a product that is known"),
        (Gate(4, 4), "its forward hands its weight to mul, not to a product that is known"),
        (Unused(4, 4), "the forward of Unused hands its weight to no product that can be seen"),
        (Halves(4, 4), "its forward makes several tensors of its weight for products"),
        (Double(4, 4), "its forward hands its weight to a product as torch.float64"),
        (Called(4, 4), "Called has a __call__ of its own"),
        (Attention(4, 2), "Attention has a forward of its own"),
        (Quantized(4, 4), "it has a weight_fake_quant of its own"),
        (Scaled(4, 4, max_norm=1.0), "Scaled has a forward of its own, and max_norm"),
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_stay_in_float(layer: nn.Module, reason: str) -> None:
    """With the reason in the report."""
    net = nn.Sequential(nn.Linear(4, 4), layer)
    fastqat.prepare(net, CONFIG)
    assert type(net[1]) is type(layer)
    assert next(row.reason for row in fastqat.report(net).left_in_float if row.layer == "1") == reason


def test_replaced_forward() -> None:
    """As accelerate replaces it, on the instance."""
    net = nn.Sequential(nn.Linear(4, 4), Multiplied(4, 4))
    net[1].forward = net[1].forward
    fastqat.prepare(net, CONFIG)
    assert fastqat.report(net).left_in_float[0].reason == "this Multiplied had its forward replaced"


def test_prepare_leaves_no_trace() -> None:
    """Of the run that it makes: random numbers, buffers, attributes, parameters, hooks."""
    net = nn.Sequential(Noisy(4, 3), Masked(3, 3, 3))
    calls: list[int] = []
    net[0].register_forward_hook(lambda *_: calls.append(0))
    with torch.no_grad():
        net[1].weight.fill_(1.0)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    fastqat.prepare(net, CONFIG)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert net[0].seen == [0] and net[1].calls == 0 and calls == [] and net[0].training
    assert net[0].weight.grad is None and net[0].weight_form == "computed"


def test_a_weight_that_its_forward_changes() -> None:
    """Is quantized after that, together with others or not, and kept by no ``remove``."""
    torch.manual_seed(0)
    net = nn.Sequential(Masked(2, 2, 3))
    x = torch.randn(1, 2, 5, 5)
    fastqat.prepare(net, WEIGHTS)
    twin = copy.deepcopy(net)
    fastqat.quantize_weights_together(twin)
    for _ in range(2):
        with torch.no_grad():  # as an optimizer does
            net[0].weight += 0.1
            twin[0].weight += 0.1
        assert torch.equal(net(x), twin(x))
        scale = net[0].weight_fake_quant.scale.detach().view(-1, 1, 1, 1)
        codes = (net[0].weight.detach() / scale).round().clamp(-4, 3)
        assert not codes.tril(-1).any()
        torch.testing.assert_close(net(x), F.conv2d(x, scale * codes, net[0].bias))
    with pytest.raises(ValueError, match="layer '0'.*Masked"):
        fastqat.remove(net, keep="quantized")


def test_a_forward_that_prepare_cannot_run() -> None:
    """Its first call sets the range; from then on it is a layer like others."""
    torch.manual_seed(0)
    layer = TwoInputs(4, 3)
    fastqat.prepare(layer, QConfig(QSpec(3, 0, range="minmax"), None))
    assert layer.weight_form is None and not layer.weight_fake_quant.initialized
    with pytest.raises(ValueError, match="keep='quantized'"):
        fastqat.remove(layer, keep="quantized")
    x = torch.randn(2, 4)
    net = Holder(layer)
    y = net(x)
    quantizer = layer.weight_fake_quant
    assert layer.weight_form == "as it is" and quantizer.initialized
    scale = quantizer.scale.detach().view(-1, 1)
    weight = scale * (layer.weight.detach() / scale).round().clamp(-4, 3)
    torch.testing.assert_close(y, F.linear(x, weight, layer.bias) * 2)
    fastqat.quantize_weights_together(net)
    seen: list[int] = []
    quantizer.forward = lambda *_: seen.append(1)
    assert torch.equal(net(x), y) and not seen
    del quantizer.forward
    fastqat.remove(net, keep="quantized")
    assert torch.equal(layer.weight, weight)


def test_a_forward_that_prepare_cannot_run_and_that_changes_its_weight() -> None:
    """Is not quantized together with others either."""
    net = Holder(MaskedTwoInputs(4, 3))
    fastqat.prepare(net, WEIGHTS)
    x = torch.randn(2, 4)
    net(x)
    assert net.layer.weight_form == "changed"
    twin = copy.deepcopy(net)
    fastqat.quantize_weights_together(twin)
    for m in (net, twin):
        with torch.no_grad():
            m.layer.weight += 0.2
    assert torch.equal(net(x), twin(x)) and not net.layer.weight[1].any()


class Sometimes(nn.Linear):
    """May leave its weight alone."""

    used = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.used else x


def test_a_call_in_which_no_product_takes_the_weight() -> None:
    """One warning, with the name of the layer."""
    net = nn.Sequential(Sometimes(4, 4))
    fastqat.prepare(net, WEIGHTS)
    net(torch.randn(2, 4))
    net[0].used = False
    with pytest.warns(UserWarning, match="Sometimes: wanted a forward in which a product takes its weight"):
        net(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(2, 4))
    assert vars(fastqat.remove(net)[0]).keys() == vars(Sometimes(4, 4)).keys() | {"used"}


def test_a_forward_that_differs_in_training() -> None:
    """What the product gets is quantized, in both modes, and the weights are not quantized together with others."""
    torch.manual_seed(0)
    net = nn.Sequential(Moody(4, 3, bias=False))
    fastqat.prepare(net, WEIGHTS)
    fastqat.quantize_weights_together(net)
    x, scale = torch.randn(2, 4), net[0].weight_fake_quant.scale.detach().view(-1, 1)
    for training in (True, False):
        weight = net[0].weight.detach()
        weight = F.normalize(weight) if training else weight
        expected = F.linear(x, scale * (weight / scale).round().clamp(-4, 3))
        assert torch.equal(net.train(training)(x), expected)


def test_weights_that_layers_share() -> None:
    """One quantizer where both take the weight as it is; one for each where a forward computes with it first."""
    tied = nn.ModuleList([Scaled(7, 4), nn.Linear(4, 7, bias=False)])
    tied[1].weight = tied[0].weight
    fastqat.prepare(tied, WEIGHTS)
    assert tied[0].weight_fake_quant is tied[1].weight_fake_quant
    both = nn.ModuleList([Standardized(4, 4, 3), nn.Conv2d(4, 4, 3)])
    both[1].weight = both[0].weight
    fastqat.prepare(both, WEIGHTS)
    scales = [layer.weight_fake_quant.scale for layer in both]
    x = torch.randn(1, 4, 5, 5)
    assert not torch.equal(*scales) and not torch.equal(both[0](x), both[1](x))
    turned = nn.ModuleList([nn.Linear(4, 4), Multiplied(4, 4)])
    turned[1].weight = turned[0].weight
    fastqat.prepare(turned, WEIGHTS)
    assert turned[0].weight_fake_quant is turned[1].weight_fake_quant


def test_losses_and_summaries_see_the_computed_weight() -> None:
    """The dampening loss is that of what is quantized, and its gradient reaches the weight."""
    torch.manual_seed(0)
    net = nn.Sequential(Standardized(4, 4, 3))
    fastqat.prepare(net, QConfig(QSpec(3, 0, oscillation=fastqat.Oscillation()), None))
    layer = net[0]
    loss = fastqat.dampening_loss(net)
    scale = layer.weight_fake_quant.scale.detach().view(-1, 1, 1, 1)
    weight = layer.computed()
    codes = (weight / scale).round().clamp(-4, 3).detach()
    expected = (scale * codes - torch.minimum(torch.maximum(weight, -4 * scale), 3 * scale)).square().mean(
        (1, 2, 3)
    ).sum() * 0.1
    torch.testing.assert_close(loss, expected)
    (found,), (wanted,) = torch.autograd.grad(loss, [layer.weight]), torch.autograd.grad(expected, [layer.weight])
    torch.testing.assert_close(found, wanted)
    net(torch.randn(1, 4, 5, 5))
    (quantized,) = fastqat.oscillation.quantized_weights(net)
    torch.testing.assert_close(quantized.latent(), weight.detach())


def test_what_the_report_and_compression_say() -> None:
    """A computed weight is named; the product of a layer is none of the operations in float."""
    net = nn.Sequential(Standardized(4, 4, 3), nn.Flatten(), Multiplied(36, 2))
    fastqat.prepare(net, CONFIG)
    x = torch.randn(1, 4, 5, 5)
    net(x)
    report = fastqat.report(net, x)
    assert (
        next(row.note for row in report.quantizers if row.tensor == "weight") == "what its forward makes of its weight"
    )
    assert [(row.layer, row.operation) for row in report.operations or ()] == [("2", "add")]
    left = fastqat.compress_saved_activations(net).left_alone
    assert set(left.values()) == {"it has a forward of its own, which saves what autograd saves for it"}


class TransposedTwice(nn.Linear):
    """Makes matrices of one shape of its weight, and hands over an attribute of one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.sin() * 2).T


def test_a_compiled_forward_that_cannot_be_followed() -> None:
    """An attribute of one of several matrices: an error, no weight in float."""
    net = nn.Sequential(TransposedTwice(4, 4))
    fastqat.prepare(net, WEIGHTS)
    x = torch.randn(2, 4)
    scale = net[0].weight_fake_quant.scale.detach().view(-1, 1)
    weight = scale * (net[0].weight.detach().sin() * 2 / scale).round().clamp(-4, 3)
    torch.testing.assert_close(net(x).detach(), x @ weight.T)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"wanted .t\(\) or .transpose\(\)"):
        torch.compile(net, backend="eager", fullgraph=True)(x)


def bits(net: nn.Module) -> list[int]:
    """Of the weights."""
    return [m.bits for name, m in net.named_modules() if name.endswith("weight_fake_quant")]


def test_first_and_last_layers_in_float() -> None:
    """No other layer gets their bits, and a warning names them."""
    net = nn.Sequential(Einsum(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm((2, 4)), nn.ReLU())
    with pytest.warns(UserWarning, match=r"the first layer '0' stays in float \(its forward hands .* einsum"):
        fastqat.prepare(net, CONFIG, first_last_bits=8)
    assert bits(net) == [4, 8]
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.GRU(4, 4))
    with pytest.warns(UserWarning, match=r"the last layer '2' stays in float \(no quantized twin\)"):
        fastqat.prepare(net, CONFIG, first_last_bits=8)
    assert bits(net) == [8, 4]
    net = nn.Sequential(nn.GRU(4, 4), nn.Linear(4, 4), nn.GRU(4, 4))
    with pytest.warns(UserWarning, match="the first layer '0' .*, and the last layer '2'"):
        fastqat.prepare(net, CONFIG, first_last_bits=8)
    assert bits(net) == [4]


def test_first_and_last_layers_that_were_chosen_to_stay_in_float() -> None:
    """Without a warning, and no other layer gets their bits; tokens and positions of a module are no layer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net.position = nn.Parameter(torch.zeros(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastqat.prepare(net, CONFIG, first_last_bits=8, overrides={"0": None, "2": None})
    assert bits(net) == [4]


def test_padding_before_the_input_is_quantized() -> None:
    """Zeros that a layer pads with are zeros, also where the grid of the input has none."""
    net = nn.Sequential(SamePadding(4, 4, 3, bias=False))
    fastqat.prepare(net, QConfig(None, QSpec(4, symmetric=False, learn="scale+offset")))
    x = torch.rand(1, 4, 5, 5) + 1
    fastqat.calibrate(net, [x])
    expected = F.conv2d(F.pad(net[0].activation_fake_quant(x), (0, 1, 1, 2)), net[0].weight)
    assert torch.equal(net(x), expected)


class OfInput(nn.Linear):
    """Transposes its input by an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.T).t()


class Adapted(nn.Linear):
    """Has a second weight of the same shape, and takes that one's attribute."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.a.T


class BothAttributes(nn.Linear):
    """Takes the attributes of both."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + x @ self.a.T


@pytest.mark.parametrize("cls", (OfInput, Adapted, BothAttributes))
def test_compiled_with_attributes(cls: type[nn.Linear]) -> None:
    """The eager values, where batch, inputs and outputs are equally many, or an error."""
    torch.manual_seed(0)
    net = nn.Sequential(cls(4, 4))
    fastqat.prepare(net, WEIGHTS)
    x, scale = torch.randn(4, 4), net[0].weight_fake_quant.scale.detach().view(-1, 1)
    weight = scale * (net[0].weight.detach() / scale).round().clamp(-4, 3)
    expected = F.linear(x, weight)
    if cls is Adapted:
        expected += net[0].bias
    if cls is not OfInput:
        expected = expected + F.linear(x, net[0].a)
    torch.testing.assert_close(net(x), expected)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    if cls is BothAttributes:
        with pytest.raises(Exception, match=r"wanted .t\(\) or .transpose\(\)"):
            compiled(x)
    else:
        torch.testing.assert_close(compiled(x), expected)
