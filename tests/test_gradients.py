"""Gradients of the functional against autograd, in float64, through a surrogate made from the equations.

The surrogate replaces rint(r) by r + const(rint(r) - r), and clamps with a mask that float32 decides; what autograd
then gives is the straight-through estimator, of any order. It calls no code of fastqat.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fastqat import functional

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 4, 2, 6)


class Grid(NamedTuple):
    """Codes, and which of zero_point and offset there is."""

    qmin: int
    qmax: int
    shift: str | None = None


GRIDS = {
    "signed4": Grid(-8, 7),
    "restricted3": Grid(-3, 3),
    "signed1": Grid(-1, 0),
    "unsigned8": Grid(0, 255),
    "affine3": Grid(0, 7, "zero_point"),
    "signed_affine4": Grid(-8, 7, "zero_point"),
    "offset2": Grid(0, 3, "offset"),
    "offset4": Grid(-8, 7, "offset"),
}
GRANULARITIES = {
    "tensor": (None, None),
    **{f"axis{a}": (a, None) for a in (0, 1, 2, -1)},
    **{f"axis{a}_group{n}": (a, n) for a, n in ((0, 12), (1, 18), (2, 1), (-1, 8))},
}
of_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
of_granularities = pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
of_masks = pytest.mark.parametrize("ste_mask", ("rounded", "unrounded"))


def parameter_shape(granularity: tuple) -> tuple[int, ...]:
    """Shape of a scale for a tensor of SHAPE."""
    axis, group = granularity
    if axis is None:
        return (1,)
    return (SHAPE[axis],) if group is None else (SHAPE[axis], torch.Size(SHAPE).numel() // SHAPE[axis] // group)


def spread(p: Tensor, granularity: tuple) -> Tensor:
    """A parameter with its value at every element of a tensor of SHAPE."""
    axis, group = granularity
    if axis is None:
        return p.expand(SHAPE)
    moved = torch.empty(SHAPE).movedim(axis, 0).shape
    each = p.reshape(p.shape[0], -1)
    each = each.repeat_interleave(moved[1:].numel() // each.shape[1], 1)
    return each.reshape(moved).movedim(0, axis)


def problem(grid: Grid, granularity: tuple, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """x [SHAPE] of the dtype, scale and shift float32: some values clipped on each side, some on the border."""
    generator = torch.Generator().manual_seed(seed)
    shape = parameter_shape(granularity)
    scale = (0.5 + torch.rand(shape, generator=generator)) * 3 / (grid.qmax - grid.qmin)
    shift = None
    if grid.shift == "zero_point":
        shift = grid.qmin - 1 + (grid.qmax - grid.qmin + 2) * torch.rand(shape, generator=generator)
    elif grid.shift == "offset":
        shift = torch.randn(shape, generator=generator) / 2
    x = torch.randn(SHAPE, generator=generator) * 1.5
    if grid.shift is None:  # half a step beyond the highest code, where the two masks disagree
        x.view(-1)[::7] = (spread(scale, granularity).reshape(-1) * (grid.qmax + 0.3))[::7]
    return {"x": x.to(dtype), "scale": scale, "shift": shift}


def masks(x: Tensor, s: Tensor, z: Tensor, o: Tensor, grid: Grid, rounded: bool) -> tuple[Tensor, Tensor]:
    """rint(r), and where the gradient passes, as numpy's float32 sees them; all arguments spread to SHAPE."""
    x, s, z, o = (t.detach().float().numpy() for t in (x, s, z, o))
    r = (x - o) / s if grid.shift == "offset" else x / s
    k = np.rint(r)
    at = k if rounded else r
    return torch.from_numpy(k).double(), torch.from_numpy((at >= grid.qmin - z) & (at <= grid.qmax - z))


def surrogate(
    x: Tensor, scale: Tensor, shift: Tensor | None, grid: Grid, granularity: tuple, ste_mask: str, factor: float = 1.0
) -> Tensor:
    """The differentiable stand-in of fake quantization; all tensors float64."""

    def scaled(p: Tensor) -> Tensor:  # the value of p, its gradient times the factor
        return spread(p * factor + (p - p * factor).detach(), granularity)

    zero = torch.zeros_like(x)
    s, z, o = scaled(scale), zero, zero
    if grid.shift == "zero_point":
        z = scaled(shift)
        z = z + (z.round().clamp(grid.qmin, grid.qmax) - z).detach()
    elif grid.shift == "offset":
        o = scaled(shift)
    k, mask = masks(x, s, z, o, grid, ste_mask == "rounded")
    r = (x - o) / s
    end = torch.where(r.detach() < grid.qmin - z.detach(), grid.qmin - z, grid.qmax - z)
    return s * torch.where(mask, r + (k - r).detach(), end) + o


def leaves(p: dict[str, Any]) -> list[Tensor]:
    """x, scale and shift that require gradients."""
    return [t.clone().requires_grad_() for t in p.values() if t is not None]


