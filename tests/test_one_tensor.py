"""The ops on one tensor with one scale, on every backend, against the equations (tests/one_tensor_cases.py).

Values, bits, codes, counts and extremes are equal; sums are within the law. Everything is written between guards.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import cases
import one_tensor_cases as one
import oracle
import pytest
import torch
from cases import device_of, random
from one_tensor_cases import RESULTS, Case
from test_conformance import GUARD, guarded, moved, of_dtypes, on_backends
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.fastqat
NONE = torch.empty(0)


def scalars(case: Case) -> tuple:
    """The arguments of a call between the grid and what it writes into."""
    tensor_id, seed, step = case.noise
    limit = NONE if case.limit is None else torch.tensor([case.limit])
    at = torch.tensor([step] if tensor_id >= 0 else [], dtype=torch.int64)
    return case.clip, case.rounded, seed, tensor_id, at, limit, case.code_bits


def arguments_of(case: Case, device: str) -> list:
    """All arguments but the results."""
    _, x, scale, zero_point, offset, qrange, _, eps = case.grid
    return [moved(a, device) for a in (x, scale, zero_point, offset, qrange, eps, *scalars(case))]


def before(name: str, case: Case, want: Tensor) -> Tensor | None:
    """What a result that is added to holds before the call."""
    if want.numel() == 0 or name not in ("low", "high", "beyond"):
        return None
    return torch.tensor([one.BEYOND_BEFORE if name == "beyond" else case.extremes[name == "high"]])


def run(case: Case, wants: tuple[Tensor, ...], device: str, guard: int) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a call that were wrong everywhere before it, and the buffers around them."""
    pairs = [guarded(want.to(device), want, guard) for want in wants]
    for name, want, (result, _) in zip(RESULTS, wants, pairs, strict=True):
        if (held := before(name, case, want)) is not None:
            result.copy_(held)
    ops.fake_quantize_tensor(*arguments_of(case, device), *(result for result, _ in pairs))
    return [result for result, _ in pairs], [buffer for _, buffer in pairs]


def assert_guards(label: str, names: tuple[str, ...], buffers: list[Tensor], guard: int) -> None:
    """Nothing was written before or behind a result."""
    for name, buffer in zip(names, buffers, strict=True):
        ends = torch.cat([buffer[:guard], buffer[buffer.numel() - guard :]])
        assert (ends == 91).all(), f"{label}: {name}: written outside of the result"


def check(case: Case, device: str, number: int) -> None:
    """One call against the oracle."""
    wants, guard = one.fake_quantize_tensor(case), GUARD[number % 2]
    results, buffers = run(case, wants, device, guard)
    oracle.assert_results(RESULTS, [r.cpu() for r in results], wants, case.grid[1:], case.label)
    assert_guards(case.label, RESULTS, buffers, guard)


def taken(backend: str, dtype: torch.dtype) -> list[tuple[int, Case]]:
    """The calls of a test: slow backends make some of them, which ones by turns."""
    numbered = list(enumerate(one.all_cases(dtype, few=backend == "triton")))
    turn = cases.DTYPES.index(dtype)
    return numbered[turn::4] if backend == "cuda-on-host" else numbered


@of_dtypes
@on_backends
def test_forward(backend: str, dtype: torch.dtype) -> None:
    """Every grid, odd scales, clips, both masks, noise, every width of codes, every shape and layout."""
    failures, calls = [], taken(backend, dtype)
    for number, case in calls:
        try:
            check(case, device_of(backend), number)
        except Exception as error:
            failures.append(f"{case.label}: {type(error).__name__}: {error}")
    assert not failures, "\n".join([f"{len(failures)} of {len(calls)} calls are wrong", *failures[:3]])


@on_backends
def test_nothing_asked_for(backend: str) -> None:
    """All results may be empty, and so may the tensor."""
    device = device_of(backend)
    empty = [torch.empty(0, dtype=d, device=device) for d in (torch.float32,) * 2 + (torch.int64,) + (torch.uint8,) * 3]
    for x in (random((19,), 1), torch.empty(0, 3)):
        arguments = arguments_of(Case(case_of(x)), device)
        ops.fake_quantize_tensor(*arguments, *empty, torch.empty(0, device=device))
    low, high = (torch.tensor([v], device=device) for v in (-1.0, 2.0))
    ops.fake_quantize_tensor(*arguments_of(Case(case_of(torch.empty(0, 3))), device), low, high, *empty[2:], empty[0])
    assert (low.item(), high.item()) == (-1.0, 2.0)


def case_of(x: Tensor, grid: cases.Grid | None = None, scale: float = 0.3) -> cases.GridCase:
    """x on a grid of 4 bits, if no other is given, with an ordinary scale."""
    grid = grid or cases.Grid("signed4", -8, 7)
    tensors = cases.grid_tensors(grid, (scale,), 0.0)
    return cases.GridCase(
        f"{grid.name} {tuple(x.shape)}", x, *tensors, torch.tensor([grid.qmin, grid.qmax]).int(), None, 0.0
    )


