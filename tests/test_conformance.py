"""Every op on every backend against the reference: values equal element by element, sums within the law.

The results are written into NaN-filled (or otherwise surely wrong) memory between guards, so that an element that is
not written, or one written beyond the end, shows.
"""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import LAYER, LONG, PLAIN_OPS, Call, device_of, grid_call, random
from oracle import Within, assert_results
from torch import Tensor

from fastqat.ops import reference, schema

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("reference", "cpu", "cuda-on-host", "triton", "cuda")
GRID_OPS = tuple(op for op in schema.OPS if op not in PLAIN_OPS)
SUMS = ("fake_quantize_backward", "range_search")  # what the oracle, not the reference, says to float32 sums
GUARD = (64, 17)  # elements before and behind a result: aligned and unaligned

on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
of_dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
of_grid_ops = pytest.mark.parametrize("op", GRID_OPS)


def moved(argument: object, device: str) -> object:
    """A tensor on the device with its strides; anything else as it is."""
    if not isinstance(argument, Tensor) or device == "cpu":
        return argument
    whole = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).to(device)
    return whole.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def expected(op: str, arguments: tuple) -> tuple:
    """What the reference gives for contiguous inputs; for the sums what float64 gives."""
    dense = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
    results = schema.OPS[op].allocate(*dense)
    getattr(reference, op)(*dense, *results)
    if op not in SUMS:
        return results
    law = getattr(oracle, op)(*dense)
    return tuple(w if isinstance(w, Within) else r for w, r in zip(law, results, strict=True))


def guarded(like: Tensor, want: Tensor | Within, guard: int) -> tuple[Tensor, Tensor]:
    """A result of the shape and strides of `like` that is wrong everywhere, and the buffer around it."""
    want = (want.want if isinstance(want, Within) else want).to(like.device)
    length = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    buffer = torch.full((length + 2 * guard,), 91, dtype=like.dtype, device=like.device)
    result = buffer.as_strided(like.shape, like.stride(), guard)
    result.copy_(torch.where(want.isnan(), 0.0, torch.nan) if like.is_floating_point() else want ^ 1)
    return result, buffer


def check(op: str, call: Call, backend: str, number: int, both_forms: bool = True) -> None:
    """Run both forms of an op and compare all results."""
    device, entry = device_of(backend), schema.OPS[op]
    wants = expected(op, call.arguments)
    arguments = tuple(moved(a, device) for a in call.arguments)
    shapes = entry.allocate(*arguments)
    guard = GUARD[number % 2]
    pairs = [guarded(like, want, guard) for like, want in zip(shapes, wants, strict=True)]
    results = [result for result, _ in pairs]
    getattr(torch.ops.fastqat, f"{op}_out")(*arguments, *results)
    assert_results(entry.results, [r.cpu() for r in results], wants, call.arguments, call.label)
    for name, (_, buffer) in zip(entry.results, pairs, strict=True):
        ends = torch.cat([buffer[:guard], buffer[buffer.numel() - guard :]])
        assert (ends == 91).all(), f"{call.label}: {name}: written outside of the result"
    if both_forms:
        fresh = getattr(torch.ops.fastqat, op)(*arguments)
        fresh = (fresh,) if isinstance(fresh, Tensor) else fresh
        assert_results(entry.results, [r.cpu() for r in fresh], wants, call.arguments, call.label)
        for name, made, like in zip(entry.results, fresh, shapes, strict=True):
            assert made.stride() == like.stride(), f"{call.label}: {name}: strides {made.stride()}, not {like.stride()}"


def check_all(op: str, calls: list[Call], backend: str, turn: int | None = None) -> None:
    """Make every call, then report how many fail, and the first ones in full.

    CUDA's kernels take their time on the CPU: a test that has a turn makes every third call there, which ones by turns.
    """
    failures, numbered = [], list(enumerate(calls))
    on_host = backend == "cuda-on-host"
    for number, call in numbered[turn % 3 :: 3] if on_host and turn is not None else numbered:
        try:
            check(op, call, backend, number, both_forms=backend != "triton" and not on_host)
        except Exception as error:
            failures.append(
                str(error) if call.label in str(error) else f"{call.label}: {type(error).__name__}: {error}"
            )
    assert not failures, "\n".join([f"{len(failures)} of {len(calls)} calls are wrong", *failures[:3]])