def ours(inputs: list[Tensor], grid: Grid, granularity: tuple, **options: Any) -> Tensor:
    """fake_quantize of x, scale and shift."""
    x, scale, *shift = inputs
    axis, group = granularity
    named = {grid.shift: shift[0]} if grid.shift else {}
    return functional.fake_quantize(
        x, scale, **named, qmin=grid.qmin, qmax=grid.qmax, axis=axis, group_size=group, **options
    )


def theirs(inputs: list[Tensor], grid: Grid, granularity: tuple, ste_mask: str, factor: float = 1.0) -> Tensor:
    """The surrogate of the same."""
    x, scale, *shift = inputs
    return surrogate(x, scale, shift[0] if shift else None, grid, granularity, ste_mask, factor)


def sum_bounds(
    inputs: list[Tensor], g: Tensor, grid: Grid, granularity: tuple, ste_mask: str, factor: float
) -> list[Tensor]:
    """1e-6 of sum |terms| for scale and shift; on the offset grid the rounding of x - o counts as a term of scale."""
    x, *parameters = (t.detach() for t in inputs)
    each = [spread(p, granularity).clone().requires_grad_() for p in parameters]
    terms = torch.autograd.grad(theirs([x, *each], grid, (None, None), ste_mask, factor), each, g)
    rounding = ((x.abs() + each[1].abs()) / each[0]).detach() if grid.shift == "offset" else 0.0
    bounds = []
    for p, term, extra in zip(parameters, terms, (rounding, 0.0), strict=False):
        leaf = p.clone().requires_grad_()
        total = (term.abs() + factor * g.abs() * extra).detach()
        bounds.append(1e-6 * torch.autograd.grad((spread(leaf, granularity) * total).sum(), leaf)[0])
    return bounds


def check(
    p: dict[str, Any], g: Tensor, grid: Grid, granularity: tuple, ste_mask: str, factor: float, **options
) -> None:
    """Value and first gradients of the functional against the surrogate."""
    inputs = leaves(p)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    y, want = (
        ours(inputs, grid, granularity, ste_mask=ste_mask, **options),
        theirs(doubles, grid, granularity, ste_mask, factor),
    )
    step = 2.0**-7 if y.dtype == torch.bfloat16 else 1e-6
    assert bool(((y - want).abs() <= step * (want.abs() + 1)).all())
    got = torch.autograd.grad(y, inputs, g)
    wants = torch.autograd.grad(want, doubles, g.double())
    for t, d in zip(inputs, got, strict=True):
        assert d.dtype == t.dtype and d.shape == t.shape
    assert torch.equal(got[0], torch.where(wants[0] != 0, g, 0).to(p["x"].dtype))  # dx is g or 0, to the bit
    bounds = sum_bounds(doubles, g.double(), grid, granularity, ste_mask, factor)
    for d, w, bound in zip(got[1:], wants[1:], bounds, strict=True):
        assert bool(((d - w).abs() <= bound).all()), (d, w)


@of_masks
@of_granularities
@of_grids
def test_gradients_are_those_of_the_surrogate(grid: Grid, granularity: tuple, ste_mask: str) -> None:
    """x, scale, zero point and offset, on every grid and granularity, with each factor on the gradients."""
    p = problem(grid, granularity)
    g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    elements = g.numel() / p["scale"].numel()
    for option, factor in ((None, 1.0), (0.25, 0.25), ("lsq", (elements * max(grid.qmax, 1)) ** -0.5)):
        check(p, g, grid, granularity, ste_mask, factor, grad_scale=option)


