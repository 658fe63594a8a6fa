"""The public functions on tensors: results in every form, memory kept, and every bad argument by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastqat import arguments, functional

pytestmark = pytest.mark.usefixtures("one_thread")
GRANULARITIES = ((None, None), (0, None), (1, None), (-1, None), (0, 12), (1, 8), (2, 3))
of_granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
X = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(0))


def grid_of(x: Tensor, granularity: tuple) -> dict[str, Any]:
    """scale and zero_point that differ everywhere, and the granularity, as arguments of the functional."""
    axis, group = granularity
    shape = (1,) if axis is None else (x.shape[axis],)
    if group:
        shape += (x.numel() // x.shape[axis] // group,)
    count = torch.Size(shape).numel()
    scale = torch.linspace(0.1, 0.4, count).view(shape)
    return {"scale": scale, "zero_point": torch.arange(count).view(shape) % 7 + 0.3, "axis": axis, "group_size": group}


def rows_of(x: np.ndarray, granularity: tuple) -> np.ndarray:
    """An array as [scales, elements], in numpy."""
    axis, group = granularity
    return x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, 0).reshape(-1, group or x.size // x.shape[axis])


def in_rows(x: Tensor, granularity: tuple) -> np.ndarray:
    """A tensor as [scales, elements], in numpy."""
    return rows_of(x.numpy(), granularity)


@of_granularities
def test_codes_and_values(granularity: tuple) -> None:
    """quantize, dequantize and fake_quantize are the three lines of the numerics law."""
    grid = grid_of(X, granularity)
    s, z = (grid[n].numpy().reshape(-1, 1) for n in ("scale", "zero_point"))
    z = np.rint(z)
    code = np.clip(np.rint(in_rows(X, granularity) / s) + z, 0, 7)
    codes = functional.quantize(X, **grid, qmin=0, qmax=7)
    assert codes.dtype == torch.uint8 and codes.shape == X.shape
    np.testing.assert_array_equal(in_rows(codes, granularity), code)
    values = s * (code - z).astype(np.float32)
    for y in (
        functional.dequantize(codes, **grid, qmin=0, qmax=7),
        functional.fake_quantize(X, **grid, qmin=0, qmax=7),
    ):
        assert y.dtype == torch.float32
        np.testing.assert_array_equal(in_rows(y, granularity), values)
    assert functional.quantize(X, **grid, qmin=-8, qmax=7).dtype == torch.int8
    assert functional.quantize(X, **grid, qmin=0, qmax=7, dtype=torch.int32).dtype == torch.int32
    assert functional.dequantize(codes, **grid, qmin=0, qmax=7, dtype=torch.bfloat16).dtype == torch.bfloat16


def layouts(like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one shape in all kinds of memory, filled with what no result is."""
    kinds = [
        torch.empty_like(like, dtype=dtype),
        torch.empty_like(like, dtype=dtype, memory_format=torch.channels_last),
        torch.empty(*like.shape[:-1], 2 * like.shape[-1], dtype=dtype)[..., ::2],
        torch.empty(like.shape[::-1], dtype=dtype).permute(3, 2, 1, 0),
    ]
    return [kind.fill_(99) for kind in kinds]


@of_granularities
@pytest.mark.parametrize("name", ("fake_quantize", "quantize", "dequantize"))
def test_out(name: str, granularity: tuple) -> None:
    """Into memory of any layout, from x of any layout, the result is that of the plain call."""
    function, grid = getattr(functional, name), {**grid_of(X, granularity), "qmin": 0, "qmax": 7}
    x = (X.abs() * 3).to(torch.uint8) if name == "dequantize" else X
    want = function(x, **grid)
    dtypes = (torch.int8, torch.int32) if name == "quantize" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for out in layouts(x, dtype):
            for source in (x, x.contiguous(memory_format=torch.channels_last)):
                out.fill_(99)
                assert function(source, **grid, out=out) is out
                assert torch.equal(out, want.to(dtype))


def test_out_may_be_x() -> None:
    """In place."""
    x, grid = X.clone(), grid_of(X, (0, None))
    functional.fake_quantize(x, **grid, qmin=0, qmax=7, out=x)
    assert torch.equal(x, functional.fake_quantize(X, **grid, qmin=0, qmax=7))


@of_granularities
def test_strides_of_the_result(granularity: tuple) -> None:
    """Those of empty_like, for dense, permuted and sliced x; equal values for all of them."""
    grid = grid_of(X, granularity)
    want = functional.fake_quantize(X, **grid, qmin=0, qmax=7)
    for x in layouts(X, torch.float32):
        y = functional.fake_quantize(x.copy_(X), **grid, qmin=0, qmax=7)
        assert y.stride() == torch.empty_like(x).stride()
        assert torch.equal(y, want)


