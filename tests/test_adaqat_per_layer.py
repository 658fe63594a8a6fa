"""AdaQAT with widths for each layer: two passes a step find the difference of each."""

from __future__ import annotations

import copy
import json
import math
import random
import statistics

import pytest
import torch
from adaqat_networks import Table, batches, prepared, table, train
from test_adaqat_probe import assert_same, kept, middle
from torch import Tensor

import fastqat
from fastqat.adaqat.differences import EachAlone, ManyAtOnce
from fastqat.adaqat.widths import Width

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 4
WEIGHTS = [0.5, 16.0, 1.0, 2.0]  # power of the noise of each weight at 0 bits
ACTIVATIONS = [1.0, 1.0, 0.0, 4.0]


def loss(bits: list[tuple[int, int]]) -> float:
    return sum(w * 4.0**-b + a * 4.0**-c for w, a, (b, c) in zip(WEIGHTS, ACTIVATIONS, bits, strict=True))


def differences(bits: int) -> list[float]:
    """Of each width alone, between so many bits and one less."""
    return [power * (4.0**-bits - 4.0 ** -(bits - 1)) for power in WEIGHTS + ACTIVATIONS]


def still(model: Table, **options: int) -> fastqat.AdaQAT:
    """Widths that are measured and do not move."""
    return fastqat.AdaQAT(model, lam=0.0, lr_weight=0.0, lr_activation=0.0, per_layer=True, **options)


def run(model: Table, steps: int, widths: fastqat.AdaQAT) -> None:
    for _ in range(steps):
        widths.step(model.closure(), model.closure)


def rms(one: list[float], two: list[float]) -> float:
    return statistics.fmean((a - b) ** 2 for a, b in zip(one, two, strict=True)) ** 0.5


def estimated(widths: list[Width], steps: int, memory: int, noise: float = 0.0) -> list[list[float]]:
    """The estimates of each step for a loss that is the sum of the parts of all widths, and noise."""
    model, draws = ManyAtOnce(widths, 0, memory), random.Random(0)
    here, found = [width.number.bits for width in widths], []

    def at(bits: list[int]) -> float:
        return loss(list(zip(bits[:LAYERS], bits[LAYERS:], strict=True))) + draws.gauss(0, noise)

    for step in range(steps):
        passes, base = model.choose(step, widths), at(here)
        rises = [
            base - at([width.other if width in chosen else width.number.bits for width in widths]) for chosen in passes
        ]
        found.append(list(model.of(widths, passes, rises).values()))
    return found


def test_estimates_become_the_difference_of_each_width_alone() -> None:
    found = estimated(still(table(loss, LAYERS)).widths, 1500, memory=300)
    errors = [rms(found[step], differences(4)) / statistics.pstdev(differences(4)) for step in (0, 100, 400, 1499)]
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.5 and errors[2] < 0.1 and errors[3] < 0.005


def test_estimates_average_noise() -> None:
    """In the end the error of each is what least squares make of the last 2 * 2 * memory / 2 passes."""
    sigma, memory = 0.01, 200
    found = estimated(still(table(loss, LAYERS)).widths, 1500, memory, sigma)
    errors = [rms(of, differences(4)) for of in found[800::25]]
    passes = 4 * memory  # (sum of f^k)^2 / sum of f^2k
    expected = math.sqrt(2) * sigma / math.sqrt(passes * 0.25 * 0.75)
    assert 0.5 * expected < statistics.fmean(errors) < 1.5 * expected < 0.1 * statistics.pstdev(differences(4))


def test_a_step_takes_two_passes() -> None:
    model, calls = table(loss, LAYERS), []

    def closure() -> Tensor:
        calls.append(1)
        return model.closure()

    widths = still(model)
    for _ in range(20):
        widths.step(model.closure(), closure)
    assert len(calls) == 2 * 20
    assert [width.name for width in widths.widths][::LAYERS] == ["layers.1.weight", "layers.1.activation"]
    assert list(widths.bits().values())[1:-1] == [(4, 4)] * LAYERS, "which leave no trace"


def test_the_first_steps_take_all_widths_of_a_kind_for_alike() -> None:
    model = table(loss, LAYERS)
    widths = still(model)
    run(model, 3, widths)
    found, total = list(widths.history[-1].differences), sum(differences(4))
    assert 0.5 * total > sum(found) > 2 * total
    for kind in (found[:LAYERS], found[LAYERS:]):
        assert statistics.pstdev(kind) < 0.5 * abs(statistics.fmean(kind))


