"""The ops on a weight at two bit-widths, on every backend, against the equations (tests/two_widths_cases.py).

Values and sums of codes are equal; the gradient is too where |x| < max|x|, and within the law where it is the largest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cases
import oracle
import pytest
import torch
import two_widths_cases as two
from cases import device_of, random
from test_conformance import GUARD, guarded, moved, of_dtypes, on_backends
from torch import Tensor
from two_widths_cases import Weight, weight_of

from fastqat.ops import two_widths

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.fastqat
NONE = torch.empty(0)
FORWARD = ("sums", "first", "second")


def assert_all_right(
    names: tuple[str, ...], label: str, pairs: list, wants: tuple, arguments: tuple, guard: int
) -> None:
    """Results are as wanted, and nothing was written before or behind them."""
    oracle.assert_results(names, [result.cpu() for result, _ in pairs], wants, arguments, label)
    for name, (_, buffer) in zip(names, pairs, strict=True):
        ends = torch.cat([buffer[:guard], buffer[buffer.numel() - guard :]])
        assert (ends == 91).all(), f"{label}: {name}: written outside of the result"


def report(failures: list[str], count: int) -> None:
    """Fail with the number of wrong calls and the first ones in full."""
    assert count and not failures, "\n".join([f"{len(failures)} of {count} calls are wrong", *failures[:3]])


def taken(calls: list, backend: str, turn: int) -> list[tuple[int, object]]:
    """The numbered calls of a test; slow backends make some of them, which ones by turns."""
    stride = {"cuda-on-host": 4, "triton": 3}.get(backend, 1)
    return list(enumerate(calls))[turn % stride :: stride]


def results_for(weight: Weight, wants: tuple[Tensor, ...], device: str, guard: int) -> list[tuple[Tensor, Tensor]]:
    """Results that are wrong everywhere, laid out like the weight, in buffers with guards."""
    likes = [torch.empty_like(weight.x, dtype=d) if d else NONE for d in weight.dtypes]
    return [guarded(like.to(device), want, guard) for like, want in zip((wants[0], *likes), wants, strict=True)]


def check_forward(weight: Weight, device: str, number: int) -> None:
    """One call of dorefa_fake_quantize. The sums of a width that is not asked for are anything."""
    wants, guard = two.dorefa_fake_quantize(weight), GUARD[number % 2]
    pairs = results_for(weight, wants, device, guard)
    inputs = (weight.x, weight.low, weight.high, weight.qmax)
    ops.dorefa_fake_quantize(*(moved(t, device) for t in inputs), *(result for result, _ in pairs))
    if weight.sums:
        for k, dtype in enumerate(weight.dtypes):
            if dtype is None or weight.x.numel() == 0:
                pairs[0][0][k] = wants[0][k].to(device)
    assert_all_right(FORWARD, weight.label, pairs, wants, inputs, guard)


def gradient_of(weight: Weight, number: int) -> Tensor:
    """g of any dtype and strides, Inf or NaN among its elements in some."""
    case = cases.GridCase(weight.label, weight.x, NONE, None, None, NONE, None, 0.0)
    g = cases.incoming(case, number)
    if g.numel() > 2 and number % 5 == 3 and g.stride() == torch.empty_like(g).stride():
        g = g.clone().index_put_((torch.tensor(0),), torch.tensor((torch.nan, torch.inf)[number % 2]).to(g))
    return g


def check_backward(weight: Weight, device: str, number: int) -> None:
    """One call of dorefa_fake_quantize_backward."""
    g, factor, guard = gradient_of(weight, number), (1.0, 0.37)[number % 2], GUARD[number % 2]
    want = two.dorefa_fake_quantize_backward(g, weight, factor)
    inputs = (g, weight.x, weight.low, weight.high, torch.tensor([factor] if number % 2 else []))
    pair = guarded(torch.empty_like(weight.x).to(device), want, guard)
    ops.dorefa_fake_quantize_backward(*(moved(t, device) for t in inputs), pair[0])
    assert_all_right(("dx",), f"{weight.label}, g {g.dtype} {g.stride()}", [pair], (want,), inputs, guard)


@pytest.mark.parametrize("check", (check_forward, check_backward), ids=("forward", "backward"))
@of_dtypes
@on_backends
def test_dorefa(backend: str, dtype: torch.dtype, check) -> None:
    """Every shape in every layout; ties of the largest magnitude, all 0, not finite, tiny, far into saturation."""
    failures = []
    calls = taken(list(two.weights(dtype, backend == "triton")), backend, cases.DTYPES.index(dtype))
    for number, weight in calls:
        try:
            check(weight, device_of(backend), number)
        except Exception as error:
            failures.append(f"{weight.label}: {type(error).__name__}: {error}")
    report(failures, len(calls))


@on_backends
def test_dorefa_over_many_pieces_of_work(backend: str) -> None:
    """Sums and ties of all pieces count, whoever does them; the last one is short."""
    x = random((20_011 if backend in ("triton", "cuda-on-host") else 150_003,), 4).clamp(-2.5, 2.5)
    x[torch.arange(0, x.numel(), 997)] = x.abs().max()
    x[-1] = -x.abs().max()
    weight = weight_of("many pieces", x, plain=True)
    check_forward(replace(weight, bits=(8, 3)), device_of(backend), 0)
    check_backward(weight, device_of(backend), 1)


REFERENCE = torch.tensor([-2, -0.5, -0.1, 0, 0.2, 0.7, 1.5])
LITERALS = {
    2: (-1, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1 / 3, 1),
    3: (-1, -0.428571, -0.142857, 0.142857, 0.142857, 0.714286, 1),
    4: (-1, -0.466667, -0.066667, 0.066667, 0.2, 0.6, 1),
}


def forward(backend: str, x: Tensor, bits: tuple[int, int]) -> tuple[Tensor, ...]:
    """sums, first, second on the CPU."""
    weight = replace(weight_of("by hand", x, plain=True), bits=bits)
    device = device_of(backend)
    results = [torch.zeros((2, 2), dtype=torch.int64), torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)]
    results = [r.to(device) for r in results]
    ops.dorefa_fake_quantize(*(t.to(device) for t in (x, weight.low, weight.high, weight.qmax)), *results)
    return tuple(r.cpu() for r in results)


def backward(backend: str, g: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
    """dx on the CPU."""
    low, high = oracle.minmax(x, None)
    device = device_of(backend)
    dx = torch.full_like(x, torch.nan, device=device)
    ops.dorefa_fake_quantize_backward(*(t.to(device) for t in (g, x, low, high, torch.tensor([factor]))), dx)
    return dx.cpu()


@on_backends
def test_vectors(backend: str) -> None:
    """DoReFa's values by hand: 0 lies on a tie, which goes to the even code; and what SAT makes of them by the sums."""
    for bits in ((2, 3), (4, 2)):
        sums, *values = forward(backend, REFERENCE, bits)
        for k, y in zip(bits, values, strict=True):
            torch.testing.assert_close(y, torch.tensor(LITERALS[k]).float(), atol=5e-7, rtol=0)
    codes = [round((y + 1) * 3 / 2) for y in LITERALS[2]]
    total, squares = sums[1].tolist()
    assert (total, squares) == (sum(codes), sum(r * r for r in codes))
    deviation = 2 / 3 * math.sqrt((squares - total * total / 7) / 6)
    sat = values[1] * (0.25 / deviation)  # n_out = 16
    want = torch.tensor([-0.384261, -0.128087, -0.128087, 0.128087, 0.128087, 0.128087, 0.384261])
    torch.testing.assert_close(sat, want, atol=5e-7, rtol=0)


