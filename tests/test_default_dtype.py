"""torch's default dtype decides nothing: ranges, schedules, tracking and learned bit-widths are the same to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import Dampening, FakeQuant, GradientQSpec, Oscillation, QConfig, QSpec, ranges, schedules
from fastqat.nn import tracking
from fastqat.ops import select

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float64, torch.bfloat16, torch.float16)
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """Another default for a while, without what was kept before it."""
    tracking._constant.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def estimated(**options: Any) -> list[Tensor]:
    fq = FakeQuant(**options)
    y = fq(X)
    fastqat.calibrate(fq, [X, 2 * X, 0.3 * X]) if options.get("range") != "fixed" else None
    return [y, fq(X), fq.eval()(X), *fq.state_dict().values()]


def trained(reference: bool = False) -> list[Tensor]:
    """Tracking, freezing, dampening, schedules, a range in hindsight, gradients, noise, and a reload."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, dtype=torch.float32), nn.ReLU(), nn.Linear(8, 4, dtype=torch.float32))
    for p in net.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float32, generator=generator)
    threshold = schedules.cosine(0.9, 0.5, steps=10)
    weight = QSpec(
        bits=3,
        axis=0,
        learn="scale",
        grad_scale="lsq",
        oscillation=Oscillation(0.2, threshold),
        dampening=Dampening(0.3),
    )
    activation = QSpec(bits=4, range="in_hindsight", symmetric=False)
    gradient = GradientQSpec(bits=4)
    fastqat.prepare(net, QConfig(weight=weight, activation=activation, gradient=gradient))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    with select.use_backend("reference") if reference else contextlib.nullcontext():
        for _ in range(6):
            net(torch.randn(24, 6, dtype=torch.float32, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [net.eval()(X), *net.state_dict().values()]


def learned() -> list[Tensor]:
    """Bit-widths, and bounds of ranges from batch normalization."""
    net = nn.Sequential(nn.Linear(6, 6, dtype=torch.float32), nn.BatchNorm1d(6, dtype=torch.float32), nn.ReLU())
    net.append(nn.Linear(6, 4, dtype=torch.float32))
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float32, generator=generator).abs()
    fastqat.prepare(net, QConfig(weight=QSpec(bits=8, axis=0), activation=QSpec(bits=8)))
    fastqat.calibrate(net, [X])
    widths = fastqat.AdaQAT(net, lam=0.3, lr_weight=0.4, lr_activation=0.2, per_layer=True, fixed=[])
    for _ in range(3):
        loss = net(X).square().mean()
        loss.backward()
        widths.step(loss, lambda: net(X).square().mean())
    numbers = [torch.tensor([w.number.value for w in widths.widths], dtype=torch.float64)]
    return [*numbers, *fastqat.AveragedModel(net).state_dict().values()]


def scheduled() -> list[Tensor]:
    steps = torch.arange(12)
    kinds = (schedules.cosine, schedules.linear, schedules.step)
    return [kind(0.3, 0.01, steps=10).tensor(steps) for kind in kinds] + [tracking.value_at(0.3, steps)]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    **{f"range {name}": (lambda n: lambda: estimated(bits=4, range=n))(name) for name in ranges.ESTIMATORS},
    **{
        f"affine {name}": (lambda n: lambda: estimated(bits=3, axis=1, range=n, symmetric=False))(name)
        for name in ("mse", "sqnr", "percentile", "running_minmax")
    },
    "fixed": lambda: estimated(bits=4, range="fixed", fixed_range=(-1.3, 1.1)),
    "stochastic": lambda: estimated(bits=4, estimator="stochastic", seed=3),
    "sigmoid": lambda: estimated(bits=4, estimator="sigmoid"),
    "training": trained,
    "training by the reference": lambda: trained(reference=True),
    "learned bits": learned,
    "schedules": scheduled,
}


@pytest.mark.parametrize("case", CASES)
def test_the_default_dtype_decides_nothing(case: str) -> None:
    """Each dtype gives the bits, and the dtypes, of float32; and none of it stays in a cache."""
    with default(torch.float32):
        wanted = CASES[case]()
    for dtype in DTYPES:
        with default(dtype):
            found = CASES[case]()
        again = CASES[case]()  # with whatever was kept
        for values in (found, again):
            for a, b in zip(values, wanted, strict=True):
                assert a.dtype == b.dtype and torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)), dtype


@pytest.mark.parametrize(
    "change", (lambda m: m.to("cpu"), nn.Module.half, nn.Module.double), ids=("to", "half", "double")
)
def test_moves_that_swap_tensors(change: Callable[[nn.Module], nn.Module]) -> None:
    """Quantizers keep values and dtypes under torch.__future__'s way to convert; the optimizer its Parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(FakeQuant(4, learn="scale"), FakeQuant(4, axis=1, learn="scale+offset"), FakeQuant(3, axis=1))
    net(X)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        change(net)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    state = net.state_dict()
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in before.items())
    assert [id(p) for p in net.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]
    net(X).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].scale, before["0.scale"])
