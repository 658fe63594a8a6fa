"""range_search where its candidates are many, and its channels too short or too long for one way of summing."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import device_of, random
from oracle import assert_results

BACKENDS = ("reference", "cpu", "cuda-on-host", "cuda")
NAMES = ("errors",)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("shape", "axis"), [((9000,), None), ((12, 9), 0), ((530, 3), 1), ((5, 3, 40), 1)], ids=str)
def test_many_candidates(backend: str, shape: tuple[int, ...], axis: int | None) -> None:
    """131 candidates, one of them NaN, each with the error that it has alone; NaN and Inf in x count in none."""
    x = random(shape, 1)
    x.view(-1)[[5, 7]] = torch.tensor([torch.inf, torch.nan])
    channels = 1 if axis is None else shape[axis]
    scales, zeros = random((131, channels), 2).abs() * 0.3 + 0.01, random((131, channels), 3) * 4 + 7
    scales[64] = torch.nan
    arguments = (x, scales, zeros, torch.tensor([0, 15], dtype=torch.int32), axis)
    there = [a.to(device_of(backend)) if isinstance(a, torch.Tensor) else a for a in arguments]
    errors = torch.ops.fastqat.range_search(*there)
    assert_results(NAMES, (errors.cpu(),), oracle.range_search(*arguments), arguments, f"shape {shape} axis {axis}")