@on_backends
def test_what_is_not_finite_and_what_is_0(backend: str) -> None:
    """NaN stays NaN and counts as code 0; Inf saturates, and is no maximum; zeros alone are the code of 0, not NaN."""
    nan, inf = torch.nan, torch.inf
    sums, y, _ = forward(backend, torch.tensor([nan, inf, -inf, 0.5, -0.5, -0.0]), (2, 1))
    assert torch.equal(y.nan_to_num(9.0), torch.tensor([9.0, 1.0, -1.0, 1.0, -1.0, torch.tensor(1.0).div(3).item()]))
    assert sums.tolist() == [[3 + 3 + 2, 9 + 9 + 4], [1 + 1, 1 + 1]]
    x = torch.tensor([0.0, -0.0, nan, inf, -inf])
    sums, y, _ = forward(backend, x, (1, 2))
    assert torch.equal(y.nan_to_num(9.0), torch.tensor([-1.0, -1.0, 9.0, 1.0, -1.0]))
    assert torch.equal(backward(backend, torch.tensor([1.0, nan, inf, 2.0, 3.0]), x), torch.zeros(5))
    g = torch.tensor([inf, nan, 5.0, 7.0, 1.0, 1.0])
    dx = backward(backend, g, torch.tensor([inf, -inf, nan, 0.0, 0.5, 0.25]), 2.0)
    assert torch.equal(dx[:3], torch.zeros(3))
    u = math.tanh(0.25) / math.tanh(0.5)
    want = [7 * 2 / math.tanh(0.5), 2 / math.tanh(0.5) * (1 - math.tanh(0.5) ** 2) * -u]
    torch.testing.assert_close(dx[3:5], torch.tensor(want), rtol=3e-6, atol=0)