@pytest.mark.parametrize("out_dtype", (None, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("grid", (GRIDS["signed4"], GRIDS["affine3"], GRIDS["offset4"]), ids=str)
def test_gradients_of_mixed_dtypes(grid: Grid, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """bfloat16 in, out, or both: g has the dtype of the result, dx that of x, the sums are float32."""
    granularity = (1, None)
    g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(out_dtype or dtype)
    check(problem(grid, granularity, 3, dtype), g, grid, granularity, "rounded", 1.0, out_dtype=out_dtype)


@of_granularities
def test_gradients_of_expanded_and_strided_g(granularity: tuple) -> None:
    """The gradient of a sum has stride 0, that of a transposed use is strided."""
    grid = GRIDS["affine3"]
    check(problem(grid, granularity), torch.ones(()).expand(SHAPE), grid, granularity, "rounded", 1.0)
    strided = torch.randn(SHAPE[::-1], generator=torch.Generator().manual_seed(4)).permute(3, 2, 1, 0)
    check(problem(grid, granularity), strided, grid, granularity, "rounded", 1.0)


@of_masks
@of_granularities
@of_grids
def test_second_derivatives_are_those_of_the_surrogate(grid: Grid, granularity: tuple, ste_mask: str) -> None:
    """All of (dx, dscale, dshift) by all of (g, x, scale, shift)."""
    p = problem(grid, granularity, seed=5)
    elements = torch.Size(SHAPE).numel() / p["scale"].numel()
    for option, factor in ((None, 1.0), (0.5, 0.5), ("lsq", (elements * max(grid.qmax, 1)) ** -0.5)):
        results = []
        for run, dtype, settings in (
            (ours, torch.float32, {"grad_scale": option}),
            (theirs, torch.float64, {"factor": factor}),
        ):
            generator = torch.Generator().manual_seed(6)
            inputs = [t.detach().to(dtype).requires_grad_() for t in leaves(p)]
            g = torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_()
            y = run(inputs, grid, granularity, ste_mask=ste_mask, **settings)
            firsts = torch.autograd.grad(y, inputs, g, create_graph=True)
            along = [torch.randn(d.shape, generator=generator).to(dtype) for d in firsts]
            loss = sum((d * v).sum() for d, v in zip(firsts, along, strict=True))
            # The surrogate's graph leads everywhere, with zeros; ours leads nowhere where it is zero.
            results.append(torch.autograd.grad(loss, [g, *inputs], allow_unused=True, materialize_grads=True))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_second_derivative_by_g_of_dx_alone() -> None:
    """dx is linear in g: its derivative by g is the mask, with nothing learned."""
    x = torch.tensor([-9.0, -1.0, 0.2, 9.0], requires_grad=True)
    g = torch.ones(4, requires_grad=True)
    y = functional.fake_quantize(x, torch.tensor([1.0]), qmin=-4, qmax=3)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (dg,) = torch.autograd.grad((dx * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), g)
    assert dg.tolist() == [0.0, 2.0, 3.0, 0.0]


def slopes(x: list[float], **grid: Any) -> dict[str, list[float]]:
    """y, dx, and the terms of each sum: one element at a time."""
    found: dict[str, list[float]] = {name: [] for name in ("y", "x", *(n for n in grid if torch.is_tensor(grid[n])))}
    for value in x:
        tensors = {n: t.clone().requires_grad_() for n, t in grid.items() if torch.is_tensor(t)}
        tensors["x"] = torch.tensor([float(value)], requires_grad=True)
        y = functional.fake_quantize(**{**grid, **tensors})
        y.backward()
        found["y"].append(y.item())
        for name, t in tensors.items():
            found[name].append(t.grad.item())
    return found


def test_literal_vector_of_lsq() -> None:
    """LSQ (1902.08153): values and gradients under both masks."""
    v = [-1.2, -0.41, -0.1, 0.04, 0.26, 0.69, 0.74, 0.76, 3]
    for mask, passes, ds in (
        ("unrounded", [0, 1, 1, 1, 1, 1, 1, 0, 0], [-4, -0.36, 0.4, -0.16, -0.04, 0.24, 0.04, 3, 3]),
        ("rounded", [0, 1, 1, 1, 1, 1, 1, 1, 0], [-4, -0.36, 0.4, -0.16, -0.04, 0.24, 0.04, -0.04, 3]),
    ):
        got = slopes(v, scale=torch.tensor([0.25]), qmin=-4, qmax=3, ste_mask=mask)
        assert got["y"] == [-1, -0.5, 0, 0, 0.25, 0.75, 0.75, 0.75, 0.75]
        assert got["x"] == passes
        assert got["scale"] == pytest.approx(ds, abs=1e-6)


def test_literal_vector_of_lsq_plus() -> None:
    """LSQ+ (2004.09576): values and gradients of x, scale and offset."""
    x = [-1, -0.3, -0.1, 0.2, 0.9, 1.2, 1.5]
    got = slopes(x, scale=torch.tensor([0.5]), offset=torch.tensor([-0.2]), qmin=0, qmax=3, ste_mask="unrounded")
    assert got["y"] == pytest.approx([-0.2, -0.2, -0.2, 0.3, 0.8, 1.3, 1.3], abs=1e-6)
    assert got["x"] == [0, 0, 1, 1, 1, 1, 0]
    assert got["scale"] == pytest.approx([0, 0, -0.2, 0.2, -0.2, 0.2, 3], abs=1e-6)
    assert got["offset"] == [1, 1, 0, 0, 0, 0, 1]


def test_nan_and_infinity() -> None:
    """NaN takes part in no gradient; infinity saturates."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.4], requires_grad=True)
    scale, zero_point = torch.tensor([0.5], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    y = functional.fake_quantize(x, scale, zero_point, qmin=0, qmax=7)
    assert y[0].isnan() and y[1:].tolist() == [3.0, -0.5, 0.5]
    y.backward(torch.tensor([7.0, 1.0, 10.0, 100.0]))
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 100.0]
    assert scale.grad.item() == pytest.approx(6 - 10 + 100 * 0.2, rel=1e-6)
    assert zero_point.grad.item() == -0.5 * 11


@pytest.mark.parametrize("value", (1e-12, 0.0, -3.0))
def test_gradient_passes_the_floor_of_the_scale(value: float) -> None:
    """Below eps the kernels use eps, and the gradient of the scale is what it would be at eps."""
    x, scale = torch.tensor([-3.0, 0.26, 1.0]), torch.tensor([value], requires_grad=True)
    y = functional.fake_quantize(x, scale, qmin=-2, qmax=1, eps=0.25)
    assert y.tolist() == [-0.5, 0.25, 0.25]
    y.sum().backward()
    assert scale.grad.item() == pytest.approx(-2 + (1 - 0.26 / 0.25) + 1, abs=1e-6)
