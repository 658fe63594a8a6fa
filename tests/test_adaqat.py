"""AdaQAT: its equations, its freezing, its costs, what it says of wrong arguments, and how it goes on."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adaqat_networks import Table, batches, bits_on, prepared, table, train
from test_adaqat_probe import GRIDS, assert_same, kept, middle
from test_distributed import free_port, in_two_processes
from torch import nn
from torch.nn import functional as F

import fastqat
from fastqat import QConfig, quantizers
from fastqat.adaqat.bit_width import BitWidth

pytestmark = pytest.mark.usefixtures("one_thread")


def run(model: Table, steps: int, widths: fastqat.AdaQAT) -> None:
    for _ in range(steps):
        widths.step(model.closure(), model.closure)


# N


def test_n_goes_down_the_gradient_within_its_bounds() -> None:
    n = BitWidth(4.0, 0.5, lowest=2, highest=5)
    for gradient, value, bits in ((0.5, 3.75, 4), (1.5, 3.0, 3), (9.0, 2.0, 2), (-0.25, 2.125, 3), (-99.0, 5.0, 5)):
        n.update(gradient)
        assert (n.value, n.bits) == (value, bits)


def test_an_oscillation_is_a_reversal_that_changes_the_ceiling() -> None:
    n = BitWidth(4.5, 1.0, freeze_after=0)
    #        change    N     ceiling  oscillations
    table_ = (
        (-0.25, 4.25, 5, 0),
        (0.25, 4.5, 5, 0),  # a reversal, the same ceiling
        (-0.75, 3.75, 4, 1),
        (-1.0, 2.75, 3, 1),  # another ceiling, the same direction
        (0.5, 3.25, 4, 2),
        (-0.25, 3.0, 3, 3),  # an integer is its own ceiling
        (-1.0, 2.0, 2, 3),
        (-1.0, 2.0, 2, 3),  # the bound stops N, and not the direction that it came in
        (0.5, 2.5, 3, 4),
    )
    for change, value, bits, oscillations in table_:
        n.update(-change)
        assert (n.value, n.bits, n.oscillations) == (value, bits, oscillations)
    assert n.seen == {4: 2, 3: 3, 2: 2} and not n.has_settled


@pytest.mark.parametrize(("freeze_to", "frozen"), [("ceil", 5.0), ("majority", 4.0)])
def test_where_n_is_frozen(freeze_to: str, frozen: float) -> None:
    n = BitWidth(4.25, 1.0, freeze_after=2, freeze_to=freeze_to)
    for change in (-0.5, -0.25, -0.5):  # 3.0
        n.update(-change)
    assert n.oscillations == 0 and not n.seen
    n.update(-0.5)  # 3.5: a reversal, from 3 to 4
    assert n.oscillations == 1 and not n.has_settled
    for change in (0.125, 0.125, -0.125):  # 3.625
        n.update(-change)
    n.update(-0.5)  # 4.125
    assert n.bits == 5 and n.oscillations == 2 and n.has_settled and n.seen == {4: 4, 5: 1}
    n.freeze()
    assert n.value == frozen and n.frozen
    n.update(100.0)
    n.freeze()
    assert n.value == frozen


@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(gradient: float) -> None:
    n = BitWidth(4.5, 0.1)
    n.update(gradient)
    assert n == BitWidth(4.5, 0.1)


# Gradients


def test_both_widths_move_by_equations_2_to_4() -> None:
    losses = {(4, 4): 1.0, (3, 4): 1.5, (4, 3): 1.125}
    model = table(lambda bits: losses[bits[0]])
    widths = fastqat.AdaQAT(model, lam=0.0625, lr_weight=1.0, lr_activation=0.5, start_weight=3.5, start_activation=4)
    update = widths.step(model.closure(), model.closure)
    assert update is not None
    assert (update.loss, update.hardware, update.differences) == (1.0, 16.0, (-0.5, -0.125))
    # N_w: 3.5 - 1.0 (-0.5 + 0.0625 * 4). N_a is an integer: its floor is 3.  4 - 0.5 (-0.125 + 0.0625 * 4)
    assert update.widths == (3.75, 3.9375)
    assert widths.bits()["layers.1"] == (4, 4)


def test_ceilings_reach_the_quantizers() -> None:
    model = table(lambda bits: 0.0)
    widths = fastqat.AdaQAT(model, lam=0.25, lr_weight=1.0, lr_activation=0.5)
    layer = list(model.layers)[1]
    scale = layer.weight_fake_quant.scale.clone()
    assert widths.step(model.closure(), model.closure).widths == (3.0, 3.5)  # type: ignore[union-attr]
    assert (bits_on(layer.weight_fake_quant), layer.weight_fake_quant.bits) == (3, 3)
    assert bits_on(layer.activation_fake_quant) == 4
    assert torch.allclose(layer.weight_fake_quant.scale, scale * 15 / 7)
    assert widths.bits() == {"layers.0": (8, 8), "layers.1": (3, 4), "layers.2": (8, 8)}
    assert widths.step(model.closure(), model.closure).widths == (2.0, 3.125)  # type: ignore[union-attr]


def test_at_the_lower_bound_the_difference_is_that_of_one_bit_more() -> None:
    losses = {2: 1.0, 3: 0.25}
    model = table(lambda bits: losses[bits[0][0]])
    widths = fastqat.AdaQAT(model, lam=0.125, lr_weight=0.5, lr_activation=0.0, start_weight=2)
    update = widths.step(model.closure(), model.closure)
    assert update is not None and update.differences[0] == -0.75
    assert update.widths[0] == 2.0 - 0.5 * (-0.75 + 0.125 * 4)
    losses[3] = 0.75
    widths = fastqat.AdaQAT(model, lam=0.125, lr_weight=0.5, lr_activation=0.0, start_weight=2)
    assert widths.step(model.closure(), model.closure).widths[0] == 2.0  # type: ignore[union-attr]


def test_an_update_in_one_step_of_so_many() -> None:
    model = table(lambda bits: 0.0)
    widths = fastqat.AdaQAT(model, lam=0.1, every=3)
    made = [widths.step(model.closure(), model.closure) is not None for _ in range(7)]
    assert made == [True, False, False, True, False, False, True]
    assert [update.step for update in widths.history] == [1, 4, 7]


@pytest.mark.parametrize("wrong", ["here", "weight"])
def test_a_loss_that_is_not_finite_moves_nothing(wrong: str) -> None:
    """The history has it; a pass that diverges says nothing of its own width alone."""
    model = table(lambda bits: math.nan if bits == [(4, 4)] and wrong == "here" or bits == [(3, 4)] else 0.0)
    widths = fastqat.AdaQAT(model, lam=0.5, lr_weight=0.1, lr_activation=0.1)
    update = widths.step(model.closure(), model.closure)
    assert update is not None
    assert update.differences == ((None, None) if wrong == "here" else (None, 0.0))
    assert update.widths == ((4.0, 4.0) if wrong == "here" else (4.0, 3.8))
    assert math.isnan(update.loss) == (wrong == "here")


# Freezing


def chattering(**options: Any) -> fastqat.AdaQAT:
    """A weight's width about 3 that goes down slowly and up in a bound, and one of activations that moves slower."""
    model = table(lambda bits: 2.0 * 4.0 ** -bits[0][0] + 2.0 * 4.0 ** -bits[0][1])
    options = {"lam": 0.01, "lr_weight": 2.0, "lr_activation": 1.0, "freeze_after": 3, **options}
    widths = fastqat.AdaQAT(model, **options)
    run(model, 300, widths)
    return widths


