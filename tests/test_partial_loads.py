"""Loads of dicts that are partial, cast, or of other bits: right, or refused by name, and what they leave out stays."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def network(bits: int = 4, **options: Any) -> nn.Module:
    """Two prepared layers, a quantizer by itself, and another that is a parametrization."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), FakeQuant(4, range="minmax"))
    weight = QSpec(bits=bits, axis=0, learn="scale", **options)
    return fastqat.prepare(net, QConfig(weight=weight, activation=QSpec(bits=bits, range="running_minmax")))


def used(**options: Any) -> nn.Module:
    net = network(**options)
    net(X)
    return net


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def known(net: nn.Module) -> list[bool]:
    return [m.initialized for m in net.modules() if isinstance(m, FakeQuant)]


def is_as(net: nn.Module, before: dict[str, Tensor]) -> bool:
    state = net.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[name], value) for name, value in before.items())


def test_a_dict_that_names_one_bias_changes_one_bias() -> None:
    """Ranges, and what was tracked, stay."""
    net = used(oscillation=Oscillation(0.1))
    before = values(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict({"0.bias": torch.ones(6)}, strict=False)
    assert all(known(net)) and is_as(net, {**before, "0.bias": torch.ones(6)})


def test_a_weight_without_its_range_is_of_a_float_network() -> None:
    """That layer has no range then, with one warning; the others keep theirs."""
    net = used()
    with pytest.warns(UserWarning, match="uninitialized") as caught:
        net.load_state_dict({"0.weight": 7 * torch.ones(6, 6)}, strict=False)
    assert len(caught) == 1
    assert not net[0].weight_fake_quant.initialized and not net[0].activation_fake_quant.initialized
    assert net[2].weight_fake_quant.initialized and net[2].activation_fake_quant.initialized and net[3].initialized
    net(X)
    assert net[0].weight_fake_quant.scale[0] > 0.4 and all(known(net))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_a_cast_dict(dtype: torch.dtype) -> None:
    """Floats are taken in float32; eps, which would be 0, stays."""
    net, other = used(), network()
    cast = {name: v.to(dtype) if v.is_floating_point() else v for name, v in net.state_dict().items()}
    for assign in (False, True):
        other.load_state_dict(cast, assign=assign)
        of_weight = other[0].weight_fake_quant
        assert of_weight.eps == net[0].weight_fake_quant.eps and of_weight.scale.dtype == torch.float32
        assert torch.equal(of_weight.scale.detach(), net[0].weight_fake_quant.scale.detach().to(dtype).float())
        assert other.float().eval()(X).isfinite().all()


def test_a_learned_scale_below_zero_in_a_cast_dict() -> None:
    """Training may leave one there, and it is loaded as it is from a dict that was not cast."""
    net, other = used(), network()
    net[0].weight_fake_quant.scale.data[0] = -0.25
    other.load_state_dict({name: v.double() if v.is_floating_point() else v for name, v in net.state_dict().items()})
    assert torch.equal(other[0].weight_fake_quant.scale, net[0].weight_fake_quant.scale)


REFUSED = {
    "scale below the least half": (
        "0.weight_fake_quant.scale",
        lambda v: (v * 1e-12).half(),
        "scale: wanted finite",
    ),
    "scale beyond the largest half": (
        "0.weight_fake_quant.scale",
        lambda v: (v * 1e9).half(),
        "scale: wanted finite",
    ),
    "range beyond": ("2.activation_fake_quant.range_high", lambda v: (v * 1e9).half(), "range_high: wanted finite"),
    "codes in floats": (
        "0.weight_fake_quant.qrange",
        lambda v: v.half(),
        r"qrange: wanted torch.int32, as it was saved",
    ),
    "step in floats": (
        "2.activation_fake_quant.step",
        lambda v: v.float(),
        "step: wanted torch.int64, as it was saved",
    ),
    "scale in integers": ("0.weight_fake_quant.scale", lambda v: v.int(), "scale: wanted torch.float32"),
    "no such codes": ("0.weight_fake_quant.qrange", lambda v: v + 1, "qrange: wanted codes"),
    "another shape": ("0.weight_fake_quant.scale", lambda v: v[:2], "size mismatch for 0.weight_fake_quant.scale"),
    "a key less": ("0.weight_fake_quant.step", None, "got a checkpoint without step"),
    "a key more": ("0.weight_fake_quant.zero_point", lambda _: torch.zeros(6), "Unexpected key"),
}


@pytest.mark.parametrize(("key", "change", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("assign", (False, True), ids=("", "assign"))
def test_a_refused_quantizer_keeps_what_it_had(key: str, change: Any, message: str, assign: bool) -> None:
    """Range, bits and codes, though all else of the dict is there."""
    net, state = used(), used().state_dict()
    state = {name: 2 * v if v.is_floating_point() and not name.endswith("eps") else v for name, v in state.items()}
    if change is None:
        del state[key]
    else:
        state[key] = change(state.get(key))
    prefix = key.rpartition(".")[0] + "."
    before = {name: v for name, v in values(net).items() if name.startswith(prefix)}
    with pytest.raises(RuntimeError, match=message):
        net.load_state_dict(state, assign=assign)
    now = net.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    quantizer = net.get_submodule(prefix[:-1])
    assert quantizer.initialized and quantizer.bits == 4 and quantizer.qrange.tolist() == list(quantizer.codes)


def test_other_bits_come_with_a_word() -> None:
    """The model becomes the checkpoint's network; one warning a load says so, but where bits are data."""
    net = used(bits=4)
    for _ in range(2):
        other = network(3)
        with pytest.warns(
            UserWarning, match="'0.weight_fake_quant': the checkpoint has 4 bits, and .* had 3"
        ) as caught:
            other.load_state_dict(net.state_dict())
        assert len(caught) == 1 and torch.equal(other.eval()(X), copy.deepcopy(net).eval()(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(net.state_dict())  # it has these bits by now
        fastqat.set_bit_widths(other, {"*": (3, 3)})
        other.load_state_dict(net.state_dict())
        other = network(3)
        fastqat.AdaQAT(other, lam=0.1, fixed=[])
        other.load_state_dict(net.state_dict())
    assert fastqat.bit_widths(other) == fastqat.bit_widths(net)


def test_a_scale_that_was_written_is_the_range() -> None:
    """A copy without a range takes one that something wrote into its tensors, as a load would."""
    net, other = used(), network()
    with torch.no_grad():
        for mine, value in zip(other.state_dict().values(), net.state_dict().values(), strict=True):
            mine.copy_(value)
    assert torch.equal(other.eval()(X), net.eval()(X)) and all(known(other))


def test_a_nan_that_was_written_is_refused_in_evaluation() -> None:
    """One that the quantizer left itself is none: the first tensor sets the range."""
    for written in (False, True):
        fq = FakeQuant(4).eval()
        if written:
            with torch.no_grad():
                fq.scale.mul_(2)
            with pytest.raises(ValueError, match=r"quantizer of layer '\?': scale: wanted a range; got NaN"):
                fq(X)
            with pytest.raises(ValueError, match="scale: wanted a range"):
                copy.deepcopy(fq)(X)
        else:
            assert copy.deepcopy(fq).to(torch.float64)(X).isfinite().all() and fq(X).isfinite().all()
