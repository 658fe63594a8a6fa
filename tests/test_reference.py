"""The reference against others: the oracle, literal vectors of the papers, ONNX, ATen, Random123, autograd."""

from __future__ import annotations

from fractions import Fraction

import cases
import numpy as np
import onnx
import oracle
import pytest
import torch
from cases import Call, grid_call
from onnx.reference import ReferenceEvaluator
from oracle import assert_results

from fastqat.ops import reference, schema

pytestmark = pytest.mark.usefixtures("one_thread")
GRID_OPS = tuple(op for op in schema.OPS if op not in cases.PLAIN_OPS)


def run(op: str, arguments: tuple) -> tuple:
    """Results of the reference, written into NaN where they are floating."""
    results = schema.OPS[op].allocate(*arguments)
    for result in results:
        result.fill_(torch.nan if result.is_floating_point() else 85)
    getattr(reference, op)(*arguments, *results)
    return results


def check(op: str, call: Call) -> None:
    """Compare the reference with the oracle."""
    wants = getattr(oracle, op)(*call.arguments)
    assert_results(schema.OPS[op].results, run(op, call.arguments), wants, call.arguments, call.label)


@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", GRID_OPS)
def test_oracle_agrees(op: str, dtype: torch.dtype, granularity: str) -> None:
    """Every op on every grid, scale and critical input."""
    for number, case in enumerate(cases.grid_cases(dtype, granularity)):
        check(op, grid_call(op, case, number))


@pytest.mark.parametrize("granularity", ("tensor", "channel"))
@pytest.mark.parametrize("op", GRID_OPS)
def test_oracle_agrees_on_shapes(op: str, granularity: str) -> None:
    """Every op on every shape, axis and memory layout."""
    for number, case in enumerate(cases.shaped_cases(torch.float32, granularity)):
        check(op, grid_call(op, case, number))


@pytest.mark.parametrize("op", cases.PLAIN_OPS)
def test_oracle_agrees_on_plain_ops(op: str) -> None:
    """pack, unpack and philox_uniform."""
    for call in cases.plain_calls(op):
        check(op, call)


def test_oracle_quotient_is_the_exact_one() -> None:
    """The oracle's codes are rint of the float32 nearest to the rational x / s."""
    grid = next(g for g in cases.GRIDS if g.name == "signed8")
    x, scale, *_ = cases.critical_block(grid, 0, torch.float32)
    low, high = grid.qmin, grid.qmax
    for c in (0, 1, 6, 11):
        row = x[c][x[c].isfinite()][::7]
        law = oracle.Grid(row, scale[c : c + 1], None, None, torch.tensor([low, high]), None, 0.0)
        for value, code in zip(row.tolist(), law.code(row).tolist(), strict=True):
            exact = Fraction(value) / Fraction(scale[c].item())
            near = np.float32(float(max(min(exact, Fraction(2) ** 100), -(Fraction(2) ** 100))))
            assert code == min(max(round(Fraction(float(near))), low), high), (value, scale[c].item())


LSQ_V = [-1.2, -0.41, -0.1, 0.04, 0.26, 0.69, 0.74, 0.76, 3.0]
SIGNED3 = (torch.tensor([0.25]), None, None, torch.tensor([-4, 3], dtype=torch.int32), None, 0.0)


def slopes(x: torch.Tensor, grid: tuple, rounded: bool) -> list[tuple[float, float, float]]:
    """dx, dscale, dshift of each element alone, for g = 1."""
    one = torch.ones(1)
    rows = [run("fake_quantize_backward", (one, v.view(1), *grid, rounded, False, 0.0)) for v in x]
    return [tuple(r.item() if r.numel() else 0.0 for r in row) for row in rows]


def test_lsq_vector() -> None:
    """methods.md 1.12.1: y, slopes and masks of LSQ under both masks."""
    x = torch.tensor(LSQ_V)
    y = run("fake_quantize", (x, *SIGNED3, None))[0]
    assert y.tolist() == [-1, -0.5, 0, 0, 0.25, 0.75, 0.75, 0.75, 0.75]
    unrounded, rounded = slopes(x, SIGNED3, False), slopes(x, SIGNED3, True)
    near = pytest.approx([-4, -0.36, 0.4, -0.16, -0.04, 0.24, 0.04, 3, 3], abs=2e-6)
    assert [s for _, s, _ in unrounded] == near
    assert [s for _, s, _ in rounded] == pytest.approx([-4, -0.36, 0.4, -0.16, -0.04, 0.24, 0.04, -0.04, 3], abs=2e-6)
    assert [d for d, _, _ in unrounded] == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert [d for d, _, _ in rounded] == [0, 1, 1, 1, 1, 1, 1, 1, 0]