def test_each_width_is_frozen_by_itself() -> None:
    widths = chattering()
    frozen = [[update.frozen[k] for update in widths.history].index(True) for k in (0, 1)]
    assert frozen[0] != frozen[1] and widths.is_frozen
    first = min(frozen)
    k = frozen.index(first)
    assert [update.oscillations[k] for update in widths.history][first] == 3
    assert widths.history[first].differences[k] is not None
    assert all(update.differences[k] is None for update in widths.history[first + 1 :]), "no pass for what is frozen"
    assert len({update.widths[k] for update in widths.history[first:]}) == 1
    assert widths.history[-1].step == max(frozen) + 1, "then there are no updates"


def test_both_are_frozen_at_once() -> None:
    widths = chattering(freeze="both")
    assert widths.is_frozen and all(update.frozen == (False, False) for update in widths.history[:-1])
    assert widths.history[-1].frozen == (True, True)
    assert min(widths.history[-1].oscillations) == 3 < max(widths.history[-1].oscillations)


def test_0_freezes_none() -> None:
    widths = chattering(freeze_after=0)
    assert widths.history[-1].step == 300 and max(widths.history[-1].oscillations) > 10


def test_what_comes_after_freezing_is_plain_training() -> None:
    """No pass, no hook, and the same bits as a copy that knows nothing of AdaQAT."""
    model, data = prepared(dropout=0.2), batches(6)
    widths = fastqat.AdaQAT(model, lam=0.1)
    train(model, data[:2], widths)
    assert model._forward_pre_hooks
    for width in widths.widths:
        width.number.oscillations = 10
    train(model, data[2:3], widths)
    assert widths.is_frozen and not model._forward_pre_hooks

    def closure() -> torch.Tensor:
        raise AssertionError("no pass")

    plain, random = copy.deepcopy(model), torch.get_rng_state()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (plain, model)]
    train(plain, data[3:], None, optimizers[0])
    torch.set_rng_state(random)
    for images, labels in data[3:]:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        assert widths.step(loss, closure) is None
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert_same(kept(plain), kept(model))


