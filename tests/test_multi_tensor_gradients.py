"""The backward op on many tensors: dx equal on every backend, but for the sigmoid; sums within the law of float64."""

from __future__ import annotations

import dataclasses

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import GridCase, device_of
from many_tensors import (
    LEARNINGS,
    Learning,
    Weight,
    assert_same,
    differentiate,
    move,
    of_dtypes,
    of_granularities,
    on_backends,
    walking,
    with_random_state,
)
from oracle import Within
from torch import Tensor

from fastqat.ops import estimators, multi_tensor, words

pytestmark = pytest.mark.usefixtures("one_thread")


def expected_sums(weight: Weight, g: Tensor, learning: Learning, step: int) -> tuple[Within, Within | Tensor]:
    """dscale and dshift from the equations in float64; E, which is defined in float32, is rounded to it."""
    case = weight.case
    with np.errstate(all="ignore"):
        grid = oracle.Grid(case.x, *case.grid)
        r, exact, wide = grid.ratio(case.x), grid.exact_ratio(case.x), oracle.as_float32(g).astype(np.float64)
        low, high = grid.low - grid.z, grid.high - grid.z
        rounded = np.rint(r.astype(np.float64))
        if learning.estimator == estimators.STOCHASTIC:
            (u,) = oracle.philox_uniform(step, weight.seed, weight.tensor_id, case.x.numel())
            rounded = np.floor(r + u.numpy().reshape(r.shape)).astype(np.float64)
        tested = rounded if learning.rounded_mask else r.astype(np.float64)
        inside, level = (tested >= low) & (tested <= high), np.clip(rounded, low, high)
        if weight.momentum:
            word = words.unpacked(weight.state[0].contiguous())
            settled = word.settled.numpy() & ~np.isnan(r)
            level, inside = np.where(settled, low + word.index.numpy(), level), inside & ~settled
        factor = slope_factor(learning, r, wide, grid.s)
        within = level if learning.estimator == estimators.PACT else factor * exact
        nan = np.isnan(oracle.as_float32(case.x))
        count = case.x.numel() // max(case.scale.numel(), 1)
        lsq = 1.0 / np.sqrt(max(count, 1) * max(grid.high, 1)) if learning.lsq else 1.0
        terms = np.where(nan, 0.0, wide * (level - np.where(inside, within, 0.0))) * lsq
        dscale = oracle.total(terms, case.axis)
        if learning.estimator == estimators.SIGMOID:  # its E is not defined bit for bit
            off = np.abs(np.where(nan | ~inside, 0.0, wide * within)) * lsq
            dscale.bound += 2e-6 * torch.from_numpy(oracle.along(off, case.axis).sum(1))
        if case.zero_point is None and case.offset is None:
            return dscale, torch.empty(0)
        slope = 1.0 if case.offset is not None else -grid.s.astype(np.float64)
        dshift = oracle.total(np.where(nan | inside, 0.0, wide * slope) * lsq, case.axis)
        dshift.bound[torch.from_numpy(np.isnan(grid.s).reshape(-1))] = torch.inf
        return dscale, dshift


def slope_factor(learning: Learning, r: np.ndarray, g: np.ndarray, s: np.ndarray) -> np.ndarray:
    """E of an estimator from r in float32 (its formula: fastqat.ops.estimators)."""
    f, k = (r - np.rint(r)).astype(np.float64), float(np.float32(learning.strength))
    if learning.estimator == estimators.EWGS:
        return (1 + (k * np.sign(g) * f).astype(np.float32)).astype(np.float32).astype(np.float64)
    if learning.estimator == estimators.SIGMOID:
        return 0.5 * k / np.tanh(0.5 * k) / np.cosh(k * (0.5 - np.abs(f))) ** 2
    if learning.estimator == estimators.PSG:
        return (k * (np.abs(f) * s).astype(np.float32)).astype(np.float32).astype(np.float64)
    return np.ones_like(f)


@of_granularities
@of_dtypes
@on_backends
def test_gradients(backend: str, dtype: torch.dtype, granularity: str) -> None:
    """Every estimator, mask, dampening and state of tracking on critical inputs; sums within the law."""
    op, device = torch.ops.fastqat.multi_tensor_fake_quantize_backward, device_of(backend)
    turn = cases.GRANULARITIES.index(granularity) + cases.DTYPES.index(dtype)
    for number, case in enumerate(cases.grid_cases(dtype, granularity, few=True)):
        for learning in LEARNINGS if backend == "cpu" else (LEARNINGS[(number + 3 * turn) % len(LEARNINGS)],):
            weight = with_random_state(case, number)
            tensor_id = 5 if learning.estimator == estimators.STOCHASTIC else -1
            tracked = (number + turn + learning.estimator) % 3 > 0
            weight = dataclasses.replace(weight, momentum=weight.momentum * tracked, tensor_id=tensor_id)
            g = cases.incoming(case, number)
            label = f"{case.label}, {learning}, tracked {tracked}"
            (got,) = differentiate(op, [weight.twin(device)], [g.to(device)], [learning], 44)
            define = multi_tensor.multi_tensor_fake_quantize_backward
            (want,) = differentiate(define, [weight], [g], [learning], 44)
            check_gradients(got, want, weight, g, learning, label)