def test_the_mean_of_the_widths_moves_as_one_for_all_does() -> None:
    """Layers that are alike, at the rates of the network: a share of the loss and of the cost has so much more."""
    alike = [table(lambda bits: sum(0.1 * 4.0**-b + 0.2 * 4.0**-c for b, c in bits), LAYERS) for _ in range(2)]
    both = []
    options = {"lr_weight": 8.0, "lr_activation": 4.0, "start_weight": 4.5, "start_activation": 4.5}
    for model, per_layer in zip(alike, (False, True), strict=True):
        widths = fastqat.AdaQAT(model, lam=0.0001, per_layer=per_layer, **options)  # type: ignore[arg-type]
        run(model, 60, widths)
        both.append(widths)
    one, many = both
    for k, kind in enumerate(("weight", "activation")):
        mean = statistics.fmean(width.number.value for width in many.widths if width.kind == kind)
        moved = one.widths[k].number.value - 4.5
        assert mean - 4.5 == pytest.approx(moved, rel=0.1) and moved > 0.1


def test_each_width_ends_about_its_own_balance() -> None:
    """The integer j where a bit less loses more than its share of the cost, and a bit more gains less than that."""
    model, lam = table(loss, LAYERS), 0.004
    rates: dict[str, float] = {"lr_weight": 0.3, "lr_activation": 0.3, "start_weight": 4.5, "start_activation": 4.5}
    widths = fastqat.AdaQAT(model, lam=lam, freeze_after=0, per_layer=True, **rates)  # type: ignore[arg-type]
    run(model, 800, widths)
    ends = [round(width.number.value) for width in widths.widths]
    for k, width in enumerate(widths.widths):
        assert abs(width.number.value - ends[k]) < 0.1
        power, j = (WEIGHTS + ACTIVATIONS)[k], ends[k]
        share = lam / LAYERS * ends[(k + LAYERS) % (2 * LAYERS)]  # its partner has this, or one more
        assert j == 2 or power * 3 * 4.0**-j > share
        assert share + lam / LAYERS > power * 3 * 4.0 ** -(j + 1)
    assert ends[1] > ends[3] > ends[0] and ends[LAYERS + 2] == 2, "and not all alike"


def test_widths_are_frozen_one_by_one() -> None:
    model = table(loss, LAYERS)
    widths = fastqat.AdaQAT(model, lam=0.1, lr_weight=1e-3, lr_activation=1e-3, per_layer=True)
    for k in (2, 5):
        widths.widths[k].number.oscillations = 10
    run(model, 1, widths)
    assert [width.number.frozen for width in widths.widths] == [k in (2, 5) for k in range(2 * LAYERS)]
    values = widths.history[-1].widths
    run(model, 3, widths)
    update = widths.history[-1]
    for k in range(2 * LAYERS):
        assert (update.differences[k] is None) == (k in (2, 5)) == (update.widths[k] == values[k])
    for width in widths.widths:
        width.number.oscillations = 10
    run(model, 2, widths)
    assert widths.is_frozen and len(widths.history) == 5 and not model._forward_pre_hooks


def test_other_neighbours_begin_with_4_times_as_much_or_a_quarter() -> None:
    model = table(loss, LAYERS)
    widths = still(model)
    run(model, 40, widths)
    at_4 = list(widths.history[-1].differences)
    estimates = ManyAtOnce(widths.widths, 0, 1000)
    estimates.load_state_dict(widths.state_dict()["differences"])
    width = widths.widths[1]
    assert estimates.of(widths.widths, [[widths.widths[0]]], [math.nan]) == {}
    assert estimates.estimates == at_4
    width.number.value = 3.0
    estimates.of([width], [], [])
    assert estimates.estimates[1] == 4 * at_4[1] and estimates.estimates[0] == at_4[0]
    assert (estimates.covariance[1] != 0).sum() == 1 and (estimates.covariance[:, 1] != 0).sum() == 1
    width.number.value = 5.0
    estimates.of([width], [], [])
    assert estimates.estimates[1] == at_4[1] / 4
    width.number.value = 3.5
    estimates.of([width], [], [])
    assert estimates.estimates[1] == at_4[1]


