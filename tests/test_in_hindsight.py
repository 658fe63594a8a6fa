"""``range="in_hindsight"``: a range known before the tensor is, against its equations, literals and running min-max.

Source: Fournarakis and Nagel, In-Hindsight Quantization Range Estimation (2021).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, prepare

pytestmark = pytest.mark.usefixtures("one_thread")
STREAM = [
    torch.randn(6, 5, generator=torch.Generator().manual_seed(i)) * (1.0 + (i * 7) % 5) + 0.1 * i for i in range(6)
]
MOMENTUM = 0.9


def hindsight(**options: Any) -> FakeQuant:
    """An affine quantizer whose range is in hindsight, and which no optimizer drives."""
    return FakeQuant(**{"bits": 4, "range": "in_hindsight", "symmetric": False, "momentum": MOMENTUM, **options})


def driven(**options: Any) -> FakeQuant:
    """The same, whose time is moved by fastqat.step."""
    fq = hindsight(**options)
    fq.tracked = True
    return fq


def averages(bounds: list[float], momentum: float) -> list[np.float32]:
    """The moving average after each bound, in float32 as in the equation; the first one is the bound itself."""
    kept = [np.float32(bounds[0])]
    m, rest = np.float32(momentum), np.float32(1 - momentum)
    for bound in bounds[1:]:
        kept.append(m * kept[-1] + rest * np.float32(bound))
    return kept


def bounds_used(fq: FakeQuant, stream: list[Tensor]) -> list[tuple[float, float]]:
    """Lower and upper bound that each tensor is quantized with."""
    used = []
    for x in stream:
        fq(x)
        used.append((fq.range_low.item(), fq.range_high.item()))
    return used


def plain(x: Tensor, fq: FakeQuant, low: float, high: float) -> Tensor:
    """Affine fake quantization in the range [low, high], widened to hold 0, in five torch operations."""
    qmin, qmax = fq.codes
    low, high = torch.tensor(low).clamp(max=0), torch.tensor(high).clamp(min=0)
    scale = (high - low) / (qmax - qmin)
    zero = (qmin - low / scale).round().clamp(qmin, qmax)
    return scale * ((x / scale).round().clamp(qmin - zero, qmax - zero))


def test_literal_vector() -> None:
    """Minima -1, -2, -0.5, -4 and maxima 2, 1, 3, 0.5 with momentum 0.9: the ranges of four steps and of the next."""
    stream = [torch.tensor(v) for v in ([-1.0, 0.3, 2.0], [-2.0, 1.0, 0.0], [3.0, -0.5, 1.0], [-4.0, 0.5, 0.1])]
    used = bounds_used(hindsight(), [*stream, torch.zeros(3)])
    wanted = [(-1, 2), (-1, 2), (-1.1, 1.9), (-1.04, 2.01), (-1.336, 1.859)]
    torch.testing.assert_close(torch.tensor(used), torch.tensor(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", (0.9, 0.5, 0.0))
def test_it_is_running_minmax_of_one_step_before(momentum: float) -> None:
    """In-hindsight(t) = running min-max(t - 1), bit for bit: as numbers, and as the quantizer of the other range."""
    used = bounds_used(hindsight(momentum=momentum), STREAM)
    low = averages([x.min().item() for x in STREAM], momentum)
    high = averages([x.max().item() for x in STREAM], momentum)
    assert used[0] == (low[0], high[0])  # the first step is dynamic
    assert used[1:] == list(zip(low, high, strict=True))[:-1]
    running = FakeQuant(4, range="running_minmax", symmetric=False, momentum=momentum)
    assert bounds_used(running, [STREAM[0], *STREAM])[1:-1] == used[1:]
    if not momentum:  # the extremes of the step before
        assert used[1:] == [(x.min().item(), x.max().item()) for x in STREAM[:-1]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", (None, "relu", "relu6"))
def test_values_and_gradients(dtype: torch.dtype, activation: str | None) -> None:
    """Each tensor is quantized with the range before it, and what lies beyond it saturates; gradients in float64."""
    fq = hindsight(activation=activation, ste_mask="unrounded")
    fq(2 * STREAM[0])  # whose extremes are the bounds themselves
    for x in STREAM[1:]:
        x = (2 * x).to(dtype).requires_grad_()
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        y = fq(x)
        low, high = fq.range_low.item(), fq.range_high.item()
        leaf = x.detach().double().requires_grad_()
        clamped = {None: leaf, "relu": leaf.relu(), "relu6": nn.functional.relu6(leaf)}[activation]
        assert torch.equal(y, plain(clamped.detach().float(), fq, low, high).to(dtype))
        y.backward(g)
        scale, zero = fq.scale.double(), fq.zero_point.detach().double().round()
        clamped.clamp((scale * (fq.codes[0] - zero)).item(), (scale * (fq.codes[1] - zero)).item()).backward(g.double())
        assert torch.equal(x.grad.double(), leaf.grad)


def test_symmetric_grid() -> None:
    """Signed codes take the larger magnitude, unsigned ones the maximum."""
    for signed, qmax in ((True, 7), (False, 15)):
        fq = hindsight(symmetric=True, signed=signed)
        fq(STREAM[0])
        fq(STREAM[1])
        extent = max(STREAM[0].max(), -STREAM[0].min() if signed else 0)
        assert torch.equal(fq.scale.detach(), torch.as_tensor(extent).view(1) / qmax)


def test_constant_stream_is_dynamic() -> None:
    """Where every tensor has the same extremes, values are those of the current min-max."""
    fq, dynamic = hindsight(), FakeQuant(4, range="minmax", symmetric=False)
    for shift in range(5):
        x = STREAM[0].flatten().roll(shift)
        assert torch.equal(fq(x), dynamic(x)) and torch.equal(fq.scale, dynamic.scale)


NOTHING_TO_SEE = {
    "NaN": torch.full((3,), torch.nan),
    "Inf": torch.tensor([torch.inf, -torch.inf]),
    "empty": torch.empty(0),
}


@pytest.mark.parametrize("x", NOTHING_TO_SEE.values(), ids=NOTHING_TO_SEE)
def test_tensors_without_a_finite_value(x: Tensor) -> None:
    """They set no range and move none; a tensor that has some finite values counts with these."""
    fq = hindsight()
    assert torch.equal(fq(x), x) if not x.isnan().any() else fq(x).isnan().all()
    assert not fq.initialized
    fq(STREAM[0])
    before = bounds_used(fq, [STREAM[0]])
    assert bounds_used(fq, [x, x, STREAM[0]]) == before * 3
    mixed = hindsight()
    assert bounds_used(mixed, [torch.cat([STREAM[0].flatten(), x]), STREAM[1]])[1] == before[0]


def test_all_zero_tensors() -> None:
    """Zeros set no range; later they pull it towards 0, and the scale stays positive until it is 0 and is 1 then."""
    fq = hindsight(momentum=0.0)
    zeros = torch.zeros(4)
    assert torch.equal(fq(zeros), zeros) and not fq.initialized
    fq(STREAM[0])
    for _ in range(3):
        assert torch.equal(fq(zeros), zeros)
    assert fq.range_low.item() == fq.range_high.item() == 0 and fq.scale.item() == 1 and fq.zero_point.item() == 0
    assert fq(STREAM[0]).isfinite().all()  # and the range comes back
    fq(STREAM[0])
    assert (fq.range_low.item(), fq.range_high.item()) == (STREAM[0].min().item(), STREAM[0].max().item())


@pytest.mark.parametrize("options", ({}, {"estimator": "stochastic"}), ids=("gathers", "reads again"))
def test_time_is_a_step(options: dict[str, Any]) -> None:
    """Forwards of one step share one range and only widen what the next one will take in."""
    fq = driven(**options)
    fq(STREAM[0])
    fastqat.step(fq)
    micro = [fq(STREAM[k]) for k in (1, 2, 1)]
    assert torch.equal(micro[0], micro[2])  # computed again: the same bits
    assert fq.range_low.item() == STREAM[0].min().item()
    fastqat.step(fq)
    fq(STREAM[3])
    low = averages([STREAM[0].min().item(), min(STREAM[1].min(), STREAM[2].min()).item()], MOMENTUM)
    high = averages([STREAM[0].max().item(), max(STREAM[1].max(), STREAM[2].max()).item()], MOMENTUM)
    assert (fq.range_low.item(), fq.range_high.item()) == (low[1], high[1])


def test_evaluation_and_switches_change_nothing() -> None:
    """Neither evaluation nor a quantizer told not to observe moves or sees anything."""
    fq = hindsight()
    fq(STREAM[0])
    fq(STREAM[1])
    before = {k: v.clone() for k, v in fq.state_dict().items()}
    y = fq.eval()(9 * STREAM[2])
    assert torch.equal(y, plain(9 * STREAM[2], fq, fq.range_low.item(), fq.range_high.item()))
    fq.train().observer_enabled = False
    assert torch.equal(fq(9 * STREAM[2]), y)
    assert all(torch.equal(v, before[k]) for k, v in fq.state_dict().items())
    fq.observer_enabled, fq.fake_quant_enabled = True, False
    assert torch.equal(fq(9 * STREAM[2]), 9 * STREAM[2])  # quantizes nothing, and goes on observing
    assert fq.new_low.item() == (9 * STREAM[2]).min().item()


@pytest.mark.parametrize("axis", (0, 1))
def test_per_channel(axis: int) -> None:
    """One range per channel, each that of its own past."""
    fq, each = hindsight(axis=axis), [hindsight() for _ in range(STREAM[0].shape[axis])]
    for x in STREAM:
        x = x.clone().requires_grad_()
        y = fq(x)
        y.sum().backward()
        for k, single in enumerate(each):
            part = x.detach().select(axis, k).clone().requires_grad_()
            want = single(part)
            want.sum().backward()
            assert torch.equal(y.select(axis, k), want) and torch.equal(x.grad.select(axis, k), part.grad)


@pytest.mark.parametrize("options", ({}, {"axis": 1}, {"axis": 1, "symmetric": True}), ids=str)
def test_backward_after_the_next_forward(options: dict[str, Any]) -> None:
    """A forward keeps its own range for its backward pass, though the range has moved on."""
    fq, again = hindsight(**options), hindsight(**options)
    leaves = [(3 * x).requires_grad_() for x in STREAM]
    ys = [fq(x) for x in leaves]
    for x, y in zip(leaves, ys, strict=True):
        y.sum().backward()
        alone = x.detach().clone().requires_grad_()
        again(alone).sum().backward()
        assert torch.equal(x.grad, alone.grad)


def test_state_is_resumed_bit_for_bit() -> None:
    """In the midst of a step: what was seen and not yet taken in is a part of the state."""
    fq = driven()
    for x in STREAM[:3]:
        fq(x)
        fastqat.step(fq)
    fq(STREAM[3])
    other = driven()
    other.load_state_dict(copy.deepcopy(fq.state_dict()))
    copied = copy.deepcopy(fq)
    copied.tracked = True  # a copy follows a weight of its own
    for q in (fq, other, copied):
        fastqat.step(q)
    ys = [[q(x) for x in STREAM[4:]] for q in (fq, other, copied)]
    assert all(torch.equal(a, b) for k in (1, 2) for a, b in zip(ys[0], ys[k], strict=True))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in fq.state_dict().items())


def test_calibration_sets_the_range() -> None:
    """It is the running min-max of the batches; nothing seen in calibration counts twice."""
    net = nn.Sequential(hindsight(momentum=0.5))
    fastqat.calibrate(net, STREAM[:3], progress=False)
    low = averages([x.min().item() for x in STREAM[:3]], 0.5)[-1]
    assert net[0].range_low.item() == low and net[0].new_low.isinf()
    net(STREAM[3])
    assert net[0].range_low.item() == low


@pytest.mark.parametrize("name", ("in_hindsight", "running_minmax"))
@pytest.mark.parametrize("signed, bits", ((None, 4), (True, 4), (False, 4), (True, 1)))
def test_a_range_set_by_hand(name: str, signed: bool | None, bits: int) -> None:
    """It is where a range that follows the data goes on from."""
    affine = signed is None
    fq = FakeQuant(bits, range=name, symmetric=not affine, signed=signed, momentum=0.5)
    fq.tracked = True
    fq.set_grid(torch.tensor([0.25]), torch.tensor([3.0]) if affine else None)
    fq(8 * STREAM[0])
    assert fq.scale.item() == 0.25 and (not affine or fq.zero_point.item() == 3)
    fastqat.step(fq)
    fq(8 * STREAM[0])
    largest = (8 * STREAM[0]).max().item()
    high = {None: 0.25 * 12, True: 0.25 * max(fq.codes[1], 1), False: 0.25 * 15}[signed]
    assert fq.range_high.item() == pytest.approx(0.5 * high + 0.5 * largest, rel=1e-6)


def test_a_range_that_was_never_observed() -> None:
    """Evaluation sets no range: tensors pass as they are, with one warning that names the layer."""
    net = prepare(
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), QConfig(None, QSpec(4, range="in_hindsight"))
    )
    fq = net[2].activation_fake_quant
    net[0].activation_fake_quant(STREAM[0])
    net.eval()
    with pytest.warns(UserWarning, match=r"quantizer of layer '2': wanted a range before evaluation; got none"):
        net(STREAM[0])
    net(STREAM[0])  # warns no more, or the test would fail
    x = STREAM[0][:, :4]
    assert torch.equal(fq(x), x) and not fq.initialized


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_training_a_prepared_network(use_reentrant: bool) -> None:
    """The optimizer's steps drive it: micro-batches and recomputation leave gradients and ranges as they are."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = prepare(
            nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
            QConfig(QSpec(4, 0), QSpec(4, range="in_hindsight")),
        )
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for x in STREAM:
            for part in x.split(3):
                part = part.clone().requires_grad_()
                y = checkpoint(net, part, use_reentrant=use_reentrant) if recompute else net(part)
                y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({k: v.clone() for k, v in net.state_dict().items()})
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    fq = net[0].activation_fake_quant
    low = averages([x.min().item() if i else x[:3].min().item() for i, x in enumerate(STREAM[:-1])], 0.9)
    first = min(low[0], STREAM[0].min().item())  # the range is of the first micro-batch, the next step sees both
    assert fq.observed_step.item() == len(STREAM) - 1 and first <= low[0]


