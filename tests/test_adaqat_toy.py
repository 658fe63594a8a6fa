"""AdaQAT where the loss is a formula of the bits: what lambda does, and where a width ends that goes to and fro."""

from __future__ import annotations

from typing import Any

import pytest
from adaqat_networks import table

import fastqat

pytestmark = pytest.mark.usefixtures("one_thread")

POWER = 2.0  # of the noise of rounding at 0 bits


def loss(weight: int, activation: int) -> float:
    """The power of the noise of rounding both."""
    return POWER * 4.0**-weight + POWER * 4.0**-activation


def toy(lam: float, steps: int, **options: Any) -> fastqat.AdaQAT:
    model = table(lambda bits: loss(*bits[0]), bits=6)
    widths = fastqat.AdaQAT(model, lam=lam, **options)
    while widths._step < steps and not widths.widths[0].number.frozen:
        widths.step(model.closure(), model.closure)
    return widths


def test_a_larger_lambda_ends_with_fewer_bits_and_to_and_fro_about_their_balance() -> None:
    ends = []
    for lam in (0.0005, 0.002, 0.008):
        widths = toy(lam, 350, lr_weight=0.2 / lam**0.5, lr_activation=0.15 / lam**0.5, freeze_after=0)
        ceilings = [[-int(-update.widths[k] // 1) for update in widths.history[-60:]] for k in (0, 1)]
        ends.append([min(of) for of in ceilings])
        for of, others in (ceilings, ceilings[::-1]):
            j = min(of)
            assert set(of) == {j, j + 1}, "it goes to and fro between two ceilings"
            # About the integer j at which a bit less loses more than it saves, and a bit more gains less than it costs.
            assert loss(j - 1, 0) - loss(j, 0) > lam * min(others)
            assert lam * max(others) > loss(j, 0) - loss(j + 1, 0)
    weights, activations = zip(*ends, strict=True)
    assert weights[0] > weights[1] > weights[2] and activations[0] > activations[1] > activations[2]


def frozen_at(lam: float, lr: float, freeze_after: int, freeze_to: str) -> tuple[int, list[int]]:
    """The bits of a weight beside activations of 6 bits, and all ceilings on the way, from the first oscillation on."""
    options = {"start_weight": 3.125, "lr_weight": lr, "lr_activation": 0.0}
    widths = toy(lam, 400, freeze_after=freeze_after, freeze_to=freeze_to, **options)
    before = [update for update in widths.history if not update.frozen[0]]
    ceilings = [-int(-update.widths[0] // 1) for update in before if update.oscillations[0]]
    frozen = widths.widths[0].number
    assert frozen.frozen and frozen.oscillations == freeze_after
    return frozen.bits, ceilings


def test_a_width_is_frozen_on_the_side_where_it_is_slow() -> None:
    """About j = 3, a bit gains 3/32 = 0.094 below and 3/128 = 0.023 above; its cost is 6 lambda."""
    assert frozen_at(0.027 / 6, 1.0, 4, "ceil")[0] == 4, "it comes down slowly from above, and bounces back there"
    assert frozen_at(0.088 / 6, 1.0, 4, "ceil")[0] == 3, "it climbs slowly from below"


def test_where_each_step_crosses_the_moment_decides_and_the_majority_does_not() -> None:
    """The cost is in the middle of both gains: up and down are the same."""
    lam, lr = 0.0587 / 6, 7.0
    moments = {count: frozen_at(lam, lr, count, "ceil")[0] for count in range(6, 12)}
    assert set(moments.values()) == {3, 4}, "the balance, or one more"
    for count in range(6, 12):
        bits, ceilings = frozen_at(lam, lr, count, "majority")
        last = moments[count]  # the ceiling of the update that froze it
        seen = [*ceilings, last]
        assert bits == max((3, 4), key=lambda of: (seen.count(of), of))