def test_lsq_plus_vector() -> None:
    """methods.md 1.12.2: LSQ+ with s = 0.5, beta = -0.2, codes 0..3, unrounded mask."""
    x = torch.tensor([-1, -0.3, -0.1, 0.2, 0.9, 1.2, 1.5])
    grid = (torch.tensor([0.5]), None, torch.tensor([-0.2]), torch.tensor([0, 3], dtype=torch.int32), None, 0.0)
    y = run("fake_quantize", (x, *grid, None))[0]
    assert y.tolist() == pytest.approx([-0.2, -0.2, -0.2, 0.3, 0.8, 1.3, 1.3], abs=1e-7)
    dx, ds, dbeta = zip(*slopes(x, grid, False), strict=True)
    assert dx == (0, 0, 1, 1, 1, 1, 0) and dbeta == (1, 1, 0, 0, 0, 0, 1)
    assert ds == pytest.approx([0, 0, -0.2, 0.2, -0.2, 0.2, 3], abs=2e-6)


def test_lsq_grad_scale_counts_per_channel() -> None:
    """Sums times 1 / sqrt(N * Qp), N = elements per scale; Qp counts as at least 1."""
    x, g = cases.random((6, 35), 1), cases.random((6, 35), 2)
    for qmin, qmax, factor in ((-4, 3, (35 * 3) ** -0.5), (-1, 0, 35**-0.5)):
        grid = (torch.full((6,), 0.4), torch.zeros(6), None, torch.tensor([qmin, qmax], dtype=torch.int32), 0, 0.0)
        plain, scaled = (run("fake_quantize_backward", (g, x, *grid, True, flag, 0.0)) for flag in (False, True))
        assert torch.equal(plain[0], scaled[0])
        for a, b in zip(plain[1:], scaled[1:], strict=True):
            torch.testing.assert_close(b, a * factor, rtol=3e-7, atol=0)


ONNX_TYPES = (("INT8", -128, 127), ("UINT8", 0, 255), ("INT4", -8, 7), ("UINT4", 0, 15))


def onnx_codes(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, kind: str, axis: int) -> np.ndarray:
    """Codes and values of ONNX QuantizeLinear and DequantizeLinear (opset 21)."""
    helper, code = onnx.helper, getattr(onnx.TensorProto, kind)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"], axis=axis),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], axis=axis),
        helper.make_node("Cast", ["c"], ["wide"], to=onnx.TensorProto.INT32),
    ]
    shape = scale.shape if scale.size > 1 else []
    values = [int(v) for v in zero.reshape(-1)]
    constants = [
        helper.make_tensor("s", onnx.TensorProto.FLOAT, shape, scale.reshape(-1)),
        helper.make_tensor("z", code, shape, values),
    ]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)]
    outputs = [
        helper.make_tensor_value_info("wide", onnx.TensorProto.INT32, x.shape),
        helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, x.shape),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": x})