def test_compiled_without_another_graph_per_step() -> None:
    """One graph for all steps, and the values and ranges of eager."""
    outputs = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = prepare(nn.Sequential(nn.Linear(5, 4)), QConfig(None, QSpec(4, range="in_hindsight", symmetric=False)))
        net(STREAM[0])
        run = torch.compile(net, fullgraph=True, backend=counter) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        ys = []
        for x in STREAM:
            y = run(x)
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ys.append(y.detach().clone())
        outputs.append([*ys, *net.state_dict().values()])
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", ("in_hindsight", "minmax"))
def test_ranges_of_all_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sync_range what two processes see is merged on the device; here the other one sees twice as much."""

    def all_reduce(both: Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        both.copy_(torch.maximum(both, 2 * both))

    fq = FakeQuant(4, range=name, symmetric=False, sync_range=True, momentum=MOMENTUM)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    used = bounds_used(fq, STREAM)
    low, high = ([2 * f(x).item() for x in STREAM] for f in (torch.min, torch.max))
    if name == "minmax":
        assert used == list(zip(low, high, strict=True))
    else:
        low, high = averages(low, MOMENTUM), averages(high, MOMENTUM)
        assert used == [(low[0], high[0]), *zip(low[:-1], high[:-1], strict=True)]
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    for q in (fq, FakeQuant(4, range="minmax", sync_range=True)):
        q.eval()(STREAM[0])  # one process may evaluate alone


@pytest.mark.parametrize(
    "options", ({"range": "mse"}, {"range": "in_hindsight", "axis": 0}, {"learn": "scale"}), ids=str
)
def test_sync_range_needs_a_range_that_follows(options: dict[str, Any]) -> None:
    """Named by option, with what is wanted and what came."""
    with pytest.raises(ValueError, match="sync_range: wanted one of .*'in_hindsight'.*; got range="):
        QSpec(4, sync_range=True, **{"range": "minmax", **options})


# Layer, size of its input, and KiB with a static and a dynamic range.
TRAFFIC = {
    "ResNet18 3x3 64->64": (nn.Conv2d(64, 64, 3, 1, 1, device="meta"), 56, 428, 1996),
    "ResNet18 3x3 256->256": (nn.Conv2d(256, 256, 3, 1, 1, device="meta"), 14, 674, 1066),
    "MobileNetV2 1x1 16->96": (nn.Conv2d(16, 96, 1, device="meta"), 112, 1373.5, 10781.5),
    "MobileNetV2 dw 96": (nn.Conv2d(96, 96, 3, 2, 1, groups=96, device="meta"), 112, 1470.84375, 3822.84375),
    "MobileNetV2 dw 960": (nn.Conv2d(960, 960, 3, 1, 1, groups=960, device="meta"), 7, 100.3125, 467.8125),
}


@pytest.mark.parametrize("layer, size, static, dynamic", TRAFFIC.values(), ids=TRAFFIC)
def test_memory_traffic(layer: nn.Conv2d, size: int, static: float, dynamic: float) -> None:
    """The table of layers with 8 bits, accumulators of 32 bits, one image."""
    x = torch.empty(1, layer.in_channels, size, size, device="meta")
    (found,) = fastqat.memory_traffic(nn.Sequential(layer), x).values()
    assert (found.static / 1024, found.dynamic / 1024) == (static, dynamic)
    assert found.overhead == dynamic / static - 1
    assert fastqat.memory_traffic(nn.Sequential(layer), x, bits=4)["0"].static == found.static / 2


def test_memory_traffic_of_a_prepared_network() -> None:
    """By layer name; a layer that is called twice counts twice, and no quantizer gets a range."""
    shared = nn.Linear(5, 5)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Embedding(3, 2), nn.Linear(5, 4))
    del net[3]
    prepare(net, QConfig(QSpec(4, 0), QSpec(4)))
    found = fastqat.memory_traffic(net, STREAM[0])
    assert list(found) == ["0", "3"] and not net[0].activation_fake_quant.initialized
    assert found["0"] == (2 * (25 + 30 + 30), 2 * (25 + 30 + 30 * 9)) and found["3"] == (20 + 30 + 24, 20 + 30 + 24 * 9)
    with pytest.raises(ValueError, match="bits: wanted 1 to 8; got 9"):
        fastqat.memory_traffic(net, STREAM[0], bits=9)