def saved_by(function: Callable, *args: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Result of a function, and all that autograd keeps for its backward pass."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return function(*args, **options), saved


@of_granularities
@pytest.mark.parametrize("learned", (False, True))
def test_nothing_saved_copies_x(granularity: tuple, learned: bool) -> None:
    """Every saved tensor is an input's memory, or no larger than a scale; for strided x in groups as well."""
    for x in layouts(X, torch.float32):
        x = x.copy_(X).requires_grad_()
        grid = {
            n: p.clone().requires_grad_(learned) if torch.is_tensor(p) else p
            for n, p in grid_of(X, granularity).items()
        }
        alive = {t.untyped_storage().data_ptr() for t in (x, grid["scale"], grid["zero_point"])}
        y, saved = saved_by(functional.fake_quantize, x, **grid, qmin=0, qmax=7)
        assert any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved)
        for t in saved:
            assert t.untyped_storage().data_ptr() in alive or t.numel() <= max(2, grid["scale"].numel())
        y.sum().backward()
        assert x.grad is not None and (grid["scale"].grad is not None) == learned


def test_out_dtype_rounds_once() -> None:
    """A bfloat16 result of float32 x is the float32 result rounded, and gradients come back in float32."""
    x, grid = X.clone().requires_grad_(), grid_of(X, (0, None))
    y = functional.fake_quantize(x, **grid, qmin=0, qmax=7, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, functional.fake_quantize(X, **grid, qmin=0, qmax=7).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_is_a_little_endian_bit_stream(bits: int) -> None:
    """The stream as one Python integer; unpack gives the codes back, signed and unsigned."""
    for shape in ((0,), (1,), (5, 3), (2, 7, 9)):
        codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))
        stream = sum(c << (i * bits) for i, c in enumerate(codes.flatten().tolist()))
        packed = functional.pack(codes.to(torch.uint8), bits)
        assert bytes(packed.tolist()) == stream.to_bytes((codes.numel() * bits + 7) // 8, "little")
        assert torch.equal(functional.unpack(packed, bits, shape, signed=False), codes.to(torch.uint8))
        signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8)
        assert torch.equal(functional.pack(signed, bits), packed)
        assert torch.equal(functional.unpack(packed, bits, shape), signed)


@of_granularities
def test_minmax(granularity: tuple) -> None:
    """Of the finite values, in the shape of a scale."""
    x = X.clone()
    x[0, 0, 0, 0], x[1, 2, 0, 1], x[3, 5, 1, 1] = torch.nan, torch.inf, -torch.inf
    rows = np.ma.masked_invalid(in_rows(x, granularity))
    axis, group = granularity
    low, high = functional.minmax(x, axis=axis, group_size=group)
    assert low.shape == high.shape == grid_of(x, granularity)["scale"].shape
    np.testing.assert_array_equal(low.flatten(), rows.min(1).filled(np.inf))
    np.testing.assert_array_equal(high.flatten(), rows.max(1).filled(-np.inf))


