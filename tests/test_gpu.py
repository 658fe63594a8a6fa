"""On a GPU: torch.compile, CUDA graphs, autocast, channels_last, streams, several devices, no waiting, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_bad_arguments
import torch
from gpu_device import (
    BACKENDS,
    CLASSES,
    DEVICE,
    REHEARSAL,
    assert_same,
    batches,
    captured,
    needs_device,
    needs_gpu,
    network,
    no_synchronization,
    normal,
    quantizers,
    running,
    same_bits,
    side_stream,
    trainer,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import fastqat
from fastqat import Dampening, FakeQuant, Oscillation, Schedule, functional

pytestmark = needs_device
FREEZING = Oscillation(0.1, 0.25)
RISING = Oscillation(0.1, Schedule("cosine", start=0.9, end=0.21, steps=20, off_before=True))
MODES = ("default", "reduce-overhead")
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "tracking": {"oscillation": Oscillation(0.1)},
    "freezing": {"oscillation": FREEZING, "dampening": Dampening(0.1)},
    "schedule": {"oscillation": RISING},
    **{name: {"estimator": name} for name in ("ewgs", "sigmoid", "dsq", "psg", "pact", "stochastic")},
}
on_fast_backends = pytest.mark.parametrize("backend", BACKENDS[:2])


@pytest.fixture
def repeatable() -> Iterator[None]:
    """The same kernels of cuDNN and cuBLAS in every run."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def compiler() -> Iterator[None]:
    """torch.compile that has seen nothing yet."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def weights_of_steps(count: int) -> list[Tensor]:
    """A weight that moves from step to step, so that codes change and some oscillate."""
    base = normal((16, 33), 0) * 0.5
    return [(base + 0.3 * (-1) ** t * normal((16, 33), 1 + t % 3).abs()).to(DEVICE) for t in range(count)]


def tracked_quantizer(**options) -> FakeQuant:
    """A quantizer on the device, with its range given."""
    scale = torch.full((16,), 0.25)
    return FakeQuant(3, 0, channels=16, range="fixed", scale=scale, learn="scale", device=DEVICE, **options)


def steps_of(q: FakeQuant, forward, weights: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients and the last state of a quantizer over some steps."""
    g, found = normal((16, 33), 9).to(DEVICE), {}
    for t, weight in enumerate(weights):
        torch.compiler.cudagraph_mark_step_begin()
        w = weight.clone().requires_grad_()
        q.scale.grad = None
        y = forward(w)
        y.backward(g)
        found |= {f"y {t}": y.detach().clone(), f"dw {t}": w.grad.clone(), f"ds {t}": q.scale.grad.clone()}
        fastqat.step(q)
    return found | {name: value.clone() for name, value in q.state_dict().items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ("plain", "freezing"))
def test_a_compiled_quantizer_gives_the_bits_of_eager(kind: str, mode: str, compiler: None) -> None:
    """Outputs, gradients and state, step by step; reduce-overhead makes CUDA graphs of all of it."""
    weights = weights_of_steps(10)
    eager, compiled = tracked_quantizer(**KINDS[kind]), tracked_quantizer(**KINDS[kind])
    for q in (eager, compiled):
        q(weights[0])  # a tracked weight is seen once before compilation
    want = steps_of(eager, eager, weights)
    got = steps_of(compiled, torch.compile(compiled, fullgraph=True, mode=mode), weights)
    assert_same(got, want)
    if kind == "freezing":
        assert int(eager.tracker.frozen().sum()) > 0
    if not REHEARSAL:
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step(mode: str, compiler: None) -> None:
    """A whole step of a network: one graph, finite, near the eager one (whose convolutions round otherwise)."""
    losses = []
    for compile_it in (False, True):
        net = network(oscillation=FREEZING)
        net(batches(1)[0][0])
        step = trainer(net, torch.compile(net, fullgraph=True, mode=mode) if compile_it else None)
        losses.append(torch.stack([step(*batch) for batch in batches(3) * 2]).cpu())
        assert {int(q.step) for q in quantizers(net)} <= {0, 6}  # 0: of an activation, whose time no optimizer moves
    assert bool(losses[1].isfinite().all())
    assert torch.allclose(losses[0], losses[1], rtol=0.1, atol=0.05), losses


@pytest.mark.parametrize("kind", ("plain", "freezing", "schedule", "stochastic"))
@on_fast_backends
def test_a_captured_step_replays_to_the_bits_of_eager(backend: str, kind: str, repeatable: None) -> None:
    """Forward, backward, optimizer and the count of steps in one CUDA graph; weights, scales and state after it."""
    if REHEARSAL and backend == "triton":
        pytest.skip("too large for an interpreter")
    data, warm = batches(12), 3
    with running(backend):
        eager, graphed = network(**KINDS[kind]), network(**KINDS[kind])
        step = trainer(eager)
        for batch in data:
            step(*batch)
        step, inputs = trainer(graphed), tuple(t.clone() for t in data[0])
        with side_stream():
            for batch in data[:warm]:
                step(*batch)
        replay = captured(step, inputs)
        for batch in data[warm:]:
            for place, value in zip(inputs, batch, strict=True):
                place.copy_(value)
            replay()
    assert_same(graphed.state_dict(), eager.state_dict())


