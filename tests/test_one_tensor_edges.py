"""Ops on one tensor with one scale where a rounding decides, on every backend, by hand."""

from __future__ import annotations

import pytest
import torch
from cases import device_of
from test_conformance import on_backends

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.fastqat
ULP = 2.0**-149  # the smallest number


@on_backends
@pytest.mark.parametrize("qrange", ((0, 15), (-15, 0)))
def test_the_unrounded_mask_has_the_sign_of_the_exact_quotient(backend: str, qrange: tuple[int, int]) -> None:
    """ULP / s is half a ULP and a little more, which rounds away from the bound 0; ULP * RN(1 / s) is half a ULP: 0."""
    scale = 2 - 2.0**-23
    with torch.device(device_of(backend)):
        x = torch.tensor([0.0, -ULP, ULP, -2 * ULP, 2 * ULP, 0.3, -0.3, 0.0])
        grid = (torch.tensor([scale]), None, None, torch.tensor(qrange, dtype=torch.int32), 0.0)
        inside, above = (torch.zeros(1, dtype=torch.uint8) for _ in range(2))
        none, no_bits = torch.empty(0), torch.empty(0, dtype=torch.uint8)
        no_count = torch.empty(0, dtype=torch.int64)
        ops.fake_quantize_tensor(
            x, *grid, 0.0, False, 0, -1, no_count, none, 0, none, none, no_count, inside, above, no_bits, none
        )
    positive, negative = 0b00110100, 0b01001010
    out = negative if qrange[0] == 0 else positive
    assert inside.item() == 0xFF ^ out
    assert above.item() == (positive if qrange[1] == 0 else 0)


@on_backends
def test_alpha_is_a_double(backend: str) -> None:
    """One of 310 elements is just the fraction 0.1 / 31; with alpha in float32 it would be less."""
    with torch.device(device_of(backend)):
        qrange, step = torch.tensor([-15, 15], dtype=torch.int32), torch.tensor([1])
        low, high, gamma, limit, scale = (torch.tensor([v]) for v in (-1.0, 1.0, 0.5, 0.0, 0.0))
        beyond, seen, observed = (torch.tensor([v]) for v in (1, 310, 0))
        interval = (gamma, beyond, seen, observed, limit, scale)
        ops.advance_interval(low, high, qrange, step, False, 10, 0.1, 1e-3, 1e-3, *interval)
    assert (gamma.item(), beyond.item(), seen.item(), observed.item(), limit.item()) == (0.5, 0, 10, 1, 0.5)


@on_backends
def test_a_range_that_comes_again_stays(backend: str) -> None:
    """0.9 v + 0.1 v is not v for each v."""
    moved = 0
    for k in range(20):
        v = torch.tensor([1 + k / 7])
        moved += bool(0.9 * v + (1 - 0.9) * v != v)
        with torch.device(device_of(backend)):
            low, high, new_low, new_high = (torch.tensor([sign * v.item()]) for sign in (-1, 1, -1, 1))
            state = (low, high, new_low, new_high, torch.tensor([0]), torch.ones(1), torch.ones(1))
            ops.advance_range(torch.tensor([0, 15], dtype=torch.int32), torch.tensor([1]), False, 0.9, *state)
        assert (low.item(), high.item(), new_low.item()) == (-v.item(), v.item(), torch.inf)
    assert moved, "no value shows it"
