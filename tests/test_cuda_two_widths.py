"""The CUDA kernels of the ops on two bit-widths, on the CPU: in every order of threads and blocks, at edges of memory.

What they compute is for test_two_widths.py to judge, which runs over them as well.
"""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import GridCase, random
from cuda_on_host import machine
from cuda_on_host.machine import Schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_on_host import SCHEDULES, assert_equal_bits, edged, grid_cases, ops, schedules
from test_cuda_on_host import fresh_memory_is_nan as fresh_memory_is_nan
from test_two_widths import check_backward, check_forward, check_pair
from torch import Tensor
from two_widths_cases import Weight, weight_of

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_memory_is_nan")
GRIDS = (torch.tensor([[0.3], [0.1]]), None, None, torch.tensor([[-4, 3], [-8, 7]], dtype=torch.int32), None, 0.0)


def weight_of_pieces(count: int, shift: int, dtype: torch.dtype) -> tuple[Tensor, Weight]:
    """g and a weight, both `shift` elements off a vector's begin; ties lie in some pieces, others have none."""
    g, x = random((count + shift,), 1), random((count + shift,), 2).clamp(-2, 2)
    x[::11], g[::7] = 0.5, 1e4
    x[shift + 1], x[-1] = torch.nan, torch.inf
    return g.to(dtype)[shift:], weight_of("pieces", x.to(dtype)[shift:], plain=True)


def results_of(g: Tensor, weight: Weight) -> list[Tensor]:
    """What the three ops write: sums and two values, two values, dx."""
    x, extremes = weight.x, (weight.low, weight.high)
    sums, made = torch.full((2, 2), 91), [torch.empty_like(x) for _ in range(5)]
    ops.dorefa_fake_quantize(x, *extremes, weight.qmax, sums, *made[:2])
    ops.fake_quantize_two_widths(x, *GRIDS, *made[2:4])
    ops.dorefa_fake_quantize_backward(g, x, *extremes, torch.tensor([0.3]), made[4])
    return [sums, *made]


@pytest.mark.parametrize(("count", "shift", "dtype"), [(20_011, 0, torch.float32), (9001, 1, torch.bfloat16)])
def test_same_bits_in_every_order(count: int, shift: int, dtype: torch.dtype) -> None:
    """Values, sums of codes, and a gradient whose sum shows every order of additions."""
    g, weight = weight_of_pieces(count, shift, dtype)
    runs = []
    for schedule in SCHEDULES:
        machine.kernels().set(schedule)
        runs.append(results_of(g, weight))
    assert_equal_bits(runs, f"{count} elements of {dtype}")


@settings(max_examples=60)
@given(case=grid_cases(most=8000), number=st.integers(0, 500), end=st.booleans(), schedule=schedules)
def test_any_weight(case: GridCase, number: int, end: bool, schedule: Schedule) -> None:
    """Right, and nothing else is touched, for whatever comes."""
    (x,) = edged([case.x], end=end)
    weight = weight_of(f"{case.label} {schedule} end {end}", x, number)
    with machine.use_cuda_on_host(schedule):
        check_forward(weight, "cpu", number)
        check_backward(weight, "cpu", number)
        check_pair(case._replace(x=x), "cpu", number)


@pytest.mark.parametrize("scales", [(0.3, 1e-42), (1e-42, 0.3)])
def test_one_scale_that_must_be_divided_by(scales: tuple[float, float]) -> None:
    """The reciprocal of one of them is infinite."""
    machine.kernels().set(SCHEDULES[0])
    x, results = random((300,), 3), [torch.empty(300), torch.empty(300)]
    ops.fake_quantize_two_widths(x, torch.tensor(scales)[:, None], *GRIDS[1:], *results)
    wants = [
        oracle.fake_quantize(x, torch.tensor([s]), None, None, q, None, 0.0, None)[0]
        for s, q in zip(scales, GRIDS[3], strict=True)
    ]
    oracle.assert_results(("first", "second"), results, wants, (x,), str(scales))


def test_few_launches() -> None:
    """One each, and one more for what passes through the largest magnitude."""
    kernels = machine.kernels()
    g, weight = weight_of_pieces(9001, 0, cases.DTYPES[0])
    before = kernels.launches()
    results_of(g, weight)
    assert kernels.launches() == before + 1 + 1 + 2