@on_backends
def test_gradient_by_hand(backend: str) -> None:
    """One element is its own maximum: no gradient. Two of one magnitude share what passes through it."""
    assert torch.equal(backward(backend, torch.tensor([3.0]), torch.tensor([-0.3])), torch.zeros(1))
    x, g = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, 5.0, 4.0])
    u = math.tanh(0.5) / math.tanh(1)
    share, slope = (2 - 5 + 4 * u) / 2, (1 - math.tanh(1) ** 2) / math.tanh(1)
    want = [slope * (2 - share), slope * (5 + share), (1 - math.tanh(0.5) ** 2) / math.tanh(1) * 4]
    torch.testing.assert_close(backward(backend, g, x), torch.tensor(want), rtol=3e-6, atol=0)


@on_backends
def test_gradient_agrees_with_autograd(backend: str) -> None:
    """Of tanh(x) / max|tanh(x)| in float64, where ties share too."""
    for number in range(4):
        x, g = random((33, 31), number) * (0.1, 1.0, 0.5, 2.0)[number], random((33, 31), number + 9)
        x.view(-1)[: 2 * number] = x.abs().max() * torch.tensor([1.0, -1.0]).repeat(number)
        wide = x.double().requires_grad_()
        u = wide.tanh() / wide.tanh().abs().amax()
        (want,) = torch.autograd.grad(u, wide, g.double())
        largest, tied = x.abs().max().double().tanh(), x.abs() == x.abs().max()
        slope, terms = (1 - x.double().tanh() ** 2) / largest, g.double() * u.detach() / tied.sum()
        through = tied * (slope * terms.abs().sum() + terms.sum().abs() / largest)
        bound = 1e-6 * (g.double().abs() / largest + through + want.abs())
        off = (backward(backend, g, x).double() - want).abs() > bound
        assert not off.any(), f"number {number}: {int(off.sum())} elements"


