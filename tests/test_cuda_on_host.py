"""The CUDA kernels on the CPU: the same bits in whatever order threads and blocks run, and no byte touched elsewhere.

What they compute is for test_conformance.py and the tests of the ops on many tensors to judge, which run over them.
Here new memory is NaN, and tensors lie next to pages that nobody may touch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import cases
import many_tensors
import pytest
import torch
from cases import Call, GridCase, grid_call
from cuda_on_host import build, machine
from cuda_on_host.machine import Schedule
from cuda_on_host.memory import at_the_edge, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from many_tensors import LEARNINGS, STATE, Weight, assert_same, case_of, differentiate, move, with_random_state
from test_conformance import GRID_OPS, check
from test_multi_tensor_gradients import check_gradients
from torch import Tensor

from fastqat.ops import estimators, multi_tensor, schema

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_memory_is_nan")
ops = getattr(torch.ops, machine.NAMESPACE)
MANY = 2**31 - 1
SCHEDULES = (
    *(Schedule(order, most_blocks=most) for order in machine.ORDERS[:2] for most in (MANY, 1, 3)),
    *(Schedule("random", seed, most) for seed, most in enumerate((MANY, MANY, MANY, MANY, MANY, MANY, 3, 2))),
)
# Long rows of one or several pieces, short rows, columns, with tails and without vectors; and no elements at all.
SHAPES = (
    *(((20_011,), None), ((3, 9001), 0), ((2, 5, 1500), 1), ((41, 70), 0), ((130, 33), 0), ((3, 130, 7), 1)),
    *(((3001, 3), 1), ((700, 2, 9), 1), ((2, 300, 1), 1), ((37, 600), 1), ((5, 0), 0), ((0, 5), 1), ((0, 3), 0)),
)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Poison what is not written; skip where the kernels cannot be built."""
    if reason := build.why_not():
        pytest.skip(reason)
    with poisoned():
        assert torch.empty(5000).isnan().all(), "the C library does not poison its memory"
        yield


def edged(value: object, *, end: bool) -> object:
    """The same argument, every tensor in it at the edge of its memory."""
    if isinstance(value, Tensor):
        return at_the_edge(value, end=end)
    return [edged(v, end=end) for v in value] if isinstance(value, list) else value


def bits(t: Tensor) -> Tensor:
    """What tells every value from every other; all NaN are one."""
    return (t.where(~t.isnan(), torch.nan) if t.is_floating_point() else t).contiguous().view(torch.uint8)


def assert_equal_bits(runs: list[list[Tensor]], label: str) -> None:
    """All runs, one for each of SCHEDULES, have given the same."""
    for schedule, results in zip(SCHEDULES, runs, strict=True):
        for number, (first, now) in enumerate(zip(runs[0], results, strict=True)):
            differ = (bits(first) != bits(now)).sum()
            assert not differ, f"{label}: result {number}: {differ} bytes differ in {schedule}"


def ordinary_call(op: str, shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, number: int) -> Call:
    """A call with ordinary values, some of them special."""
    if op in cases.PLAIN_OPS:
        calls = list(cases.plain_calls(op))
        return calls[(7 * number + 5) % len(calls)]
    grids = [g for g in cases.GRIDS if g.name in ("signed4", "affine4", "offset8", "fractional2")]
    case = case_of(shape, axis, grids[number % 4], dtype, "contiguous")
    move(case, number)
    return grid_call(op, case, number)


@pytest.mark.parametrize("op", schema.OPS)
def test_same_bits_in_every_order(op: str) -> None:
    """By ascending, descending and random threads and blocks, and on 1 block, 3 or as many as there is work for."""
    kernels = machine.kernels()
    for number, ((shape, axis), dtype) in enumerate(zip(SHAPES, itertools.cycle(cases.DTYPES), strict=False)):
        arguments = ordinary_call(op, shape, axis, dtype, number).arguments
        runs = []
        for schedule in SCHEDULES:
            kernels.set(schedule)
            results = [torch.empty_like(r) for r in schema.OPS[op].allocate(*arguments)]
            getattr(ops, f"{op}_out")(*arguments, *results)
            runs.append(results)
        assert_equal_bits(runs, f"{shape} axis {axis} {dtype}")
        fresh = getattr(ops, op)(*arguments)
        for first, now in zip(runs[0], [fresh] if isinstance(fresh, Tensor) else fresh, strict=True):
            assert bits(first).equal(bits(now)) and first.stride() == now.stride()


