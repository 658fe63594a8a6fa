"""What the tests on a GPU share: the device, its backends, a small network, and a step of its training.

With FASTQAT_GPU_REHEARSAL=1 they run on CPU tensors of small sizes, the C++ backend of the CPU in place of CUDA's: what
is wrong with the tests themselves shows without a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec

REHEARSAL = bool(os.environ.get("FASTQAT_GPU_REHEARSAL"))
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS = ("cuda", "triton", "reference")
IMAGE, CLASSES, BATCH = (3, 12, 12), 10, 8


def why_not() -> str | None:
    """Why there is nothing to test on here, or None."""
    if REHEARSAL or torch.cuda.is_available():
        return None
    return f"no GPU: torch {torch.__version__} sees no CUDA device"


needs_device = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
needs_gpu = pytest.mark.skipif(
    REHEARSAL or why_not() is not None,
    reason=why_not() or "a rehearsal has no CUDA streams, graphs and synchronization",
)


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    """Run the ops by a backend; skip the test where it cannot run on the device."""
    name = "cpu" if REHEARSAL and backend == "cuda" else backend
    reason = {**fastqat.status(), "auto": "available"}[name]
    if reason == "available" and name == "triton" and not REHEARSAL and os.environ.get("TRITON_INTERPRET") != "0":
        reason = "its kernels are interpreted in this process; set TRITON_INTERPRET=0"
    if reason != "available":
        pytest.skip(f"backend {name}: {reason}")
    with fastqat.use_backend(name):
        yield


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for the sign of 0 and the payload of NaN; wherever the tensors are."""
    a, b = a.detach().cpu(), b.detach().cpu()
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """All tensors of two states are the same bits."""
    assert got.keys() == want.keys()
    wrong = [name for name in want if not same_bits(got[name], want[name])]
    assert not wrong, f"differ: {', '.join(wrong)}"


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels on the device."""
    made = []
    for seed in range(count):
        labels = torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))
        made.append((normal((BATCH, *IMAGE), seed).to(DEVICE), labels.to(DEVICE)))
    return made


def network(together: bool = True, **weight: object) -> nn.Module:
    """A small convolutional network on the device, W4A4, scales learned, calibrated; weight: options of the weights."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(400, CLASSES)).to(DEVICE)
    spec = QSpec(4, learn="scale")
    fastqat.prepare(net, QConfig(QSpec(4, axis=0, learn="scale", **weight), spec))
    if together:
        fastqat.quantize_weights_together(net)
    fastqat.calibrate(net, [batches(1)[0][0]])
    return net


def trainer(net: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of SGD with momentum; its result is the loss, on the device."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy((forward or net)(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def captured(step: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A CUDA graph of a warm step on these inputs, to be replayed; a rehearsal makes the step."""
    if REHEARSAL:
        return lambda: step(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*inputs)
    return graph.replay


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream between two synchronizations with the current one, as PyTorch asks for before a capture."""
    if REHEARSAL:
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Whatever waits for the device is an error."""
    if REHEARSAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def quantizers(net: nn.Module) -> list[FakeQuant]:
    """All quantizers of a model."""
    return [m for m in net.modules() if isinstance(m, FakeQuant)]


def law_of_dscale(g: Tensor, x: Tensor, scale: Tensor, axis: int | None, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """dscale in float64, and how far a result may be from it: 1e-6 of the sum of the absolute terms.

    g, x: of one shape, on the device; scale: [1] or [C]; both results: float64 [1] or [C].
    """
    s = scale if axis is None else scale.view([-1 if d == axis else 1 for d in range(x.dim())])
    wide = x.float()
    code = (wide / s).round()
    inside = (code >= qmin) & (code <= qmax)
    ratio = wide.double().div_(s.double())
    slope = torch.where(inside, code.double().sub_(ratio), code.clamp_(qmin, qmax).double())
    terms = slope.mul_(g)
    others = [d for d in range(x.dim()) if d != axis]
    total, size = terms.sum(others), terms.abs_().sum(others)
    return total.view(-1), 1e-6 * size.view(-1) + total.abs().view(-1) * 2.0**-23 + 1e-30