@on_backends
def test_a_result_of_other_strides(backend: str) -> None:
    """y may be laid out in another way than x: its values come in place, or the call is refused."""
    device, x = device_of(backend), random((6, 10), 5)
    case = Case(case_of(x), inside=True, y=torch.float32)
    wants = one.fake_quantize_tensor(case)
    arguments = arguments_of(case, device)
    for y in (torch.full((10, 6), torch.nan, device=device).t(), torch.full((6, 20), torch.nan, device=device)[:, ::2]):
        results = [w.clone().to(device) for w in wants[:-1]]
        results[3].zero_()
        try:
            ops.fake_quantize_tensor(*arguments, *results, y)
        except (RuntimeError, ValueError):
            continue
        results = [r.cpu() for r in (*results, y)]
        oracle.assert_results(RESULTS, results, wants, case.grid[1:], f"strides {y.stride()}")


@on_backends
def test_all_that_is_not_finite(backend: str) -> None:
    """By hand: NaN passes nothing and has the code of 0; Inf saturates; neither widens the range; all counts."""
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, inf, -inf, -0.0, 3.0, -0.5, 1.0, nan, 0.75])
    grid = cases.Grid("affine", 0, 7, (2.0,))
    case = Case(case_of(x, grid, 0.25), y=torch.float32, limit=0.5, extremes=(inf, -inf), inside=True, above=True)
    case = replace(case, code_bits=3)
    made = run(case, one.fake_quantize_tensor(case), device_of(backend), 17)[0]
    low, high, beyond, inside, above, codes, y = (r.cpu() for r in made)
    assert (low.item(), high.item(), beyond.item() - one.BEYOND_BEFORE) == (-0.5, 3.0, 5)
    want = torch.tensor([nan, 1.25, -0.5, 0.0, 1.25, -0.5, 1.0, nan, 0.75])
    assert torch.equal(y.nan_to_num(99.0), want.nan_to_num(99.0))
    assert inside.tolist() == [0b01101000, 1]
    assert above.tolist() == [0b00010010, 0]
    number = sum(code << (3 * k) for k, code in enumerate((2, 7, 0, 2, 7, 0, 6, 2, 5)))
    assert bytes(codes.tolist()) == number.to_bytes(4, "little")


