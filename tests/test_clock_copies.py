"""A copy of a prepared model has a clock of its own; no clock keeps a model alive, or its parameters in place."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock_networks import (
    CONFIG,
    STEPS,
    X,
    assert_equal_states,
    backward,
    lora,
    network,
    plain,
    times,
    train,
)
from torch import nn

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def by_pickle(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", (copy.deepcopy, by_pickle))
@pytest.mark.parametrize("lead", (0, 2), ids=("new", "trained"))
def test_a_copy_has_a_clock_of_its_own(copied: Callable[[nn.Module], nn.Module], lead: int) -> None:
    """Trained alone, under LoRA or plainly, it counts its own steps, and the model that it is of counts none."""
    net = network()
    train(net, plain(net), lead)
    twins = [copied(net), copied(nn.ModuleDict({"net": net}))["net"]]  # type: ignore[index]
    train(net, plain(net))
    for twin in twins:
        assert times(twin) == {lead}
        train(twin, plain(twin))
        assert_equal_states(twin, net)
    torch.optim.SGD(lora(twins[0]), lr=0.1).step()
    assert times(twins[0]) == {lead + STEPS + 1} and times(net) == times(twins[1]) == {lead + STEPS}


def test_a_copied_layer_follows_its_weight() -> None:
    """A layer alone knows no model."""
    net: Any = network()
    layer = copy.deepcopy(net[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(X[0])
    optimizer.step()
    assert times(layer) == {1} and times(net) == {0}


def test_a_layer_outlives_its_model() -> None:
    """It follows its weight when the model is gone."""
    net: Any = network()
    layer = net[0]
    del net
    gc.collect()
    layer(X[0])
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert times(layer) == {1}


def test_nothing_is_kept_alive() -> None:
    """Neither the model by its clock, nor by an optimizer that has made steps."""
    net = network()
    optimizer, stranger = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, nn.Linear(2, 2)))
    net(X[0])
    optimizer.step(), stranger.step()
    gone = weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert gone() is None
    stranger.step()


def test_parameters_that_are_swapped() -> None:
    """swap_module_params refuses parameters with a weak reference: no clock of a model has one."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net = network(QConfig(QSpec(3, axis=0, oscillation=Oscillation(0.4, 0.9)), QSpec(4)))
        backward(net, X[0])
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        net.zero_grad()
        net.to(torch.bfloat16)
        assert net[0].weight.dtype == torch.bfloat16 and net[0].weight_fake_quant.scale.dtype == torch.float32
        backward(net, X[0].bfloat16())
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert times(net) == {2}


def test_remove_takes_the_clock_away() -> None:
    """A model that is prepared again has one that works."""
    net = network()
    attributes = set(fastqat.remove(copy.deepcopy(net)).__dict__)
    assert attributes == set(nn.Sequential().__dict__)
    again = fastqat.prepare(fastqat.remove(net), CONFIG)
    train(again, plain(again))
    assert times(again) == {STEPS}


def test_an_older_pickle() -> None:
    """It knows no clock: the quantizer follows the weight that it sees."""
    state = FakeQuant(4).__getstate__()
    del state["clock"], state["by_hand"]
    quantizer, weight = FakeQuant.__new__(FakeQuant), nn.Parameter(torch.ones(3))
    quantizer.__setstate__({**state, "_clock": None, "tracked": False})
    quantizer(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    assert times(quantizer) == {1}