def test_a_raised_width_is_one_with_the_other_sign() -> None:
    """At the lower bound a pass gives one bit more; the estimate is that of the bit between both, as from above."""
    widths = still(table(loss, LAYERS, bits=2)).widths
    assert all(width.upper == 3 and width.other == 3 for width in widths)
    found = estimated(widths, 800, memory=100)
    assert rms(found[-1], differences(3)) < 0.01 * statistics.pstdev(differences(3))


def test_draws_follow_from_seed_and_step() -> None:
    widths = [*still(table(loss, LAYERS)).widths]
    draws = [[ManyAtOnce(widths, seed, 10).choose(step, widths) for step in range(200)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(passes) == 2 and all(passes) for passes in draws[0])
    sizes = [len(chosen) for passes in draws[0] for chosen in passes]
    assert statistics.fmean(sizes) == pytest.approx(len(widths) / 4, rel=0.1)
    assert ManyAtOnce(widths, 0, 10).choose(0, widths[3:5]) == [[widths[3]], [widths[4]]]
    assert EachAlone().choose(0, widths) == [[width] for width in widths]


def test_resumed_it_goes_on_bit_for_bit() -> None:
    data = batches(9)

    def begin() -> tuple[torch.nn.Module, fastqat.AdaQAT]:
        model = prepared(dropout=0.2, more=2)
        return model, fastqat.AdaQAT(model, lam=0.5, lr_weight=0.06, lr_activation=0.03, freeze_after=1, per_layer=True)

    one, widths = begin()
    train(one, data[:1])  # ranges
    train(one, data[1:6], widths)
    saved, random_ = copy.deepcopy([one.state_dict(), widths.state_dict()]), torch.get_rng_state()
    train(one, data[6:], widths)
    two, resumed = begin()
    two.load_state_dict(saved[0])
    resumed.load_state_dict(json.loads(json.dumps(saved[1])))
    torch.set_rng_state(random_)
    train(two, data[6:], resumed)
    assert_same(kept(one), kept(two))
    assert resumed.history == widths.history and resumed.state_dict() == widths.state_dict()
    assert len(set(widths.history[-1].widths)) > 4


def test_shared_weights_have_one_width() -> None:
    model, data = prepared(more=3), batches(4)
    model.middle[2]._parameters["weight"] = model.middle[0].weight
    model.middle[2].weight_fake_quant = model.middle[0].weight_fake_quant
    model.middle[1].activation_fake_quant = None
    widths = fastqat.AdaQAT(model, lam=0.5, lr_weight=0.3, lr_activation=0.2, per_layer=True)
    assert {width.name: width.layers for width in widths.widths if width.kind == "weight"} == {
        "middle.0.weight": ["middle.0", "middle.2"],
        "middle.1.weight": ["middle.1"],
        "middle.3.weight": ["middle.3"],
    }
    assert [width.name for width in widths.widths][3:] == [f"middle.{k}.activation" for k in (0, 2, 3)]
    train(model, data, widths)
    bits = widths.bits()
    assert bits["middle.0"][0] == bits["middle.2"][0] and bits["middle.1"][1] == 32
    # Of 4 layers: a bit of the shared weight costs the bits of two activations.
    cost, prices = widths._priced()
    assert cost == sum(w * a for w, a in list(bits.values())[1:-1]) / 4
    assert prices[0] == (bits["middle.0"][1] + bits["middle.2"][1]) / 4
    assert {q.bits for q in middle(model, "weight")} == {bits[f"middle.{k}"][0] for k in range(4)}


def test_a_loss_that_is_not_finite_is_not_learned_from() -> None:
    broken = [False]
    model = table(lambda bits: math.inf if broken[0] else loss(bits), LAYERS)
    widths = fastqat.AdaQAT(model, lam=0.1, per_layer=True)
    run(model, 5, widths)
    before = copy.deepcopy((widths.state_dict()["differences"], [width.number for width in widths.widths]))
    broken[0] = True
    update = widths.step(model.closure(), model.closure)
    assert update is not None and set(update.differences) == {None} and math.isinf(update.loss)
    assert before == (widths.state_dict()["differences"], [width.number for width in widths.widths])
    broken[0] = False
    update = widths.step(model.closure(), model.closure)
    assert update is not None and None not in update.differences
    assert all(math.isfinite(n) for n in update.widths)


def test_wrong_memory() -> None:
    with pytest.raises(ValueError, match="memory: wanted a positive number of steps; got 0"):
        fastqat.AdaQAT(prepared(), lam=0.1, per_layer=True, memory=0)