@on_backends
def test_vector_of_the_noise(backend: str) -> None:
    """x = 0 rounds up where the number of Philox of its place in memory is more than its distance: Salmon's vector."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # counter and key 0 (Random123, kat_vectors)
    fractions = [(word >> 8) * 2.0**-24 for word in words]
    x = torch.tensor([[1 - fractions[0], 1 - fractions[1]], [1 - fractions[2], 1 - fractions[3]]]).t()
    below = torch.tensor([[1 - fractions[0], 1 - fractions[1]], [1 - fractions[2], 1 - fractions[3]]]).t() - 2.0**-24
    for values, want in ((x, 1.0), (below, 0.0)):
        case = Case(case_of(values, scale=1.0), noise=(0, 0, 0), y=torch.float32)
        y = run(case, one.fake_quantize_tensor(case), device_of(backend), 17)[0][-1].cpu()
        assert y.tolist() == [[want, want], [want, want]]


@of_dtypes
@on_backends
def test_noise_beyond_one_piece_of_work(backend: str, dtype: torch.dtype) -> None:
    """Numbers, counts and extremes go on where another piece, or another block, begins."""
    x = random((9_011,), 6).to(dtype)
    x[3], x[-2] = 90.0, -80.0
    case = Case(case_of(x), noise=(3, 5, 7), limit=0.5, extremes=(-1.0, 1.0), y=torch.float32)
    check(case, device_of(backend), 0)


@of_dtypes
@on_backends
def test_dequantize(backend: str, dtype: torch.dtype) -> None:
    """Packed codes of every width give the values that they were made with, in every layout."""
    device = device_of(backend)
    calls = taken(backend, dtype)
    for number, case in calls[cases.DTYPES.index(dtype) :: 3] if backend == "triton" else calls:
        width = int(case.grid.qrange[1] - case.grid.qrange[0]).bit_length()
        bits = 8 if number % 5 == 4 else width
        whole = Case(case.grid, noise=case.noise, code_bits=bits, y=(dtype, *cases.DTYPES)[number % 4])
        *_, codes, y = one.fake_quantize_tensor(whole)
        want = one.dequantize_tensor(codes, whole.grid, bits, whole.y)
        there = arguments_of(whole, device)
        result, buffer = guarded(want.to(device), want, GUARD[number % 2])
        ops.dequantize_tensor(codes.to(device), *there[1:6], bits, result)
        oracle.assert_results(("y",), (result.cpu(),), (want,), case.grid[1:], whole.label)
        assert_guards(whole.label, ("y",), [buffer], GUARD[number % 2])
        same = (result.cpu() == y) | y.isnan()
        assert same.all(), f"{whole.label}: another value than that of its code"


def random_bits(count: int, seed: int) -> Tensor:
    """A bit for each element, in whole bytes: those behind the last one are set at random too."""
    return torch.randint(0, 256, ((count + 7) // 8,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@of_dtypes
@on_backends
def test_backward(backend: str, dtype: torch.dtype) -> None:
    """Gradients of any dtype and strides, Inf and NaN among them, from random bits."""
    device = device_of(backend)
    numbered = list(enumerate(cases.shaped_cases(dtype, "tensor", few=backend == "triton")))
    for number, case in numbered[:: 3 if backend == "cuda-on-host" else 1]:
        dx, g = torch.empty_like(case.x), cases.incoming(case, number)
        if g.numel() > 2 and g.stride() == torch.empty_like(g).stride() and number % 2:
            g = g.clone().index_put_((torch.tensor(0),), torch.tensor((torch.nan, torch.inf)[number % 4 // 2]).to(g))
        inside, above = random_bits(g.numel(), number), random_bits(g.numel(), number + 1)
        learned, qmax = number % 3 != 0, (7, 15, 255, 1)[number % 4]
        wants = one.fake_quantize_tensor_backward(g, inside, above if learned else inside, qmax, dx, learned)
        bits = [inside, above if learned else NONE.byte()]
        qrange, guard = torch.tensor([0, qmax], dtype=torch.int32), GUARD[number % 2]
        pairs = [guarded(r.to(device), w, guard) for r, w in zip((dx, torch.empty(int(learned))), wants, strict=True)]
        there = [moved(a, device) for a in (g, *bits, qrange)]
        ops.fake_quantize_tensor_backward(*there, *(result for result, _ in pairs))
        label = f"{case.label} number {number}, g {g.dtype} {g.stride()}"
        oracle.assert_results(("dx", "dscale"), [r.cpu() for r, _ in pairs], wants, (g,), label)
        assert_guards(label, ("dx", "dscale"), [buffer for _, buffer in pairs], guard)


@functools.cache
def large_inputs() -> tuple[Tensor, Tensor]:
    """g and x that several threads share; g is over 16 decades, and its sum is 0 but for rounding: any order shows."""
    half, order = 150_008, torch.randperm(150_008, generator=torch.Generator().manual_seed(6))
    wide = random((half,), 1) * 10.0 ** (random((half,), 8) * 4).clamp(-8, 8)
    return torch.cat([wide, -wide[order], torch.zeros(1)]), random((2 * half + 1,), 2)


def large(threads: int) -> tuple[Tensor, ...]:
    """All results of a forward pass and of a backward pass."""
    g, x = large_inputs()
    torch.set_num_threads(threads)
    case = Case(case_of(x), noise=(3, 5, 7), limit=0.7, extremes=(torch.inf, -torch.inf), inside=True, above=True)
    case = replace(case, code_bits=5)
    sizes = (1, 1, 1, 37503, 37503, 187511, 300_017)
    dtypes = (torch.float32,) * 2 + (torch.int64,) + (torch.uint8,) * 3 + (torch.float32,)
    results = [torch.zeros(n, dtype=d) for n, d in zip(sizes, dtypes, strict=True)]
    ops.fake_quantize_tensor(*arguments_of(case, "cpu"), *results)
    dx, dscale = torch.empty_like(x), torch.empty(1)
    everything = torch.full_like(results[3], 255)
    ops.fake_quantize_tensor_backward(g, results[3], everything, case.grid.qrange, dx, dscale)
    return *results, dx, dscale


@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    """Sums, counts, extremes and bits do not depend on how many threads share the work, nor on the run."""
    first = large(1)
    for threads in (1, 2, 3, 8):
        for repeat in range(1 if backend == "reference" else 5):
            for number, (a, b) in enumerate(zip(first, large(threads), strict=True)):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{threads} threads, {repeat}: {number}"


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck() -> None:
    """The ops write what their schemas say, and trace without being run."""
    case = Case(case_of(random((5, 7), 1)), code_bits=4, inside=True, above=True, limit=0.5, extremes=(0.0, 0.0))
    case = replace(case, y=torch.float32)
    results = [w.clone() for w in one.fake_quantize_tensor(case)]
    torch.library.opcheck(ops.fake_quantize_tensor.default, (*arguments_of(case, "cpu"), *results), test_utils=OPCHECKS)
    g, dx, dscale = random((5, 7), 2), torch.zeros(5, 7), torch.zeros(1)
    arguments = (g, results[3], results[4], case.grid.qrange, dx, dscale)
    torch.library.opcheck(ops.fake_quantize_tensor_backward.default, arguments, test_utils=OPCHECKS)
    arguments = (results[5], *arguments_of(case, "cpu")[1:6], 4, dx)
    torch.library.opcheck(ops.dequantize_tensor.default, arguments, test_utils=OPCHECKS)