def test_remove_leaves_the_model_alone() -> None:
    model = prepared()
    widths = fastqat.AdaQAT(model, lam=0.1, start_weight=3)
    widths.remove()
    widths.remove()
    assert not model._forward_pre_hooks and widths.bits()["middle.0"] == (3, 4)


# Costs


def test_costs() -> None:
    config = QConfig(quantizers.lsq(4), quantizers.lsq(4))
    model = fastqat.prepare(
        nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 10), nn.Linear(10, 2), nn.Linear(2, 5)),
        config,
        overrides={"1": QConfig(quantizers.lsq(4), None)},
        first_last_bits=8,
    )
    x = torch.zeros(1, 3)
    model(x + 1)
    seen: list[Any] = []

    def latency(bits: Any) -> float:
        seen.append(dict(bits))
        return {4: 2.0, 3: 1.75}[bits["2"][0]] + 0.125 * bits["1"][0] + (0.25 if bits["2"][1] == 4 else 0.0)

    # bits W, A and weights, as many multiplications:  0: 8, 8, 30;  1: 4, 32, 100;  2: 4, 4, 20;  3: 8, 8, 10
    expected = {
        "product": ((4 * 32 + 4 * 4) / 2, (32 + 4) / 2, 4 / 2),
        "bit_operations": ((64 * 40 + 128 * 100 + 16 * 20) / 160, (32 * 100 + 4 * 20) / 160, 4 * 20 / 160),
        "weight_bits": ((8 * 40 + 4 * 120) / 160, 120 / 160, 0.0),
        latency: (2.75, 0.375, 0.25),
    }
    for cost, (here, of_weight, of_activation) in expected.items():
        copied = copy.deepcopy(model)
        widths = fastqat.AdaQAT(copied, lam=1.0, lr_weight=1 / 32, lr_activation=1 / 64, cost=cost, example_inputs=x)
        update = widths.step(torch.zeros(()), lambda: torch.zeros(()))
        assert update is not None and update.hardware == pytest.approx(here)
        assert update.widths == pytest.approx((4 - of_weight / 32, 4 - of_activation / 64))
    assert {"0": (8, 8), "1": (3, 32), "2": (3, 4), "3": (8, 8)} in seen
    assert {"0": (8, 8), "1": (4, 32), "2": (4, 3), "3": (8, 8)} in seen