@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
@of_dtypes
@on_backends
@of_grid_ops
def test_critical_inputs(op: str, backend: str, dtype: torch.dtype, granularity: str) -> None:
    """Lattice, midpoints, clip edges, special values; every bit-width, kind of grid and odd scale."""
    few = backend == "triton"
    calls = [grid_call(op, case, number) for number, case in enumerate(cases.grid_cases(dtype, granularity, few))]
    assert len(calls) >= 6
    check_all(op, calls, backend, cases.DTYPES.index(dtype) + cases.GRANULARITIES.index(granularity))


@pytest.mark.parametrize("granularity", ("tensor", "channel"))
@of_dtypes
@on_backends
@of_grid_ops
def test_shapes_and_strides(op: str, backend: str, dtype: torch.dtype, granularity: str) -> None:
    """Sizes around every block size, every axis, every memory layout, nothing at all."""
    few = backend == "triton"
    numbered = enumerate(cases.shaped_cases(dtype, granularity, few))
    calls = [grid_call(op, case, number) for number, case in numbered]
    check_all(op, calls, backend, cases.DTYPES.index(dtype) + len(granularity) % 3)


@on_backends
@pytest.mark.parametrize("op", PLAIN_OPS)
def test_plain(op: str, backend: str) -> None:
    """pack, unpack and philox_uniform: every width, odd tails."""
    check_all(op, list(cases.plain_calls(op, few=backend == "triton")), backend, turn=0)


