"""A small set of calls of every op on the device: ``compute-sanitizer python tests/gpu_calls.py``.

Small and odd shapes of every layout, tensors of several blocks, many tensors in one call with tracking. The results are
compared with what conformance asks for; it is the sanitizer that looks for what no result shows. Run it with
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "0")

import cases
import one_tensor_cases as one
import torch
import two_widths_cases as two
from cases import Call, GridCase, grid_call, random
from gpu_device import DEVICE, REHEARSAL
from many_tensors import STATE, assert_same, move, quantize, walking
from oracle import assert_results
from test_conformance import GRID_OPS, PLAIN_OPS, expected, moved
from test_multi_tensor_gradients import test_gradients_of_many_tensors_are_those_of_each
from test_one_tensor import arguments_of, before, random_bits
from test_two_widths import check_backward, check_forward, check_pair

import fastqat
from fastqat.ops import multi_tensor, schema

SECONDS = 40.0  # of calls; under a sanitizer each is many times slower
WIDE = ((3, 20_011), 0), ((20_011, 3), 1), ((70_001,), None), ((5, 7, 1025), 1)  # several blocks, no multiples


def wide_cases() -> Iterator[GridCase]:
    """Tensors that several blocks share."""
    for number, (shape, axis) in enumerate(WIDE):
        dtype = cases.DTYPES[number % 3]
        scale = 0.1 + random((1 if axis is None else shape[axis],), number).abs()
        qrange = torch.tensor([-8, 7], dtype=torch.int32)
        x = random(shape, number).to(dtype)
        yield GridCase(f"{shape} axis {axis}", x, scale, None, None, qrange, axis, 1e-6)


def grid_calls(op: str) -> Iterator[Call]:
    """The large tensors first; then every ninth of the small ones, so that all dtypes and granularities have a turn."""
    for number, case in enumerate(wide_cases()):
        yield grid_call(op, case, number)
    small = itertools.chain.from_iterable(
        cases.shaped_cases(dtype, granularity, few=True)
        for dtype in cases.DTYPES
        for granularity in ("tensor", "channel")
    )
    for number, case in enumerate(itertools.islice(small, 0, None, 9)):
        yield grid_call(op, case, number)


def run(op: str, call: Call) -> None:
    """One call into memory of exactly the size that it needs."""
    wants = expected(op, call.arguments)
    arguments = tuple(moved(a, DEVICE) for a in call.arguments)
    results = schema.OPS[op].allocate(*arguments)
    getattr(torch.ops.fastqat, f"{op}_out")(*arguments, *results)
    assert_results(schema.OPS[op].results, [r.cpu() for r in results], wants, call.arguments, f"{op} {call.label}")


def one_tensor() -> Iterator[tuple[int, one.Case]]:
    """Calls of the ops on one tensor: every ninth, of all dtypes, and one of several blocks for each."""
    for dtype in cases.DTYPES:
        wide = next(wide_cases())
        wide = wide._replace(x=random((8191,), 3).to(dtype), scale=wide.scale[:1], axis=None)
        few = list(one.all_cases(dtype, few=True))
        yield from enumerate([one.varied(wide, 8), one.varied(wide, 9), one.plain(wide, 0), *few[::9]])


def run_one_tensor(number: int, case: one.Case) -> None:
    """Forward, the values of random codes, and backward from random bits."""
    wants, results = one.fake_quantize_tensor(case), []
    for name, want in zip(one.RESULTS, wants, strict=True):
        held = before(name, case, want)
        results.append((torch.empty_like(want) if held is None else held).to(DEVICE))
    arguments = arguments_of(case, DEVICE)
    torch.ops.fastqat.fake_quantize_tensor(*arguments, *results)
    assert_results(one.RESULTS, [r.cpu() for r in results], wants, case.grid[1:], case.label)
    x = case.grid.x
    packed, g, dx = random_bits(x.numel() * 4, number), random(tuple(x.shape), 5), torch.empty_like(x, device=DEVICE)
    inside, above = random_bits(x.numel(), number), random_bits(x.numel(), number + 1)
    torch.ops.fastqat.dequantize_tensor(packed.to(DEVICE), *arguments[1:6], 4, dx)
    want = one.dequantize_tensor(packed, case.grid, 4, x.dtype)
    assert_results(("y",), [dx.cpu()], (want,), case.grid[1:], case.label)
    there = [t.to(DEVICE) for t in (g, inside, above, case.grid.qrange)]
    dscale = torch.empty(1, device=DEVICE)
    torch.ops.fastqat.fake_quantize_tensor_backward(*there, dx, dscale)
    law = one.fake_quantize_tensor_backward(g, inside, above, int(case.grid.qrange[1]), torch.empty_like(x), True)
    assert_results(("dx", "dscale"), [dx.cpu(), dscale.cpu()], law, (g,), case.label)


def two_widths() -> int:
    """Every ninth call of the ops on two bit-widths, of all dtypes, and some of several blocks."""
    pairs = list(wide_cases())
    weights = [two.weight_of(case.label, case.x, number) for number, case in enumerate(pairs)]
    for dtype in cases.DTYPES:
        weights += list(two.weights(dtype, few=True))[::9]
        pairs += list(cases.shaped_cases(dtype, "channel", few=True))[::9]
    for number, weight in enumerate(weights):
        check_forward(weight, DEVICE, number)
        check_backward(weight, DEVICE, number)
    for number, case in enumerate(pairs):
        check_pair(case, DEVICE, number)
    return 2 * len(weights) + len(pairs)


def walk() -> None:
    """Some steps of many tensors with tracking and freezing, against the definition."""
    weights, limits = walking(DEVICE)
    twins = [w.twin() for w in weights]
    for t, step in enumerate((0, 1, 2, 6, 7)):
        for ours, theirs in zip(weights, twins, strict=True):
            move(theirs.case, t)
            ours.case.x.copy_(theirs.case.x)
        thresholds = [limit(6 + t) for limit in limits]
        ys = quantize(torch.ops.fastqat.multi_tensor_fake_quantize, weights, step, thresholds)
        wants = quantize(multi_tensor.multi_tensor_fake_quantize, twins, step, thresholds)
        for y, want, ours, theirs in zip(ys, wants, weights, twins, strict=True):
            assert_same(("y", *STATE), [y, *ours.state], [want, *theirs.state], f"step {step}, {theirs.case.label}")


def main() -> None:
    """All calls, or as many as the time allows, in an order in which every op has its turn."""
    start, count = time.monotonic(), 0
    if not REHEARSAL:
        fastqat.use_backend("cuda")
    walk()
    test_gradients_of_many_tensors_are_those_of_each("cpu" if REHEARSAL else "cuda")
    print(f"many tensors were right after {time.monotonic() - start:.1f} s", flush=True)
    for number, case in one_tensor():
        run_one_tensor(number, case)
        count += 1
    count += two_widths()
    print(f"{count} calls on one tensor were right after {time.monotonic() - start:.1f} s", flush=True)
    calls = {op: grid_calls(op) for op in GRID_OPS}
    calls |= {op: itertools.islice(cases.plain_calls(op, few=True), 0, None, 5) for op in PLAIN_OPS}
    for row in itertools.zip_longest(*calls.values()):
        if time.monotonic() - start > SECONDS:
            print(f"no more time after {count} calls")
            break
        for op, call in zip(calls, row, strict=True):
            if call is not None:
                run(op, call)
                count += 1
    print(f"{count} calls were right in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