def test_fixed_layers_and_shared_quantizers() -> None:
    model = prepared(more=2)
    middle(model, "weight")
    model.middle[2]._parameters["weight"] = model.middle[0].weight
    model.middle[2].weight_fake_quant = model.middle[0].weight_fake_quant
    widths = fastqat.AdaQAT(model, lam=0.1, start_weight=3, start_activation=2, fixed=["*0", "last"])
    assert widths.bits() == {
        "first": (3, 2),
        "middle.0": (4, 4),
        "middle.1": (3, 2),
        "middle.2": (4, 2),  # whose weight a fixed layer has, too
        "last": (8, 8),
    }
    assert [width.layers for width in widths.widths] == [["first", "middle.1"], ["first", "middle.1", "middle.2"]]
    assert fastqat.AdaQAT(model, lam=0.1, start_weight=8, fixed=()).bits()["last"] == (8, 8)


def test_a_network_of_quantized_weights_alone() -> None:
    """One width, one pass, and 32 bits of activations in the cost."""
    model, data = prepared(), batches(1)
    for layer in [model.first, *model.middle, model.last]:
        layer.activation_fake_quant = None
    calls = []
    widths = fastqat.AdaQAT(model, lam=0.25, lr_weight=0.0)
    loss = F.cross_entropy(model(data[0][0]), data[0][1])
    update = widths.step(loss, lambda: calls.append(1) or loss)
    assert update is not None and update.hardware == 4 * 32 and len(update.widths) == len(calls) == 1


# Use


@pytest.mark.parametrize("case", GRIDS)
def test_every_quantizer_learns_its_bits(case: str) -> None:
    model = prepared(*GRIDS[case])
    widths = fastqat.AdaQAT(model, lam=0.5, lr_weight=0.25, lr_activation=0.2, freeze_after=2)
    train(model, batches(8), widths)
    assert all(math.isfinite(update.loss) for update in widths.history)
    assert widths.bits()["middle.0"] == tuple(width.number.bits for width in widths.widths) != (4, 4)
    for part, width in zip(("weight", "activation"), widths.widths, strict=True):
        assert [bits_on(q) for q in middle(model, part)] == [width.number.bits]


def test_resumed_it_goes_on_bit_for_bit() -> None:
    data = batches(8)

    def begin() -> tuple[Any, ...]:
        model = prepared(dropout=0.2)
        widths = fastqat.AdaQAT(model, lam=0.5, lr_weight=0.2, lr_activation=0.1, freeze_after=2, every=2)
        return model, widths, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    one, widths, optimizer = begin()
    train(one, data[:1])  # ranges
    train(one, data[1:5], widths, optimizer)
    saved = copy.deepcopy([part.state_dict() for part in (one, widths, optimizer)])
    random = torch.get_rng_state()
    train(one, data[5:], widths, optimizer)
    two, resumed, other = begin()
    for part, state in zip((two, resumed, other), [saved[0], json.loads(json.dumps(saved[1])), saved[2]], strict=True):
        part.load_state_dict(state)
    assert resumed.bits() == {**widths.bits(), "middle.0": tuple(n.number.bits for n in resumed.widths)}
    torch.set_rng_state(random)
    train(two, data[5:], resumed, other)
    assert_same(kept(one), kept(two))
    assert resumed.history == widths.history and resumed.state_dict() == widths.state_dict()


def test_a_state_of_other_widths_is_refused() -> None:
    widths = fastqat.AdaQAT(prepared(), lam=0.1)
    state = copy.deepcopy(widths.state_dict())
    state["step"] = 9
    del state["widths"]["activation"]
    with pytest.raises(ValueError, match="state: wanted widths weight, activation; got weight"):
        widths.load_state_dict(state)
    assert widths.state_dict()["step"] == 0


