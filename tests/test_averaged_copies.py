"""Copies of a network that average it, as others and as fastqat do it: the right network, or an error with a name."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import fastqat
from fastqat import Oscillation, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
DECAYS = (0.9, 0.99, 0.999, 0.9999)
STEPS = 12
Update = Callable[[nn.Module], object]


def network(bits: int = 3, tracked: bool = False, activations: str = "in_hindsight") -> nn.Module:
    """A prepared network with learned scales of weights, whose activation ranges follow the data."""
    torch.manual_seed(1)
    oscillation = Oscillation(momentum=0.3, freeze_threshold=0.7, max_bits=8) if tracked else None
    weight = QSpec(bits=bits, axis=0, learn="scale", oscillation=oscillation)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))
    return fastqat.prepare(net, QConfig(weight=weight, activation=QSpec(bits=bits, range=activations)))


def train(net: nn.Module, update: Update, steps: int = STEPS) -> None:
    """Some steps of an optimizer, and noise that makes weights oscillate, each followed by an update of a copy."""
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        net.train()(torch.randn(32, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for layer in net.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.add_(0.05 * torch.randn(layer.weight.shape, generator=generator))
        update(net)


class OfTimmV2(nn.Module):
    """What timm's ModelEmaV2 does: the values of two state_dicts, one after the other, integers among them."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(net).eval(), decay

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Average everything."""
        for mine, value in zip(self.module.state_dict().values(), net.state_dict().values(), strict=False):
            mine.copy_(self.decay * mine + (1.0 - self.decay) * value)


class OfTimmV3(OfTimmV2):
    """What timm's ModelEmaV3 does: integers are copied."""

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Average floating values."""
        for mine, value in zip(self.module.state_dict().values(), net.state_dict().values(), strict=False):
            if mine.is_floating_point():
                mine.lerp_(value, 1.0 - self.decay)
            else:
                mine.copy_(value)


class OfHand(OfTimmV2):
    """A loop over names that leaves integers alone."""

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Average floating values."""
        values = net.state_dict()
        for name, mine in self.module.state_dict().items():
            if mine.is_floating_point():
                mine.mul_(self.decay).add_(values[name], alpha=1.0 - self.decay)


class Loaded(OfTimmV2):
    """A dict of averages, integers copied, that a network loads at the end."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__(net, decay)
        self.values = {name: value.clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Average floating values, and load the dict."""
        for name, value in net.state_dict().items():
            floating = value.is_floating_point() and name in self.values
            mine = self.values.get(name, value)
            self.values[name] = mine.lerp(value, 1.0 - self.decay) if floating else value.clone()
        self.module.load_state_dict(self.values)


def of_torch(**options: Any) -> Callable[[nn.Module, float], AveragedModel]:
    """torch's AveragedModel; with buffers it is Lightning's WeightAveraging as well."""
    return lambda net, decay: AveragedModel(net, **{k: f(decay) if callable(f) else f for k, f in options.items()})


RIGHT: dict[str, Any] = {
    "fastqat": fastqat.AveragedModel,
    "torch": of_torch(multi_avg_fn=get_ema_multi_avg_fn),
    "torch, one by one": of_torch(avg_fn=get_ema_avg_fn),
    "timm V3": OfTimmV3,
    "loaded": Loaded,
}
OTHERS: dict[str, Any] = {
    "torch, buffers": of_torch(multi_avg_fn=get_ema_multi_avg_fn, use_buffers=True),
    "torch, buffers one by one": of_torch(avg_fn=get_ema_avg_fn, use_buffers=True),
    "torch, buffers of a mean": lambda net, decay: AveragedModel(net, use_buffers=True),
    "timm V2": OfTimmV2,
    "by hand": OfHand,
}


def update_of(average: Any) -> Update:
    return getattr(average, "update_parameters", None) or average.update


def assert_right(average: nn.Module, net: nn.Module) -> None:
    """Outputs of the quantizers of weights are those of float64 arithmetic, frozen codes those of the network."""
    average.eval()
    for mine, other in zip(average.modules(), net.modules(), strict=True):
        if not isinstance(mine, nn.Linear):
            continue
        q, of_net = mine.weight_fake_quant, other.weight_fake_quant
        low, high = of_net.codes
        scale = q.scale.detach().double().clamp(min=q.eps)[:, None]
        codes = (mine.weight.detach().double() / scale).round().clamp(low, high)
        if of_net.tracker is not None:
            codes = torch.where(of_net.tracker.frozen(), of_net.tracker.codes().double(), codes)
        torch.testing.assert_close(q(mine.weight).detach().double(), scale * codes, rtol=1e-6, atol=1e-12)
        of_x, scale = mine.activation_fake_quant, mine.activation_fake_quant.scale.detach().double()
        low, high = other.activation_fake_quant.codes
        x = torch.linspace(-2, 2, 101)
        zero = 0.0 if of_x.zero_point is None else of_x.zero_point.detach().double().round().clamp(low, high)
        wanted = scale * (((x.double() / scale).round() + zero).clamp(low, high) - zero)
        torch.testing.assert_close(of_x(x).detach().double(), wanted, rtol=1e-6, atol=1e-12)
    assert average(X).isfinite().all()