def check_gradients(got: tuple, want: tuple, weight: Weight, g: Tensor, learning: Learning, label: str) -> None:
    """dx equal to the definition, or near it for the sigmoid; the sums within the law."""
    if learning.estimator == estimators.SIGMOID:
        step = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[want[0].dtype]
        tiny = torch.finfo(want[0].dtype).smallest_normal
        near = want[0].double().abs() * step + (1e-6 * g.double().abs() + tiny).nan_to_num(0, torch.inf)
        want = (Within(want[0].double(), near.broadcast_to(want[0].shape)), *want[1:])
        assert not oracle.wrong(got[0].cpu(), want[0]).any(), f"{label}: dx"
    else:
        assert_same(("dx",), [got[0]], [want[0]], label)
    if learning.learned:
        sums = expected_sums(weight, g, learning, 44)
        oracle.assert_results(("dscale", "dshift"), [t.cpu() for t in got[1:]], sums, (g, weight.case.x), label)


@on_backends
def test_gradients_of_tiny_weights(backend: str) -> None:
    """E = lambda * |x - y| down to the subnormals, where a remainder of the quotient is no longer exact."""
    x = torch.logspace(-45, -30, 400).mul(torch.tensor([1.0, -1.0]).repeat(200))
    qrange, learning = torch.tensor([-4, 3], dtype=torch.int32), Learning(estimators.PSG, 7.0)
    weight = Weight(GridCase("tiny", x, torch.tensor([1.7]), None, None, qrange, None, 0.0))
    g, op = torch.full_like(x, 1e8), torch.ops.fastqat.multi_tensor_fake_quantize_backward
    (got,) = differentiate(op, [weight.twin(device_of(backend))], [g.to(device_of(backend))], [learning], 0)
    assert (got[0].cpu().double() - 7e8 * x.double().abs()).abs().max() < 1e-6 * 7e8 * 1e-30
    (want,) = differentiate(multi_tensor.multi_tensor_fake_quantize_backward, [weight], [g], [learning], 0)
    assert_same(("dx",), got[:1], want[:1], "tiny")


@on_backends
def test_scale_gradient_of_one_weight_of_small_slope(backend: str) -> None:
    """ds = -E * x / s in the bin of 0, where x / s itself must not be subtracted and added again: E = 0.001 here."""
    x, qrange = torch.tensor([0.25]), torch.tensor([-4, 3], dtype=torch.int32)
    weight = Weight(GridCase("small slope", x, torch.tensor([1.0]), None, None, qrange, None, 0.0))
    op, g = torch.ops.fastqat.multi_tensor_fake_quantize_backward, torch.ones(1)
    learning = Learning(estimators.PSG, 0.004)
    assert learning.learned and not learning.lsq
    (got,) = differentiate(op, [weight.twin(device_of(backend))], [g.to(device_of(backend))], [learning], 0)
    assert float(got[1]) == pytest.approx(-0.001 * 0.25, rel=1e-6)


@on_backends
def test_gradients_of_many_tensors_are_those_of_each(backend: str) -> None:
    """One call for the weights of WALKS, dense or not, empty or not: the bits of calls for each alone."""
    op = torch.ops.fastqat.multi_tensor_fake_quantize_backward
    define = multi_tensor.multi_tensor_fake_quantize_backward
    weights = [with_random_state(w.case, i) if w.momentum else w for i, w in enumerate(walking()[0])]
    weights = [dataclasses.replace(w, tensor_id=i) for i, w in enumerate(weights)]
    for t, w in enumerate(weights):
        move(w.case, t)
    gs = [cases.incoming(w.case, number) for number, w in enumerate(weights)]
    learning = [LEARNINGS[(i + 8) % len(LEARNINGS)] for i in range(len(weights))]
    weights, gs = [w.twin(device_of(backend)) for w in weights], [g.to(device_of(backend)) for g in gs]
    together = differentiate(op, weights, gs, learning, 44)
    for i, w in enumerate(weights):
        (alone,) = differentiate(op, [w], [gs[i]], [learning[i]], 44)
        for a, b in zip(together[i], alone, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), w.case.label
        (want,) = differentiate(define, [w.twin()], [gs[i].cpu()], [learning[i]], 44)
        check_gradients(alone, want, w.twin(), gs[i].cpu(), learning[i], w.case.label)