def test_backward_after_the_step_is_refused() -> None:
    model, (images, labels) = prepared(), batches(1)[0]
    widths = fastqat.AdaQAT(model, lam=0.1)
    loss = F.cross_entropy(model(images), labels)
    widths.step(loss, lambda: F.cross_entropy(model(images), labels))
    with pytest.raises(RuntimeError, match=r"AdaQAT.step: wanted loss.backward\(\) before it"):
        loss.backward()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lambda": ({"lam": -0.1}, ValueError, "lam: wanted a number of at least 0; got -0.1"),
    "lr": ({"lr_weight": math.nan}, ValueError, "lr_weight: wanted"),
    "lowest": ({"lowest": 0}, ValueError, "lowest: wanted 1 to 8, for the weight of middle.0; got 0"),
    "highest": ({"highest": 9}, ValueError, "highest: wanted 2 to 8, for the weight of middle.0; got 9"),
    "crossed": ({"lowest": 5, "highest": 4}, ValueError, "highest: wanted 5 to 8"),
    "no int": ({"highest": 4.5}, TypeError, "highest: wanted an int"),
    "start": ({"start_weight": 9}, ValueError, "start_weight: wanted bits from lowest to highest, 2 to 8; got 9"),
    "present": (
        {"lowest": 5},
        ValueError,
        "start_weight: wanted bits from lowest to highest, 5 to 8; got 4, the weight of middle.0",
    ),
    "every": ({"every": 0}, ValueError, "every: wanted a positive number of steps; got 0"),
    "freeze_after": ({"freeze_after": -1}, ValueError, "freeze_after"),
    "freeze": ({"freeze": "all"}, ValueError, "freeze: wanted one of 'each', 'both'"),
    "freeze_to": ({"freeze_to": "floor"}, ValueError, "freeze_to: wanted one of 'ceil', 'majority'"),
    "cost": ({"cost": "latency"}, ValueError, "cost: wanted one of 'product'"),
    "no cost": ({"cost": 3}, TypeError, "cost: wanted one of product, bit_operations, weight_bits, or a function"),
    "cost of None": ({"cost": lambda bits: None}, TypeError, "cost: wanted a function .* a number; got NoneType"),
    "cost of NaN": ({"cost": lambda bits: math.nan}, ValueError, "cost: wanted a finite number"),
    "no inputs": (
        {"cost": "bit_operations"},
        ValueError,
        "example_inputs: wanted a batch beside cost='bit_operations'",
    ),
    "pattern": ({"fixed": ["middel.*"]}, ValueError, "fixed: wanted .*middle.0.*'middel"),
    "all fixed": ({"fixed": "*"}, ValueError, "fixed: wanted a quantized layer that is not fixed; got .*first"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    options, kind, message = WRONG[case]
    model = prepared()
    with pytest.raises(kind, match=message):
        fastqat.AdaQAT(model, **{"lam": 0.1, **options})
    assert not model._forward_pre_hooks and middle(model, "weight")[0].bits == 4


def test_grids_without_1_bit() -> None:
    with pytest.raises(ValueError, match="lowest: wanted 2 to 8, for the weight of middle.0; got 1"):
        fastqat.AdaQAT(prepared(quantizers.dorefa_weight(4)), lam=0.1, lowest=1)


def test_models_and_losses_that_it_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"model: wanted a model with quantized layers .* got Linear without"):
        fastqat.AdaQAT(nn.Linear(2, 2), lam=0.1)
    widths = fastqat.AdaQAT(prepared(), lam=0.1)
    with pytest.raises(ValueError, match=r"loss: wanted a scalar; got shape \[2\]"):
        widths.step(torch.zeros(2), lambda: torch.zeros(()))
    with pytest.raises(TypeError, match="loss: wanted a scalar tensor; got float"):
        widths.step(0.5, lambda: torch.zeros(()))  # type: ignore[arg-type]


def _learn_in_a_process() -> None:
    """Batches of its own in each process."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    for per_layer in (False, True):
        model = nn.parallel.DistributedDataParallel(prepared(more=2), broadcast_buffers=False)
        widths = fastqat.AdaQAT(
            model.module, lam=0.5, lr_weight=0.2, lr_activation=0.1, freeze_after=2, per_layer=per_layer
        )
        train(model, batches(5, seed=rank), widths)
        found.append((widths.history, widths.bits()))
    torch.save(found, f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.usefixtures("in_empty_folder")
def test_two_processes_have_the_same_widths() -> None:
    in_two_processes(_learn_in_a_process, port=free_port())
    one, two = (torch.load(f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one == two
    for history, bits in one:
        assert len(history) == 5 and bits["middle.1"] != (4, 4)