@pytest.mark.parametrize("tracked", (False, True), ids=("", "frozen"))
@pytest.mark.parametrize("kind", RIGHT)
def test_averages_that_are_right(kind: str, tracked: bool) -> None:
    """Made once ranges are known, each way that copies integers gives the averaged network."""
    for bits, decay in zip((2, 3, 4, 8), DECAYS, strict=True):
        net = network(bits, tracked)
        net(X)
        average = RIGHT[kind](net, decay)
        train(net, update_of(average))
        if tracked and bits == 2:
            assert any(q.tracker.frozen().any() for q in net.modules() if getattr(q, "tracker", None) is not None)
        assert_right(average.module, net)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tracked", (False, True), ids=("", "frozen"))
@pytest.mark.parametrize("kind", OTHERS)
def test_averages_of_integers_are_right_or_refused(kind: str, tracked: bool, decay: float) -> None:
    """An average of integers that is none of them raises, and names the layer; what it left alone is right."""
    for bits in (2, 3, 8):
        net = network(bits, tracked)
        net(X)
        average = OTHERS[kind](net, decay)
        train(net, update_of(average))
        try:
            average.module.eval()(X)
        except ValueError as error:
            assert "quantizer of layer '" in str(error) and "fastqat.AveragedModel" in str(error)
        else:
            assert_right(average.module, net)


@pytest.mark.parametrize("kind", ("torch, buffers", "timm V2"))
def test_truncated_codes_are_refused(kind: str) -> None:
    """0.9 * 3 + 0.1 * 3 is less than 3: the highest code became 2."""
    net = network(3)
    net(X)
    average = OTHERS[kind](net, 0.9)
    train(net, update_of(average))
    with pytest.raises(ValueError, match=r"quantizer of layer '0': qrange: wanted -4 to 3, the codes of 3 bits; got"):
        average.module.eval()


def test_words_that_stayed_behind_are_refused() -> None:
    """A loop over floating values leaves frozen codes where they were; evaluation says so, compiled or not."""
    net = network(3, tracked=True)
    net(X)
    average = OfHand(net, 0.9)
    train(net, average.update)
    for use in (average.module.eval, lambda: average.module(X)):
        with pytest.raises(ValueError, match="quantizer of layer '0': tracker.words: wanted frozen codes"):
            use()


@pytest.mark.parametrize("kind", {**RIGHT, **OTHERS})
def test_copies_made_before_the_first_batch(kind: str) -> None:
    """fastqat's and torch's take the range when it comes; others average it with NaN, and say so."""
    for activations in ("in_hindsight", "minmax", "mse"):
        net = network(4, activations=activations)
        average = {**RIGHT, **OTHERS}[kind](net, 0.99)
        train(net, update_of(average))
        if kind in ("fastqat", "torch", "torch, one by one"):
            average.module.eval()(X)
            assert_right(average.module, net)
        elif kind == "loaded":
            assert not average.module[0].activation_fake_quant.initialized
        elif not kind.startswith("torch"):
            with pytest.raises(ValueError, match="quantizer of layer '0': (scale: wanted a range|qrange)"):
                average.module.eval()(X)


def test_another_bit_width_in_a_copy_is_refused() -> None:
    """Copied integers bring codes that the copy does not know; fastqat.AveragedModel and a load bring all."""
    net = network(4)
    net(X)
    averages = [OfTimmV3(net, 0.9), fastqat.AveragedModel(net, 0.9)]
    fastqat.set_bit_widths(net, {"0": (3, None)})
    for average in averages:
        update_of(average)(net)
    with pytest.raises(ValueError, match="quantizer of layer '0': qrange: wanted -8 to 7, the codes of 4 bits"):
        averages[0].module.eval()
    assert_right(averages[1].module, net)
    assert torch.equal(averages[1].module[0].weight_fake_quant.scale, net[0].weight_fake_quant.scale)