class Convolutions(TorchFunctionMode):
    """Keeps the weights that convolutions are given."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.conv2d, nn.functional.conv2d):
            self.weights.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("together", (False, True), ids=("alone", "together"))
def test_autocast(together: bool) -> None:
    """Weights come out of their quantizer in bfloat16, with the bits of the CPU; the step trains."""
    net = network(together)
    images, labels = batches(1)[0]
    with torch.autocast(DEVICE, torch.bfloat16), Convolutions() as seen:
        out = net(images)
        loss = nn.functional.cross_entropy(out, labels)
    loss.backward()
    assert out.dtype == torch.bfloat16 and [w.dtype for w in seen.weights] == [torch.bfloat16] * 2
    for layer, got in zip((net[0], net[3]), seen.weights, strict=True):
        q = layer.weight_fake_quant
        weight, scale, (qmin, qmax) = layer.weight.detach().cpu(), q.scale.detach().cpu(), q.codes
        want = functional.fake_quantize(
            weight, scale, qmin=qmin, qmax=qmax, axis=0, eps=q.eps, out_dtype=torch.bfloat16
        )
        assert same_bits(got, want)
    assert all(q.scale.grad.isfinite().all() for q in quantizers(net))
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last(backend: str) -> None:
    """Values and gradients are those of the contiguous tensor, in the strides of the input."""
    x, g = normal((4, 6, 5, 7), 1).to(DEVICE), normal((4, 6, 5, 7), 2).to(DEVICE)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        with running(backend):
            scale = torch.full((6,), 0.3, device=DEVICE, requires_grad=True)
            leaf = x.clone(memory_format=layout).requires_grad_()
            y = functional.fake_quantize(leaf, scale, qmin=-8, qmax=7, axis=1)
            dx, ds = torch.autograd.grad(y, (leaf, scale), g.contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=layout) and dx.is_contiguous(memory_format=layout)
        found.append((y, dx, ds))
    (y, dx, ds), (y2, dx2, ds2) = found
    assert same_bits(y, y2) and same_bits(dx, dx2) and torch.allclose(ds, ds2, rtol=1e-5, atol=1e-5)


@needs_gpu
@on_fast_backends
def test_the_current_stream(backend: str) -> None:
    """Kernels run behind what the current stream has to do before, and not behind another one."""
    x, scale = normal((512, 1024), 1).to(DEVICE), torch.full((512,), 0.3, device=DEVICE)
    late, side = torch.full_like(x, torch.nan), torch.cuda.Stream()
    with running(backend):
        want = functional.fake_quantize(x, scale, qmin=-8, qmax=7, axis=0)
        with torch.cuda.stream(side):  # which then has memory for its result: to allocate some might wait
            functional.fake_quantize(late, scale, qmin=-8, qmax=7, axis=0)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            late.copy_(x)
            y = functional.fake_quantize(late, scale, qmin=-8, qmax=7, axis=0)
            mine = torch.cuda.Event()
            mine.record()
        other = functional.fake_quantize(x, scale, qmin=-8, qmax=7, axis=0)
        torch.cuda.current_stream().synchronize()
        assert not mine.query() and same_bits(other, want)
        side.synchronize()
    assert same_bits(y, want)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_device_than_the_current_one(backend: str) -> None:
    """Tensors of the last device while the first one is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    last = f"cuda:{torch.cuda.device_count() - 1}"
    x, scale = normal((64, 257), 1), torch.full((64,), 0.3)
    want = functional.fake_quantize(x, scale, qmin=-8, qmax=7, axis=0)
    with running(backend), torch.cuda.device(0):
        leaf, s = x.to(last).requires_grad_(), scale.to(last).requires_grad_()
        y = functional.fake_quantize(leaf, s, qmin=-8, qmax=7, axis=0)
        y.sum().backward()
        assert torch.cuda.current_device() == 0
    assert y.device == leaf.grad.device == s.grad.device == torch.device(last) and same_bits(y, want)


@needs_gpu
def test_a_synchronization_is_noticed() -> None:
    """What the next test relies on."""
    with no_synchronization(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=DEVICE).item()


@pytest.mark.parametrize("kind", KINDS)
@on_fast_backends
def test_a_step_never_waits_for_the_device(backend: str, kind: str) -> None:
    """A warm step of training and an evaluation, weight by weight and together."""
    if REHEARSAL and backend == "triton":
        pytest.skip("too large for an interpreter")
    with running(backend):
        for together in (False, True):
            net, data = network(together, **KINDS[kind]), batches(5)
            step = trainer(net)
            for batch in data[:3]:
                step(*batch)
            with torch.no_grad():
                net.eval()(data[0][0])
            net.train()
            with no_synchronization():
                loss = step(*data[3])
                net.eval()
                with torch.no_grad():
                    out = net(data[4][0])
            assert bool(loss.isfinite()) and out.shape[1] == CLASSES


def test_errors_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bad argument gets the same message; the device goes on working."""
    x, here = normal((64, 257), 1), test_bad_arguments
    want = functional.fake_quantize(x, torch.full((64,), 0.3), qmin=-8, qmax=7, axis=0)
    calls = [c[0] for c in here.GRID + here.OPTIONS if c[3] != "positive finite"]  # values are not read back
    assert len(calls) > 40
    first = [message_of(call) for call in calls]
    for name in ("X", "S", "CODES", "STEP"):
        monkeypatch.setattr(here, name, getattr(here, name).to(DEVICE))
    for function in (here.fq, here.q, here.search):
        moved = tuple(d.to(DEVICE) if isinstance(d, Tensor) else d for d in function.__defaults__)
        monkeypatch.setattr(function, "__defaults__", moved)
    with torch.device(DEVICE):
        second = [message_of(call).replace(f"{DEVICE}:0", "cpu") for call in calls]
    assert second == first
    got = functional.fake_quantize(x.to(DEVICE), torch.full((64,), 0.3, device=DEVICE), qmin=-8, qmax=7, axis=0)
    assert same_bits(got, want)


def message_of(call) -> str:
    """The type and the text of what a call raises."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"
