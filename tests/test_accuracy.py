"""How near to float64 the float32 of the kernels comes: search errors, slopes, DoReFa; when the t of schedules is 0."""

from __future__ import annotations

import pytest
import torch
from cases import GridCase, device_of, random
from many_tensors import Learning, Weight, differentiate
from torch import Tensor, nn

from fastqat import FakeQuant, Oscillation, Schedule
from fastqat.ops import estimators, two_widths

pytestmark = pytest.mark.usefixtures("one_thread")
on_all = pytest.mark.parametrize("backend", ("reference", "cpu", "cuda-on-host", "triton", "cuda"), indirect=True)
LENGTHS = (1, 3, 15, 16, 17, 63, 65, 255, 257, 1023, 1025, 2047, 2049, 4099, 8193)


@pytest.mark.parametrize("backend", ("cpu", "cuda-on-host", "cuda"), indirect=True)
def test_errors_of_a_search_whatever_the_length(backend: str) -> None:
    """A float32 sum takes 64 terms at most, whatever the vectors and the tail: 24 * 2^-24 of the sum in float64.

    Numbers that are all alike are the worst: each addition errs to the same side. The definition and Triton round the
    values first, as the network will.
    """
    qrange = torch.tensor([-8, 7], dtype=torch.int32)
    for number, n in enumerate(LENGTHS):
        scales = 0.02 + 0.3 * torch.rand(9, 1, generator=torch.Generator().manual_seed(number))
        drawn = random((n,), number)
        for x in (drawn, drawn[:1].expand(n).contiguous()):
            there = [t.to(device_of(backend)) for t in (x, scales, qrange)]
            errors = torch.ops.fastqat.range_search(there[0], there[1], None, there[2], None).cpu()[:, 0]
            wide, s = x.double()[None], scales.double()
            want = ((wide / s).round().clamp(-8, 7) * s - wide).square().sum(1)
            assert ((errors.double() - want).abs() <= 24 * 2.0**-24 * want).all(), n


def slopes(x: Tensor, k: float, backend: str) -> Tensor:
    """E of the sigmoid: the gradient of x where that of the output is 1, on a grid of scale 1."""
    case = GridCase("slopes", x, torch.ones(1), None, None, torch.tensor([-4, 3], dtype=torch.int32), None, 0.0)
    weight = Weight(case).twin(device_of(backend))
    rule = Learning(estimators.SIGMOID, k, learned=False)
    op = torch.ops.fastqat.multi_tensor_fake_quantize_backward
    return differentiate(op, [weight], [torch.ones_like(weight.case.x)], [rule], 0)[0][0].cpu().double()


@on_all
def test_slope_of_the_sigmoid(backend: str) -> None:
    """Within 6 + 1.25 k units in the last place of float64 for slopes k up to 80; beyond, within 1e-30."""
    ks = (1e-4, 0.01, 0.2, 0.2499, 0.25, 0.5, 0.75, 1.0, 2.0, 3.3, 5.0, 10.0, 20.0, 50.0, 79.0, 100.0, 1000.0)
    x = torch.linspace(-4.4, 3.4, 2_011 if backend == "triton" else 20_011)
    f = (x - x.round()).double()
    for k in ks[::3] if backend == "triton" else ks:
        exact = float(torch.tensor(k))
        want = 0.5 * exact / torch.tanh(torch.tensor(0.5 * exact).double()) / torch.cosh(exact * (0.5 - f.abs())) ** 2
        bound = 1e-30 if k > 80 else 0.0
        off = (slopes(x, k, backend) - want).abs() / (want * 2.0**-23 * (6 + 1.25 * k) + bound)
        assert off.max() <= 1, (k, float(off.max()))


@on_all
def test_slopes_without_numbers(backend: str) -> None:
    """A weight that is NaN or infinite passes no gradient, and a slope k that is NaN makes all NaN."""
    assert slopes(torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]), 2.0, backend)[:3].tolist() == [0.0] * 3
    assert slopes(torch.tensor([0.3, 1.0]), torch.nan, backend).isnan().all()


@on_all
def test_gradients_of_dorefa_to_the_last_bit(backend: str) -> None:
    """Those of the definition, but for the largest elements, through which the sum of all others passes."""
    for number in range(8):
        x = random(((33, 1000, 7, 401)[number % 4],), number) * (0.1, 1.0, 2.0, 10.0)[number // 2]
        g, factor = random(tuple(x.shape), number + 50), torch.tensor([0.37]) if number % 2 else torch.empty(0)
        arguments = (g, x, x.min().view(1), x.max().view(1), factor)
        want, got = torch.empty_like(x), torch.empty_like(x).to(device_of(backend))
        two_widths.dorefa_fake_quantize_backward(*arguments, want)
        torch.ops.fastqat.dorefa_fake_quantize_backward(*(t.to(got.device) for t in arguments), got)
        differ = got.cpu() != want
        assert not differ[x.abs() < x.abs().max()].any(), (number, int(differ.sum()))


def test_t_is_0_at_the_first_step() -> None:
    """The first forward sees the start of a schedule, where the published code sees the value of its step 1."""
    schedule = Schedule("linear", 0.4, 0.04, steps=4, begin=0.0)
    assert [schedule(t) for t in range(6)] == pytest.approx([0.4, 0.31, 0.22, 0.13, 0.04, 0.04])
    cosine = Schedule("cosine", 1.0, 0.0, steps=4, begin=0.0)
    assert [cosine(t) for t in (0, 1, 2, 4)] == pytest.approx([1.0, 0.8535533905932737, 0.5, 0.0])
    q = FakeQuant(3, range="fixed", scale=torch.ones(1), oscillation=Oscillation(0.01, schedule))
    w, seen = nn.Parameter(torch.zeros(4)), []
    optimizer = torch.optim.SGD([w], 0.0)
    for _ in range(3):
        q(w).sum().backward()
        seen.append(float(q.tracker.clock[2]))
        optimizer.step()
    assert seen == pytest.approx([0.4, 0.31, 0.22])