def test_weights_that_are_quantized_together_are_checked() -> None:
    """The one call for all weights asks, too."""
    net = network(3)
    fastqat.quantize_weights_together(net)
    net.eval()(X)
    net[3].weight_fake_quant.qrange.copy_(torch.tensor([-3, 2]))
    with pytest.raises(ValueError, match="quantizer of layer '3': qrange"):
        net(X)


def test_average_follows_its_definition() -> None:
    """Scales, ranges and statistics against the recurrence in float64; integers and states are those of the network."""
    net = network(3, tracked=True)
    net(X)
    average = fastqat.AveragedModel(net, 0.8)
    names = ("0.weight", "0.weight_fake_quant.scale", "3.activation_fake_quant.range_high", "2.running_var")
    wanted = {name: net.state_dict()[name].double().clone() for name in names}

    def update(model: nn.Module) -> None:
        d = min(0.8, (1 + average.updates) / (10 + average.updates))
        average.update_parameters(model)
        for name in names:
            wanted[name] = d * wanted[name] + (1 - d) * model.state_dict()[name].double()

    train(net, update, 30)
    state = average.module.state_dict()
    for name in names:
        torch.testing.assert_close(state[name].double(), wanted[name], rtol=1e-5, atol=1e-8)
    for name, value in net.state_dict().items():
        if not value.is_floating_point() or ".tracker." in name:
            assert torch.equal(state[name], value), name
    assert average.n_averaged == 30 and not any(p.requires_grad for p in average.module.parameters())


def test_average_is_saved_and_goes_on() -> None:
    """Through a file, to the bit; a copy that trains on leaves the network alone."""
    net = network(3, tracked=True)
    first = fastqat.AveragedModel(net, 0.9)
    train(net, first.update_parameters)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = fastqat.AveragedModel(network(3, tracked=True), 0.9)
    net(X)
    second.update_parameters(net)  # of which nothing stays
    second.load_state_dict(torch.load(buffer))
    assert second.updates == STEPS
    train(net, lambda model: (first.update_parameters(model), second.update_parameters(model)), 3)
    states = [each.state_dict() for each in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert torch.equal(first.module.eval()(X), second.module.eval()(X))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first.module.train()(X)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_average_without_warmup_and_mistakes() -> None:
    net = network(4)
    average = fastqat.AveragedModel(net, 0.5, warmup=False)
    assert [average.decay_at(t) for t in (0, 1, 7)] == [0.0, 0.5, 0.5]
    average.update_parameters(nn.DataParallel(net))
    assert average.updates == 1
    with pytest.raises(ValueError, match="decay: wanted a number in 0..1; got 1.5"):
        fastqat.AveragedModel(net, 1.5)
    with pytest.raises(ValueError, match="module '0': wanted Linear, as in the copy; got Linear"):
        average.update_parameters(fastqat.remove(copy.deepcopy(net.eval())))


def test_of_timm() -> None:
    """The very classes, where timm is there."""
    utils = pytest.importorskip("timm.utils", exc_type=ImportError)
    net = network(3)
    net(X)
    second, third = utils.ModelEmaV2(net, decay=0.9), utils.ModelEmaV3(net, decay=0.9)
    train(net, lambda model: (second.update(model), third.update(model)))
    assert_right(third.module, net)
    with pytest.raises(ValueError, match="quantizer of layer '0': qrange"):
        second.module.eval()


def test_a_copy_of_scales_whose_channels_are_not_known() -> None:
    """The copy may be made before the first batch says how many channels an activation has."""
    torch.manual_seed(1)
    activation = QSpec(bits=4, axis=1, range="running_minmax", symmetric=False)
    net = fastqat.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), QConfig(QSpec(3, 0), activation))
    average = fastqat.AveragedModel(net, decay=0.9)
    assert not any(p.requires_grad for p in average.parameters())
    train(net, average.update_parameters)
    assert not any(p.requires_grad for p in average.parameters())
    x = X
    for layer in (average.module[0], average.module[2]):  # type: ignore[index]
        q, scale = layer.activation_fake_quant, layer.activation_fake_quant.scale
        low, high = q.qrange.tolist()
        zero = q.zero_point.round().clamp(low, high)
        x = scale * (((x / scale).round() + zero).clamp(low, high) - zero)
        steps = layer.weight_fake_quant.scale[:, None]
        x = nn.functional.linear(x, steps * (layer.weight / steps).round().clamp(-4, 3), layer.bias)
        x = x.relu() if layer is average.module[0] else x  # type: ignore[index]
    assert torch.allclose(average.eval()(X), x, atol=1e-6)
