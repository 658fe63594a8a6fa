"""Grids that are NaN or infinite: a NaN scale or zero point gives NaN on every backend, never an unclamped value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import GridCase, device_of, random
from many_tensors import LEARNINGS, Learning, Weight, differentiate, quantize
from torch import Tensor

from fastqat.ops import estimators, multi_tensor

pytestmark = pytest.mark.usefixtures("one_thread")
on_all = pytest.mark.parametrize("backend", ("reference", "cpu", "cuda-on-host", "triton", "cuda"), indirect=True)
on_compiled = pytest.mark.parametrize("backend", ("cpu", "cuda-on-host", "triton", "cuda"), indirect=True)
NAN, INF = float("nan"), float("inf")
OPS = torch.ops.fastqat
X = [-9.0, -1.0, 0.0, 0.3, 2.0, 100.0, NAN, INF]
GRIDS = {"scale": ([NAN, 0.5], [2.0, 2.0]), "zero point": ([0.5, 0.5], [NAN, 2.0])}
QRANGE = torch.tensor([0, 7], dtype=torch.int32)


def channels(backend: str, grid: str, length: int = 8) -> tuple[Tensor, tuple]:
    """Two channels of the same elements, the grid of the first of which is not a number: x [2, n], and its grid."""
    scale, zero = (torch.tensor(values).to(device_of(backend)) for values in GRIDS[grid])
    x = torch.tensor([(X * (length // 8 + 1))[:length]] * 2).to(device_of(backend))
    return x, (scale, zero, None, QRANGE.to(x.device), 0, 1e-6)


@on_all
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("columns", (False, True))
def test_values_and_codes(backend: str, grid: str, dtype: torch.dtype, columns: bool) -> None:
    """All of one channel: values are NaN, codes that of 0 within the range; the other channel is as ever."""
    x, (scale, zero, _, qrange, axis, eps) = channels(backend, grid, 40)
    if columns:  # the channels are neighbours in memory
        x, axis = x.t().contiguous(), 1
    x = x.to(dtype)
    y = OPS.fake_quantize(x, scale, zero, None, qrange, axis, eps, None).movedim(axis, 0)
    codes = OPS.quantize(x, scale, zero, None, qrange, axis, eps, torch.uint8).movedim(axis, 0)
    assert y[0].isnan().all()
    assert y[1, :6].tolist() == [-1.0, -1.0, 0.0, 0.5, 2.0, 2.5] and y[1, 6].isnan() and y[1, 7] == 2.5
    assert set(codes[0].tolist()) == {2 if grid == "scale" else 0}
    assert codes[1, :8].tolist() == [0, 0, 2, 3, 6, 7, 2, 7]
    back = OPS.dequantize(codes.movedim(0, axis), scale, zero, None, qrange, axis, eps, dtype).movedim(axis, 0)
    assert back[0].isnan().all() and back[1, :6].tolist() == [-1.0, -1.0, 0.0, 0.5, 2.0, 2.5]


@on_all
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rounded", (True, False))
def test_gradients(backend: str, grid: str, rounded: bool) -> None:
    """No element of the channel passes one; its sums are NaN, and those of the other channel are as ever."""
    x, arguments = channels(backend, grid)
    g = torch.ones_like(x)
    dx, dscale, dzero = OPS.fake_quantize_backward(g, x, *arguments, rounded, False, 0.0)
    only = OPS.fake_quantize_backward_input(g, x, *arguments, rounded)
    assert not dx[0].any() and not only[0].any() and torch.equal(dx, only)
    assert dscale[0].isnan() and dzero[0].isnan()
    assert dx[1].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert dscale[1].item() == pytest.approx(-2 + 0 + 0 + (1 - 0.6) + 0 + 5 + 5, rel=1e-5)
    assert dzero[1].item() == pytest.approx(-0.5 * 3)


@on_all
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tensor_id", (-1, 3), ids=("nearest", "stochastic"))
def test_many_tensors(backend: str, grid: str, tensor_id: int) -> None:
    """Tracked and not: NaN, without a gradient to x; where it is tracked, nothing changes."""
    x, (scale, zero, _, qrange, axis, eps) = channels(backend, grid)
    case = GridCase(grid, x.cpu(), scale.cpu(), zero.cpu(), None, QRANGE, axis, eps)
    for momentum in (0.0, 0.1):
        weight = Weight(case, momentum, tensor_id=tensor_id).twin(device_of(backend))
        for step in range(3):
            (y,) = quantize(OPS.multi_tensor_fake_quantize, [weight], step, [0.25])
            weight.case.x[0] += 1.0
            assert y[0].isnan().all() and y[1, [0, 5, 7]].tolist() == [-1.0, 2.5, 2.5] and y[1, 6].isnan()
        if momentum:
            index = weight.state[0][0].int().cpu() & 31
            assert index.tolist() == [2 if grid == "scale" else 0] * 8
            assert not weight.state[1][0].any() and not weight.state[2][0].any()
        for rule in (Learning(), Learning(dampening=0.3)) if tensor_id < 0 else (Learning(estimators.STOCHASTIC),):
            ((dx, dscale, dzero),) = differentiate(
                OPS.multi_tensor_fake_quantize_backward, [weight], [torch.ones_like(x)], [rule], 2
            )
            assert dscale[0].isnan() and dzero[0].isnan() and not dscale[1].isnan()
            assert not dx[0].nan_to_num(7.0 if rule.dampening is None else 0.0).any()


@on_all
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("asked", ("y", "all", "drawn", "all drawn"))
def test_one_tensor(backend: str, grid: str, asked: str) -> None:
    """The op that gives all that one read can: NaN, the code of 0, no gradient; extremes and counts are those of x."""
    device, length = device_of(backend), 300
    x = torch.tensor((X * 40)[:length]).to(device)
    scale, zero = (torch.tensor(values[:1]).to(device) for values in GRIDS[grid])
    y, none = torch.zeros_like(x), x.new_empty(0)
    bits = [x.new_full(((length + 7) // 8,), 255, dtype=torch.uint8) for _ in range(2)]
    codes = x.new_full(((3 * length + 7) // 8,), 255, dtype=torch.uint8)
    low, high = x.new_tensor([INF]), x.new_tensor([-INF])
    empty = none.to(torch.uint8)
    results = (*bits, codes) if "all" in asked else (empty, empty, empty)
    noise = (1, 3) if "drawn" in asked else (0, -1)
    step, beyond = torch.tensor([4], device=device), none.to(torch.int64)
    OPS.fake_quantize_tensor(
        x, scale, zero, None, QRANGE.to(device), 1e-6, 0.0, True, *noise, step, none, 3, low, high, beyond, *results, y
    )
    assert y.isnan().all() and (low.item(), high.item()) == (-9.0, 100.0)
    if "all" in asked:
        code = 2 if grid == "scale" else 0
        bytes_of_8 = sum(code << (3 * k) for k in range(8)).to_bytes(3, "little")
        assert bytes(codes.tolist())[:110] == (bytes_of_8 * 40)[:110]
        assert not bits[0].any() and not bits[1].any()
        values = torch.zeros_like(x)
        OPS.dequantize_tensor(codes, scale, zero, None, QRANGE.to(device), 1e-6, 3, values)
        assert values.isnan().all()


@on_all
def test_range_search(backend: str) -> None:
    """A candidate with a NaN zero point, like one with a NaN scale, has a NaN error, and the others theirs."""
    x = random((5000,), 1).to(device_of(backend))
    scales = torch.full((70, 1), 0.4).to(x.device)
    zeros = torch.full((70, 1), 3.0).to(x.device)
    scales[3], zeros[64] = NAN, NAN
    errors = OPS.range_search(x, scales, zeros, QRANGE.to(x.device), None)[:, 0].cpu()
    wide = x.cpu().double()
    wanted = ((wide / 0.4).round().clamp(-3, 4) * float(np.float32(0.4)) - wide).square().sum().item()
    assert errors[[3, 64]].isnan().all()
    assert torch.cat([errors[:3], errors[4:64], errors[65:]]).tolist() == pytest.approx([wanted] * 68, rel=1e-5)


def infinite(dtype: torch.dtype, zero_point: bool) -> GridCase:
    """Channels whose scale is Inf, Inf, huge, and ordinary."""
    x = torch.tensor([[*X, -INF, 3e38, 1e-45, -0.0]] * 4).to(dtype)
    scale = torch.tensor([INF, INF, 1e38, 0.5])
    zero = torch.tensor([0.0, 2.0, 1.0, 3.0]) if zero_point else None
    qrange = torch.tensor([0, 7] if zero_point else [-4, 3], dtype=torch.int32)
    return GridCase(f"infinite {dtype} {zero_point}", x, scale, zero, None, qrange, 0, 0.0)


@on_compiled
@pytest.mark.parametrize("zero_point", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_infinite_scales(backend: str, dtype: torch.dtype, zero_point: bool) -> None:
    """With every estimator, drawn and not: each backend has the NaN, the Inf and the numbers of the definition."""
    device = device_of(backend)
    case = infinite(dtype, zero_point)
    for tensor_id in (-1, 3):
        ours = Weight(case, tensor_id=tensor_id).twin(device)
        theirs = Weight(case, tensor_id=tensor_id)
        (y,) = quantize(OPS.multi_tensor_fake_quantize, [ours], 2, [0.0])
        (want,) = quantize(multi_tensor.multi_tensor_fake_quantize, [theirs], 2, [0.0])
        assert torch.equal(y.cpu().nan_to_num(77.0), want.nan_to_num(77.0)), tensor_id
        assert want[0].isnan().all()  # 0 * Inf
        g = random(tuple(case.x.shape), 5).to(dtype)
        for number, rule in enumerate(LEARNINGS):
            if (rule.estimator == estimators.STOCHASTIC) != (tensor_id >= 0):
                continue
            got = differentiate(OPS.multi_tensor_fake_quantize_backward, [ours], [g.to(device)], [rule], 2)[0]
            wants = differentiate(multi_tensor.multi_tensor_fake_quantize_backward, [theirs], [g], [rule], 2)[0]
            for name, a, b in zip(("dx", "dscale", "dshift"), got, wants, strict=True):
                same = torch.isclose(a.cpu().float(), b.float(), rtol=1e-5, atol=1e-45, equal_nan=True)
                assert same.all(), (number, rule, name, tensor_id, a.cpu().tolist(), b.tolist())