def test_tanh_is_near_the_truth() -> None:
    """The rational function is within 7 ulp of tanh, of the right sign, and 1 from its end on."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.logspace(-38, 1, 20_001)])
    t, truth = two_widths.tanh(x), x.double().tanh()
    ulp = torch.nextafter(truth.float().abs(), torch.tensor(2.0)).double() - truth.float().abs().double()
    assert ((t.double() - truth).abs() <= 7 * ulp).all()
    assert (t[x.abs() >= 9.1].abs() == 1).all() and torch.equal(t.sign(), x.sign())


@of_dtypes
@on_backends
@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
def test_fake_quantize_two_widths(backend: str, dtype: torch.dtype, granularity: str) -> None:
    """Both results are those of fake_quantize, on every kind of grid and odd scale, shape, layout and axis."""
    few = backend == "triton"
    grids = list(cases.grid_cases(dtype, granularity, few))[:: 1 if few else 5]
    shaped = {"tensor": "tensor", "channel_middle": "channel"}.get(granularity)
    grids += list(cases.shaped_cases(dtype, shaped, few))[::3] if shaped else []
    failures = []
    calls = taken(grids, backend, cases.DTYPES.index(dtype) + cases.GRANULARITIES.index(granularity))
    for number, case in calls:
        try:
            check_pair(case, device_of(backend), number)
        except Exception as error:
            failures.append(f"{case.label}: {type(error).__name__}: {error}")
    report(failures, len(calls))


def check_pair(case: cases.GridCase, device: str, number: int) -> None:
    """One call on the grid of the case and on a narrower one of other scales."""
    guard, dtypes = GUARD[number % 2], ((case.x.dtype, *cases.DTYPES)[number % 4], cases.DTYPES[number // 2 % 3])
    other = case._replace(scale=case.scale * 1.7, qrange=torch.div(case.qrange, 2, rounding_mode="floor"))
    if case.zero_point is not None:
        other = other._replace(zero_point=case.zero_point / 2)
    if case.offset is not None:
        other = other._replace(offset=case.offset + 0.01)
    wants = tuple(oracle.fake_quantize(c.x, *c.grid, d)[0] for c, d in zip((case, other), dtypes, strict=True))
    stacked = [None if a is None else torch.stack([a, b]) for a, b in zip(case[2:6], other[2:6], strict=True)]
    inputs = (case.x, *stacked, case.axis, case.eps)
    likes = [torch.empty_like(case.x, dtype=d) for d in dtypes]
    pairs = [guarded(like.to(device), want, guard) for like, want in zip(likes, wants, strict=True)]
    ops.fake_quantize_two_widths(*(moved(a, device) for a in inputs), *(result for result, _ in pairs))
    assert_all_right(("first", "second"), case.label, pairs, wants, inputs, guard)


def large(threads: int) -> tuple[Tensor, ...]:
    """All results over several pieces of work; the sum of g u is 0 but for rounding, so that any order shows."""
    torch.set_num_threads(threads)
    half = random((75_003,), 1).clamp(-2, 2)
    wide = random((75_003,), 2) * 10.0 ** (random((75_003,), 3) * 4).clamp(-8, 8)
    order = torch.randperm(75_003, generator=torch.Generator().manual_seed(4))
    x, g = torch.cat([half, half[order]]), torch.cat([wide, -wide[order]])
    weight = weight_of("large", x, plain=True)
    sums, results = torch.zeros((2, 2), dtype=torch.int64), [torch.empty_like(x) for _ in range(5)]
    ops.dorefa_fake_quantize(x, weight.low, weight.high, weight.qmax, sums, *results[:2])
    ops.dorefa_fake_quantize_backward(g, x, weight.low, weight.high, NONE, results[2])
    scales, qranges = torch.tensor([[0.3], [0.1]]), torch.tensor([[-4, 3], [-8, 7]], dtype=torch.int32)
    ops.fake_quantize_two_widths(x, scales, None, None, qranges, None, 0.0, *results[3:])
    return sums, *results


@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    """Whoever does the pieces of work, and in whatever order."""
    first = large(1)
    for threads in (1, 2, 3):
        for repeat in range(1 if backend == "reference" else 5):
            for number, (a, b) in enumerate(zip(first, large(threads), strict=True)):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{threads} threads, {repeat}: {number}"


@on_backends
def test_results_of_other_strides(backend: str) -> None:
    """Results may be laid out in another way than x: their values come in place, or the call is refused."""
    device, x = device_of(backend), random((6, 10), 5)
    weight = weight_of("other strides", x, plain=True)
    sums, *wants = two.dorefa_fake_quantize(weight)
    inputs = [t.to(device) for t in (x, weight.low, weight.high, weight.qmax)]
    want: tuple = (*wants, two.dorefa_fake_quantize_backward(x, weight, 1.0))
    results = [torch.full((10, 6), torch.nan, device=device).t() for _ in range(3)]
    try:
        ops.dorefa_fake_quantize(*inputs, torch.empty_like(sums).to(device), *results[:2])
        ops.dorefa_fake_quantize_backward(inputs[0], *inputs[:3], NONE.to(device), results[2])
    except (RuntimeError, ValueError):
        return
    oracle.assert_results(("first", "second", "dx"), [r.cpu() for r in results], want, inputs, "other strides")


def test_opcheck() -> None:
    """The ops write what their schemas say, and trace without being run."""
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x = random((5, 7), 1)
    weight, results = weight_of("opcheck", x, plain=True), (torch.zeros(5, 7), torch.zeros(5, 7))
    arguments = (x, weight.low, weight.high, weight.qmax, torch.zeros((2, 2), dtype=torch.int64), *results)
    torch.library.opcheck(ops.dorefa_fake_quantize.default, arguments, test_utils=utils)
    arguments = (x, x, weight.low, weight.high, torch.ones(1), results[0])
    torch.library.opcheck(ops.dorefa_fake_quantize_backward.default, arguments, test_utils=utils)
    grids = (torch.full((2, 1), 0.3), None, None, torch.tensor([[-4, 3], [-2, 1]], dtype=torch.int32), None, 0.0)
    torch.library.opcheck(ops.fake_quantize_two_widths.default, (x, *grids, *results), test_utils=utils)
