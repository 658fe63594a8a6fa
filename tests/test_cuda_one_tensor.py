"""The CUDA kernels of the ops on one tensor, on the CPU: in every order of threads and blocks, and at edges of memory.

What they compute is for test_one_tensor.py to judge, which runs over them as well.
"""

from __future__ import annotations

from dataclasses import replace

import cases
import one_tensor_cases as one
import oracle
import pytest
import torch
from cases import GridCase, random
from cuda_on_host import machine
from cuda_on_host.machine import Schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from one_tensor_cases import Case
from test_cuda_on_host import SCHEDULES, assert_equal_bits, edged, grid_cases, ops, schedules
from test_cuda_on_host import fresh_memory_is_nan as fresh_memory_is_nan
from test_one_tensor import arguments_of, before, case_of, random_bits
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_memory_is_nan")
OBSERVED = (torch.inf, -torch.inf)
WANTS_ALL = Case(case_of(torch.empty(0)), 0.8, True, (3, 5, 7), 0.7, OBSERVED, True, True, 5, torch.float32)
# Elements, and how many before them make them begin where no vector may; what is wanted. Tiles of several blocks and
# what is left over, by each kind of kernel; units alone; too short for a tile.
CALLS = (
    (8191, 0, WANTS_ALL),
    (20_011, 0, replace(WANTS_ALL, noise=(-1, 0, 0), code_bits=4)),
    (20_011, 0, Case(WANTS_ALL.grid, extremes=OBSERVED, inside=True, y=torch.float32)),
    (8191, 1, WANTS_ALL),
    (500, 0, WANTS_ALL),
)


def results_of(case: Case) -> list[Tensor]:
    """Memory for what a call wants, with what is in it before."""
    results = []
    for name, want in zip(one.RESULTS, one.fake_quantize_tensor(case), strict=True):
        held = before(name, case, want)
        results.append(torch.empty_like(want) if held is None else held)
    return results


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("number", range(len(CALLS)))
def test_same_bits_in_every_order(number: int, dtype: torch.dtype) -> None:
    """Values, extremes, counts, bits, codes; gradients from those bits; values from those codes."""
    kernels = machine.kernels()
    count, shift, wanted = CALLS[number]
    x = random((count + shift,), number).mul_(2)
    x[::7] = cases.specials(torch.float32).repeat(count)[: len(x[::7])]
    case = replace(wanted, grid=case_of(x.to(dtype)[shift:]), y=dtype)
    g, everything = random((count,), 9).to(dtype), torch.full((count // 8 + 1,), 255, dtype=torch.uint8)
    arguments = arguments_of(case, "cpu")
    runs = []
    for schedule in SCHEDULES:
        kernels.set(schedule)
        results = results_of(case)
        ops.fake_quantize_tensor(*arguments, *results)
        dx, dscale, again = torch.empty(count, dtype=dtype), torch.empty(1), torch.empty(count, dtype=dtype)
        ops.fake_quantize_tensor_backward(g, results[3], everything, case.grid.qrange, dx, dscale)
        if case.code_bits:
            ops.dequantize_tensor(results[5], *arguments[1:6], case.code_bits, again)
        runs.append([*results, dx, dscale, again])
    assert_equal_bits(runs, f"{case.label}, {count} elements")


def per_tensor(case: GridCase) -> GridCase:
    """The same tensor on the grid of its first channel."""
    grid = [t if t is None else t[:1] if t.numel() else torch.tensor([0.3]) for t in case[2:5]]
    return GridCase(case.label, case.x, *grid, case.qrange, None, case.eps)


@settings(max_examples=60)
@given(case=grid_cases(most=8000), number=st.integers(0, 500), end=st.booleans(), schedule=schedules)
def test_any_tensor(case: GridCase, number: int, end: bool, schedule: Schedule) -> None:
    """Right, and nothing else is touched, for whatever comes: forward, backward, and values of the codes."""
    machine.kernels().set(schedule)
    call = one.varied(per_tensor(case), number) if number % 5 else one.plain(per_tensor(case), number)
    wants, label = one.fake_quantize_tensor(call), f"{call.label} {schedule} end {end}"
    results = edged(results_of(call), end=end)
    ops.fake_quantize_tensor(*edged(arguments_of(call, "cpu"), end=end), *results)
    oracle.assert_results(one.RESULTS, results, wants, call.grid[1:], label)

    g, x, qrange = cases.incoming(case, number), call.grid.x, call.grid.qrange
    qmax, learned, dx = int(qrange[1]), number % 3 != 0, torch.empty_like(x)
    inside, above = random_bits(x.numel(), number), random_bits(x.numel(), number + 1)
    gradients = one.fake_quantize_tensor_backward(g, inside, above, qmax, dx, learned)
    given_bits = (inside, above if learned else above[:0])
    made = edged([dx, torch.empty(int(learned))], end=end)
    ops.fake_quantize_tensor_backward(*edged([g, *given_bits, qrange], end=end), *made)
    oracle.assert_results(("dx", "dscale"), made, gradients, (g,), label)

    bits = call.code_bits or int(qrange[1] - qrange[0]).bit_length()
    packed = random_bits(x.numel() * bits, number + 2)
    (y,) = edged([torch.empty_like(x)], end=end)
    ops.dequantize_tensor(*edged([packed, *arguments_of(call, "cpu")[1:6]], end=end), bits, y)
    oracle.assert_results(
        ("y",), (y,), (one.dequantize_tensor(packed, call.grid, bits, x.dtype),), call.grid[1:], label
    )


def test_one_launch_each() -> None:
    """None of the ops takes more than one, whatever is asked for."""
    kernels = machine.kernels()
    case = replace(WANTS_ALL, grid=case_of(random((8191,), 1)))
    results, dx = results_of(case), torch.empty(8191)
    before_all = kernels.launches()
    ops.fake_quantize_tensor(*arguments_of(case, "cpu"), *results)
    ops.fake_quantize_tensor_backward(dx, results[3], results[4], case.grid.qrange, dx, torch.empty(1))
    ops.dequantize_tensor(results[5], *arguments_of(case, "cpu")[1:6], case.code_bits, dx)
    assert kernels.launches() == before_all + 3