@on_backends
def test_pack_strided_codes(backend: str) -> None:
    """Codes are packed in logical order, whatever their strides."""
    codes = torch.randint(0, 8, (33, 7), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    views = (codes.t(), codes[::2, 1:], codes[:1].expand(5, 7))
    check_all("pack", [Call(f"view {number}", (view, 3)) for number, view in enumerate(views)], backend)


def large_call(op: str, shape: tuple[int, ...], axis: int | None) -> Call:
    """A call that occupies several threads."""
    channels = 1 if axis is None else shape[axis]
    scale = random((channels,), 3).abs() * 0.1 + 0.05
    zero = torch.full((channels,), 7.0)
    g, x, qrange = random(shape, 1), random(shape, 2), torch.tensor([0, 15], dtype=torch.int32)
    grid = (scale, zero, None, qrange, axis, 1e-6)
    tails = {"fake_quantize": (None,), "quantize": (torch.uint8,), "fake_quantize_backward_input": (True,)}
    if op == "fake_quantize_backward":
        return Call(f"{shape}", (g, x, *grid, True, True, 6.0))
    if op == "minmax":
        return Call(f"{shape}", (x, axis))
    if op == "range_search":
        return Call(f"{shape}", (x, torch.stack([scale, scale * 0.8]), torch.stack([zero, zero]), qrange, axis))
    if op == "dequantize":
        return Call(f"{shape}", (x.clamp(-7, 7).to(torch.int8), *grid, torch.float32))
    return Call(f"{shape}", ((g, x) if op.endswith("_input") else (x,)) + grid + tails[op])


@pytest.mark.parametrize("granularity", ("tensor", "channel_first", "channel_last"))
@pytest.mark.parametrize("backend", ("cpu", "cuda"), indirect=True)
@of_grid_ops
def test_large(op: str, backend: str, granularity: str) -> None:
    """Tensors that several threads share, per tensor and per channel."""
    shape, axis = {"tensor": (LONG, None), "channel_first": (LAYER, 0), "channel_last": (LAYER, 1)}[granularity]
    torch.set_num_threads(3)
    check(op, large_call(op, shape, axis), backend, 0, both_forms=False)


def cancelling(g: Tensor, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Gradients over 16 decades whose sums are 0 but for rounding: any change of order shows, even in float64.

    All but every 1021st along the reduced dimension are 0, so that few meet in one sum of float32, whose rounding would
    cover that in float64.
    """
    along = 0 if axis is None else 1 - axis
    positions = torch.arange(0, g.shape[along], 1 if axis == 1 else 1021)  # columns are summed in float64 at once
    first, second = positions[: len(positions) // 2], positions[len(positions) // 2 :][: len(positions) // 2]
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(6))
    wide = g * 10.0 ** (random(tuple(g.shape), 8) * 4).clamp(-8, 8)
    sparse = torch.zeros_like(g).index_copy_(along, first, wide.index_select(along, first))
    sparse.index_copy_(along, second, -wide.index_select(along, first[order]))
    return sparse, x.index_copy(along, second, x.index_select(along, first[order]))


@pytest.mark.parametrize("granularity", ("tensor", "channel_first", "channel_last"))
@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
@pytest.mark.parametrize("op", ("fake_quantize_backward", "minmax", "range_search"))
def test_same_bits_for_any_number_of_threads(op: str, backend: str, granularity: str) -> None:
    """Sums and extremes have the same bits on 1, 2, 3 and 8 threads and on every run."""
    shape, axis = {"tensor": (LONG, None), "channel_first": (LAYER, 0), "channel_last": (LAYER, 1)}[granularity]
    if backend == "reference":
        shape = {"tensor": (300_007,), "channel_first": (64, 2305), "channel_last": (2305, 64)}[granularity]
    call, runs = large_call(op, shape, axis), {}
    if op == "fake_quantize_backward":
        g, x, *rest = call.arguments
        call = Call(call.label, (*cancelling(g, x, axis), *rest))
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for repeat in range(1 if backend == "reference" else 25):
            runs[threads, repeat] = getattr(torch.ops.fastqat, op)(*call.arguments)
    first = runs[1, 0]
    for (threads, repeat), results in runs.items():
        pairs = zip(first, results, strict=True) if isinstance(first, tuple) else [(first, results)]
        for number, (a, b) in enumerate(pairs):
            differ = (a.view(torch.int32) != b.view(torch.int32)).nonzero()[:5].tolist()
            assert not differ, f"{threads} threads, run {repeat}, result {number} differs at {differ}"


def per_tensor(backend: str, x: list[float], scale: float, qmin: int, qmax: int, zero: float | None = None) -> tuple:
    """x and the arguments of a per-tensor grid."""
    with torch.device(device_of(backend)):
        z = None if zero is None else torch.tensor([zero])
        qrange = torch.tensor([qmin, qmax], dtype=torch.int32)
        return torch.tensor(x), torch.tensor([scale]), z, None, qrange, None, 0.0


@on_backends
def test_the_two_masks(backend: str) -> None:
    """s = 1/4, codes -4..3, x = 0.76: inside by the rounded mask, outside by the unrounded one (methods.md, 0.3)."""
    x, *grid = per_tensor(backend, [0.76, 0.74, -1.01, -1.13, 0.875, -1.125], 0.25, -4, 3)
    for rounded, mask in ((True, [1, 1, 1, 0, 0, 1]), (False, [0, 1, 0, 0, 0, 0])):
        dx = torch.ops.fastqat.fake_quantize_backward_input(torch.ones_like(x), x, *grid, rounded)
        assert dx.tolist() == mask
        assert (
            torch.ops.fastqat.fake_quantize_backward(torch.ones_like(x), x, *grid, rounded, False, 0.0)[0].tolist()
            == mask
        )


@on_backends
def test_nan_touches_nothing(backend: str) -> None:
    """A NaN in x: y is NaN, its code clamp(z), its dx 0, and no sum counts it, whatever its g."""
    nan, inf = torch.nan, torch.inf
    x, *grid = per_tensor(backend, [0.3, nan, 5.0, nan, -2.0, nan], 0.25, 0, 15, 3.6)
    assert torch.ops.fastqat.fake_quantize(x, *grid, None).isnan().tolist() == x.isnan().tolist()
    assert torch.ops.fastqat.quantize(x, *grid, torch.uint8).tolist() == [5, 4, 15, 4, 0, 4]
    g = torch.tensor([1.0, 7.0, 1.0, inf, 1.0, nan], device=x.device)
    for rounded in (True, False):
        dx, dscale, dshift = torch.ops.fastqat.fake_quantize_backward(g, x, *grid, rounded, False, 0.0)
        assert dx.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        assert abs(dscale.item() - (1 - 0.3 / 0.25 + 11 - 4)) < 1e-5
        assert dshift.tolist() == [-0.5]


@on_backends
def test_masked_gradient_is_zero_even_where_g_is_not_finite(backend: str) -> None:
    """dx is selected, never multiplied: g = inf or NaN outside the grid gives 0, inside it passes."""
    x, *grid = per_tensor(backend, [100.0, -100.0, 100.0, torch.inf, 0.5, 0.5], 0.25, -4, 3)
    g = torch.tensor([torch.inf, torch.nan, -torch.inf, torch.nan, torch.inf, torch.nan], device=x.device)
    for dx in (
        torch.ops.fastqat.fake_quantize_backward_input(g, x, *grid, True),
        torch.ops.fastqat.fake_quantize_backward(g, x, *grid, True, False, 0.0)[0],
    ):
        assert dx[:5].tolist() == [0.0, 0.0, 0.0, 0.0, torch.inf] and dx[5].isnan()


@on_backends
def test_one_wild_channel_leaves_the_others_alone(backend: str) -> None:
    """Inf, NaN and a huge g in one channel do not reach the sums of its neighbours, on any axis."""
    x, g = random((6, 40), 1), random((6, 40), 2)
    x[3, ::3], g[3, 1::3], g[3, 2::3] = torch.nan, torch.inf, 3e38
    scale, qrange = torch.full((6,), 0.3), torch.tensor([-4, 3], dtype=torch.int32)
    for axis in (0, 1):
        args = [t if axis == 0 else t.t().contiguous() for t in (g, x)]
        call = (*args, scale, torch.full((6,), 1.0), None, qrange, axis, 0.0, True, False, 0.0)
        there = (moved(a, device_of(backend)) for a in call)
        results = [r.cpu() for r in torch.ops.fastqat.fake_quantize_backward(*there)]
        wants = oracle.fake_quantize_backward(*call)
        for got, want in zip(results[1:], wants[1:], strict=True):
            bad = oracle.wrong(got, want)
            bad[3] = got[3].isfinite()
            assert not bad.any(), f"axis {axis}: {got.tolist()} instead of {want.want.tolist()}"


@on_backends
def test_results_of_other_strides(backend: str) -> None:
    """Out-variants fill results whose strides are not those of x, or refuse them; never silently wrong."""
    x, *grid = grid_call("fake_quantize", next(cases.shaped_cases(torch.float32, "tensor")), 0).arguments
    x = random((6, 10), 5)
    want = expected("fake_quantize", (x, *grid))[0]
    there = [moved(a, device_of(backend)) for a in (x, *grid)]
    nan = torch.full((6, 20), torch.nan, device=there[0].device)
    for result in (nan[:, 10:].t().contiguous().t(), nan[:, ::2]):
        try:
            torch.ops.fastqat.fake_quantize_out(*there, result)
        except (RuntimeError, ValueError):
            continue
        assert_results(("y",), (result.cpu(),), (want,), (x, *grid), f"result strides {result.stride()}")


def test_every_op_has_cases() -> None:
    """A new op in the schema without cases here is an error (grid_call raises)."""
    case = next(cases.grid_cases(torch.float32, "channel_first", few=True))
    for op in GRID_OPS:
        assert grid_call(op, case, 0).arguments
    for op in PLAIN_OPS:
        assert next(cases.plain_calls(op)).arguments