schedules = st.builds(
    Schedule, st.sampled_from(machine.ORDERS), st.integers(0, 2**31), st.sampled_from((MANY, 1, 2, 5))
)
sizes = st.one_of(st.integers(0, 9), st.sampled_from((16, 31, 33, 64, 127, 256, 257, 1025, 4097)))


@st.composite
def grid_cases(draw: st.DrawFn, most: int = 20_000, fewest_dims: int = 0) -> GridCase:
    """Tensors of few dimensions, of every layout and granularity, every scale and special values among theirs."""
    shape: tuple[int, ...] = ()
    for size in draw(st.lists(sizes, min_size=fewest_dims, max_size=4)):
        shape += (max(0, min(size, most // max(1, torch.Size(shape).numel()))),)
    axis = draw(st.one_of(st.none(), st.sampled_from(range(len(shape))))) if shape else None
    grid, dtype = draw(st.sampled_from(cases.GRIDS)), draw(st.sampled_from(cases.DTYPES))
    channels = 1 if axis is None else shape[axis]
    scales, eps = draw(st.sampled_from(cases.SCALE_SETS))
    scale, zero, offset = cases.grid_tensors(grid, tuple(itertools.islice(itertools.cycle(scales), channels)), eps)
    values = cases.random(shape, draw(st.integers(0, 99))) * (0.3 * (grid.qmax - grid.qmin) * scales[0])
    x = values.to(dtype)
    odd = cases.specials(dtype)
    odd = odd[(odd == 0) | ~(odd.abs() < 1e-37)]  # a sum of subnormals alone has too few bits for the law of sums
    x.view(-1)[::7] = odd.repeat(x.numel() // len(odd) + 1)[: -(-x.numel() // 7)]
    layout = draw(st.sampled_from(cases.LAYOUTS))
    laid_out = cases.with_layout(x, layout)
    qrange = torch.tensor([grid.qmin, grid.qmax], dtype=torch.int32)
    label = f"{shape} axis {axis} {layout} {grid.name} {dtype}"
    return GridCase(label, x if laid_out is None else laid_out, scale, zero, offset, qrange, axis, eps)


@pytest.mark.parametrize("op", GRID_OPS)
def test_any_tensor(op: str) -> None:
    """Values are right and nothing else is touched, for whatever comes."""

    @settings(max_examples=100)
    @given(case=grid_cases(), number=st.integers(0, 11), end=st.booleans(), schedule=schedules)
    def judge(case: GridCase, number: int, end: bool, schedule: Schedule) -> None:
        if op == "range_search":  # the error of no elements is 0, but with a scale of NaN not that of the oracle
            case = case._replace(scale=case.scale.nan_to_num(0.3))
        call = grid_call(op, case, number)
        call = Call(f"{call.label} number {number} {schedule}", edged(list(call.arguments), end=end))
        with machine.use_cuda_on_host(schedule):
            check(op, call, machine.NAME, number, both_forms=False)

    judge()


@pytest.mark.parametrize("op", cases.PLAIN_OPS)
def test_any_codes(op: str) -> None:
    """The same for the ops without a grid."""
    for number, call in enumerate(list(cases.plain_calls(op))[:: 1 if op == "philox_uniform" else 11]):
        call = Call(call.label, edged(list(call.arguments), end=number % 2 == 0))
        with machine.use_cuda_on_host(SCHEDULES[number % len(SCHEDULES)]):
            check(op, call, machine.NAME, number, both_forms=False)


def some_weights(numbers: list[int]) -> list[Weight]:
    """Weights of the shapes above in the middle of their training."""
    grids = [g for g in cases.GRIDS if g.name in ("signed4", "affine2", "offset4", "fractional8", "restricted4")]
    weights = []
    for number in numbers:
        shape, axis = SHAPES[number % len(SHAPES)]
        case = case_of(shape, axis, grids[number % 5], cases.DTYPES[number % 3], "contiguous")
        move(case, number)
        weights.append(with_random_state(case, number))
    return weights


def at_edges(op: str, *, end: bool):
    """An op on many tensors, which are copied to the edges of their memory, and back from there."""

    def run(*arguments: object) -> None:
        there = [edged(a, end=end) for a in arguments]
        getattr(ops, op)(*there)
        for mine, theirs in zip(arguments, there, strict=True):
            for a, b in zip(mine, theirs, strict=True) if isinstance(mine, list) else ():
                if isinstance(a, Tensor) and 0 not in a.stride():  # what is expanded is not written
                    a.copy_(b)

    return run


def test_many_weights_in_every_order() -> None:
    """Evaluated, then trained: outputs, states and gradients have the same bits, and are those of the definition."""
    numbers = [*range(13), 30, 31, 47]
    first = some_weights(numbers)
    for w in first[3::4]:
        w.state[4][1] = 44  # nothing moves in this step, for those alone
    gs = [cases.incoming(w.case, number) for number, w in enumerate(first)]
    learnings = [LEARNINGS[number % len(LEARNINGS)] for number in numbers]
    thresholds = [(0.0, 0.3, 0.05)[number % 3] for number in numbers]
    runs = []
    for number, schedule in enumerate(SCHEDULES):
        machine.kernels().set(schedule)
        weights, end = [w.twin() for w in first], number % 2 == 0
        forward = at_edges("multi_tensor_fake_quantize", end=end)
        results = [y for now in (False, True) for y in many_tensors.quantize(forward, weights, 44, thresholds, now)]
        backward = at_edges("multi_tensor_fake_quantize_backward", end=end)
        gradients = differentiate(backward, weights, gs, learnings, 44)
        runs.append([*results, *(s for w in weights for s in w.state), *itertools.chain(*gradients)])
    assert_equal_bits(runs, "many weights")
    define, count = multi_tensor.multi_tensor_fake_quantize, len(first)
    for i, w in enumerate(first):
        wants = [many_tensors.quantize(define, [w], 44, thresholds[i : i + 1], now)[0] for now in (False, True)]
        got = [runs[0][i], runs[0][count + i], *runs[0][2 * count + 5 * i :][:5]]
        assert_same(("evaluated", "y", *STATE), got, [*wants, *w.state], w.case.label)


@settings(max_examples=80)
@given(
    drawn=st.lists(st.tuples(grid_cases(most=3000, fewest_dims=1), st.integers(0, 59)), min_size=1, max_size=5),
    end=st.booleans(),
    schedule=schedules,
)
def test_any_weights(drawn: list[tuple[GridCase, int]], end: bool, schedule: Schedule) -> None:
    """Whatever weights come together, in whatever state: each has its own outputs, state and gradients."""
    machine.kernels().set(schedule)
    learnings = [LEARNINGS[number % len(LEARNINGS)] for _, number in drawn]
    weights = []
    for (case, number), learning in zip(drawn, learnings, strict=True):
        w = with_random_state(case, number)
        w.tensor_id = number if learning.estimator == estimators.STOCHASTIC else -1
        w.momentum *= number % 7 > 1  # some are not tracked
        weights.append(w if w.momentum else dataclasses.replace(w))
    gs = [cases.incoming(case, number) for case, number in drawn]
    thresholds = [(0.0, 0.3, 0.05)[number % 3] for _, number in drawn]
    twins = [w.twin() for w in weights]
    forward = at_edges("multi_tensor_fake_quantize", end=end)
    ys = many_tensors.quantize(forward, weights, 44, thresholds)
    backward = at_edges("multi_tensor_fake_quantize_backward", end=end)
    gradients = differentiate(backward, weights, gs, learnings, 44)
    for i, (w, twin, g, learning) in enumerate(zip(weights, twins, gs, learnings, strict=True)):
        label = f"{w.case.label} {learning} {schedule}"
        (y,) = many_tensors.quantize(multi_tensor.multi_tensor_fake_quantize, [twin], 44, thresholds[i : i + 1])
        assert_same(("y", *STATE), [ys[i], *w.state], [y, *twin.state], label)
        (want,) = differentiate(multi_tensor.multi_tensor_fake_quantize_backward, [twin], [g], [learning], 44)
        check_gradients(gradients[i], want, twin, g, learning, label)


def test_one_launch_for_all_weights() -> None:
    """53 weights take one launch forward, and one backward; an empty list none."""
    kernels = machine.kernels()
    grid = next(g for g in cases.GRIDS if g.name == "signed4")
    weights = [Weight(case_of((8 + k, 27), 0, grid, torch.float32, "contiguous"), 0.1) for k in range(53)]
    for k, w in enumerate(weights):
        move(w.case, k)
    before = kernels.launches()
    many_tensors.quantize(ops.multi_tensor_fake_quantize, weights, 0, [0.1] * 53)
    assert kernels.launches() == before + 1
    gs = [cases.random(tuple(w.case.x.shape), 3) for w in weights]
    differentiate(ops.multi_tensor_fake_quantize_backward, weights, gs, [LEARNINGS[0]] * 53, 0)
    assert kernels.launches() == before + 2