@pytest.mark.parametrize("axis", (None, 0, 1))
@pytest.mark.parametrize(("kind", "qmin", "qmax"), ONNX_TYPES)
def test_onnx_gives_the_same_codes(kind: str, qmin: int, qmax: int, axis: int | None) -> None:
    """QuantizeLinear and DequantizeLinear on lattice, midpoints and edges: codes and values equal."""
    scales, zeros = (0.0371, 0.25, 1.7, 3.3e-3, 0.1), (0, qmin, qmax, (qmin + qmax) // 2, 1)
    scale, zero = torch.tensor(scales), torch.tensor([float(z) for z in zeros])
    grid = cases.Grid("onnx", qmin, qmax)
    rows = cases.critical(scale, zero, torch.zeros(5), grid, torch.float32, 3)
    rows = torch.where(rows.abs() < 1e9, rows, 0.0)  # onnx casts what lies beyond int32 without saturating
    qrange = torch.tensor([qmin, qmax], dtype=torch.int32)
    parts = [(rows if axis == 0 else rows.t().contiguous(), scale, zero)]
    if axis is None:
        parts = [(rows[c], scale[c : c + 1], zero[c : c + 1]) for c in range(5)]
    for x, s, z in parts:
        want, value = onnx_codes(x.numpy(), s.numpy(), z.numpy(), kind, axis or 0)
        call = Call(kind, (x, s, z, None, qrange, axis, 0.0, torch.int32))
        assert_results(["codes"], run("quantize", call.arguments), [torch.tensor(want)], call.arguments, kind)
        call = Call(kind, (x, s, z, None, qrange, axis, 0.0, None))
        assert_results(["y"], run("fake_quantize", call.arguments), [torch.tensor(value)], call.arguments, kind)


@pytest.mark.parametrize("axis", (None, 0, 1))
def test_aten_gives_the_same_values_for_powers_of_two(axis: int | None) -> None:
    """torch.fake_quantize_* multiplies by 1 / s: exact for powers of two, where y and dx are equal."""
    scale = torch.tensor([0.25, 2.0**-7, 1.0, 4.0, 0.5])
    zero = torch.tensor([3, 0, 15, 8, 1], dtype=torch.int32)
    grid = cases.Grid("aten", 0, 15)
    rows = cases.critical(scale, zero.float(), torch.zeros(5), grid, torch.float32, 4)
    rows = torch.where(rows.abs() < 1e6, rows, 0.0)
    qrange = torch.tensor([0, 15], dtype=torch.int32)
    parts = [(rows[c], scale[c : c + 1], zero[c : c + 1]) for c in range(5)]
    if axis is not None:
        parts = [(rows if axis == 0 else rows.t().contiguous(), scale, zero)]
    for values, s, z in parts:
        x = values.clone().requires_grad_()
        if axis is None:
            y = torch.fake_quantize_per_tensor_affine(x, s.item(), z.item(), 0, 15)
        else:
            y = torch.fake_quantize_per_channel_affine(x, s, z, axis, 0, 15)
        g = cases.random(tuple(x.shape), 5)
        y.backward(g)
        args = (values, s, z.float(), None, qrange, axis, 0.0)
        assert_results(["y"], run("fake_quantize", (*args, None)), [y.detach()], args, "aten")
        assert_results(["dx"], run("fake_quantize_backward_input", (g, *args, True)), [x.grad], (g, *args), "aten")


@pytest.mark.parametrize("kind", ("zero_point", "offset"))
@pytest.mark.parametrize("axis", (None, 0, 1))
def test_float64_autograd_gives_the_same_gradients(axis: int | None, kind: str) -> None:
    """Gradients of the straight-through expression by autograd in float64 (mask on the rounded value)."""
    x, g = cases.random((7, 90), 1), cases.random((7, 90), 2)
    channels = 1 if axis is None else x.shape[axis]
    shape = [1, 1] if axis is None else [channels if d == axis else 1 for d in range(2)]
    scale, shift = cases.random((channels,), 3).abs() * 0.1 + 0.1, cases.random((channels,), 4) + 3
    zero, offset = (shift, None) if kind == "zero_point" else (None, -shift * 0.2)
    leaf = shift if offset is None else offset
    v, s, o = (t.double().requires_grad_() for t in (x, scale, leaf))
    wide_s, wide_o = s.view(shape), o.view(shape)
    z = wide_o + (wide_o.round() - wide_o).detach() if offset is None else torch.zeros(())
    r = (v if offset is None else v - wide_o) / wide_s
    code = (r + (r.round() - r).detach() + z).clamp(0, 15)
    y = wide_s * (code - z) + (0 if offset is None else wide_o)
    y.backward(g.double())
    grid = (scale, zero, offset, torch.tensor([0, 15], dtype=torch.int32), axis, 0.0)
    dx, dscale, dshift = run("fake_quantize_backward", (g, x, *grid, True, False, 0.0))
    assert torch.equal(dx.double(), v.grad)
    torch.testing.assert_close(dscale.double(), s.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dshift.double(), o.grad, rtol=1e-5, atol=1e-5)


RANDOM123 = (
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "want"), RANDOM123, ids=("zeros", "ones", "pi"))
def test_philox_known_answers_of_the_oracle(counter: tuple, key: tuple, want: tuple) -> None:
    """The known-answer vectors of Random123 for Philox4x32-10."""
    assert oracle.philox(counter, key) == want


def test_philox_known_answer() -> None:
    """Counter 0 under key 0 through the op itself: the top 24 bits of Random123's words."""
    u = run("philox_uniform", (torch.tensor([0]), 0, 0, 4))[0]
    assert [int(v * 2**24) for v in u.tolist()] == [w >> 8 for w in RANDOM123[0][2]]