@of_granularities
@pytest.mark.parametrize("affine", (False, True))
def test_range_search(granularity: tuple, affine: bool) -> None:
    """Squared errors of all candidates against float64."""
    grid = grid_of(X, granularity)
    fractions = torch.tensor([0.3, 0.7, 1.0, 2.5]).view(-1, *[1] * grid["scale"].dim())
    scales, zero_points = grid["scale"] * fractions, grid["zero_point"] * fractions
    errors = functional.range_search(
        X, scales, zero_points if affine else None, qmin=0, qmax=7, axis=granularity[0], group_size=granularity[1]
    )
    assert errors.shape == scales.shape
    rows = in_rows(X, granularity).astype(np.float64)
    for k in range(4):
        s = scales[k].numpy().reshape(-1, 1).astype(np.float64)
        z = np.clip(np.rint(zero_points[k].numpy().reshape(-1, 1)), 0, 7) * affine
        want = ((s * (np.clip(np.rint(rows / s) + z, 0, 7) - z) - rows) ** 2).sum(1)
        np.testing.assert_allclose(errors[k].flatten(), want, rtol=1e-5)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers (Salmon et al., SC 2011)."""
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_philox() -> None:
    """The generator's published vector, then every argument's place in counter and key."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed, step, tensor_id in (
        (0, 0, 0),
        (7, 3, 2),
        (2**64 - 5, 2**31 + 1, 2**32 - 1),
        (2**63 + 9, 1, 0),
        (2**62, 1, 0),
    ):
        u = functional.philox_uniform((3, 5), seed=seed, step=torch.tensor([step]), tensor_id=tensor_id)
        key = [seed & 0xFFFFFFFF, seed >> 32]
        bits = [philox([i // 4, 0, step, tensor_id], key)[i % 4] for i in range(15)]
        assert u.shape == (3, 5) and u.flatten().tolist() == [(b >> 8) * 2.0**-24 for b in bits]


@pytest.mark.parametrize("scope", (torch.inference_mode, FakeTensorMode))
def test_training_after_inference_and_after_fake_tensors(scope: Callable) -> None:
    """Nothing that a call keeps for the next belongs to the mode that it was made in."""
    codes = {torch.inference_mode: (-21, 20), FakeTensorMode: (-23, 22)}[scope]  # ranges that no other test uses
    with scope() as mode:
        x, scale = (mode.from_tensor(t) if mode else t for t in (X, torch.ones(1)))
        functional.fake_quantize(x, scale, qmin=codes[0], qmax=codes[1])
    x = X.clone().requires_grad_()
    functional.fake_quantize(x, torch.ones(1), qmin=codes[0], qmax=codes[1]).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with scope() as mode:  # and the other way round
        x, scale = (mode.from_tensor(t) if mode else t for t in (X, torch.ones(1)))
        assert type(functional.fake_quantize(x, scale, qmin=codes[0], qmax=codes[1])) is type(x)


def test_calls_that_differ_in_one_argument() -> None:
    """What a call asks for is its own, whatever calls came before it that differ from it in one thing."""
    scale, zero, channels = torch.full((1,), 0.2), torch.full((1,), 1.6), torch.linspace(0.1, 0.4, 6)
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"zero_point": zero},
        {"offset": zero},
        {"qmin": -5},
        {"qmax": 2},
        {"scale": channels, "axis": 1},
        {"scale": channels[:4], "axis": 0},
        {"scale": channels[:4].view(4, 1).repeat(1, 2), "axis": 0, "group_size": 12},
        {"eps": 0.5},
        {"ste_mask": "unrounded"},
        {"grad_scale": "lsq"},
        {"grad_scale": 3.0},
        {"out_dtype": torch.bfloat16},
        {"activation": "relu"},
        {"activation": "relu6"},
    )

    def results(change: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
        call = {"scale": scale, "qmin": -40, "qmax": 39, **change}
        call["scale"] = call["scale"].clone().requires_grad_()
        x = (X * 8).to(dtype)
        x[0, 0, 0, 0] = 7.85  # between the two masks
        x.requires_grad_()
        y = functional.fake_quantize(x, **call)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, call["scale"]))]

    cases = [(change, dtype) for change in changes for dtype in (torch.float32, torch.float16)]
    fresh = []
    for case in cases:
        arguments._memory.cache_clear()
        fresh.append(results(*case))
    for case, wants in zip(cases, fresh, strict=True):  # each comes after all others now
        for got, want in zip(results(*case), wants, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want), case
    plain = [t.flatten().tolist() for t in fresh[0]]
    for case, got in zip(cases[1:], fresh[1:], strict=True):
        assert [t.flatten().tolist() for t in got] != plain, case  # or the change would not show


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_two_widths(axis: int | None) -> None:
    """Both results are the law's, each on its own grid; every argument is checked by name."""
    grid = grid_of(X, (axis, None))
    scales = torch.stack([grid["scale"], grid["scale"] * 15 / 7])
    zero_points = torch.stack([grid["zero_point"], grid["zero_point"] / 2])
    codes = {"qmin": (0, 0), "qmax": (15, 7)}
    made = functional.fake_quantize_two_widths(X, scales, zero_points, **codes, axis=axis)
    for y, s, z, qmax in zip(made, scales.numpy(), zero_points.numpy(), codes["qmax"], strict=True):
        s, z = s.reshape(-1, 1), np.rint(z.reshape(-1, 1))
        code = np.clip(np.rint(in_rows(X, (axis, None)) / s) + z, 0, qmax)
        np.testing.assert_array_equal(in_rows(y, (axis, None)), s * (code - z).astype(np.float32))
    assert not torch.equal(*made)
    for change, message in (
        ({"scales": scales[0]}, "scales: wanted"),
        ({"scales": -scales}, "scales: wanted"),
        ({"qmax": 15}, "qmax: wanted the codes of two grids; got 15"),
        ({"zero_points": zero_points[:1]}, "zero_points: wanted"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            arguments = {"scales": scales, "zero_points": zero_points, **codes, **change}
            functional.fake_quantize_two_widths(X, **arguments, axis=axis)
