"""Fake quantization under torch.func, torch.compile and torch.export: the same values as eager, one neutral graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.func import functional_call, grad, vmap

import fastqat
from fastqat import FakeQuant, functional

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))  # a batch of five [4, 6]
GRANULARITIES = {
    "tensor": ((1,), None, None),
    "axis0": ((4,), 0, None),
    "axis-1": ((6,), -1, None),
    "axis0_group3": ((4, 2), 0, 3),
    "axis1_group2": ((6, 2), 1, 2),
}
of_granularities = pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
SHIFTS = (None, "zero_point", "offset")


def parameters(shape: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    """scale and shift."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.3 * torch.rand(shape, generator=generator), 4 * torch.rand(shape, generator=generator)


def quantizer(granularity: tuple, shift_name: str | None, **options: Any) -> Any:
    """fake_quantize as a function of x, scale and shift."""

    def run(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        shifts = {shift_name: shift} if shift_name else {}
        axis, group = granularity[1:]
        return functional.fake_quantize(x, scale, **shifts, qmin=0, qmax=7, axis=axis, group_size=group, **options)

    return run


def loss_of(run: Any) -> Any:
    """A scalar with a gradient that differs from element to element."""
    return lambda *inputs: (run(*inputs) * torch.arange(24.0).view(4, 6)).sum()


def loop(function: Any, in_dims: tuple, *inputs: Tensor) -> Any:
    """What vmap stands for."""
    each = [
        function(*(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True))) for i in range(5)
    ]
    return [torch.stack(r) for r in zip(*each, strict=True)] if isinstance(each[0], tuple) else [torch.stack(each)]


@of_granularities
@pytest.mark.parametrize("shift_name", SHIFTS)
@pytest.mark.parametrize("batched", ("x", "scale", "both"))
def test_vmap_is_a_loop(granularity: tuple, shift_name: str | None, batched: str) -> None:
    """Of the function, of its gradients and of its second derivative; any input may be the batched one."""
    scale, shift = parameters((5, *granularity[0]) if batched != "x" else granularity[0])
    x = X[0] if batched == "scale" else X.movedim(0, 1)  # the batch need not be in front
    dims = (None if batched == "scale" else 1, *(None if batched == "x" else 0,) * 2)
    run = quantizer(granularity, shift_name, grad_scale="lsq")
    wrt = (0, 1, 2) if shift_name else (0, 1)
    gradients = grad(loss_of(run), wrt)

    def penalty(*inputs: Tensor) -> Tensor:
        return sum((d**2).sum() for d in gradients(*inputs))

    for function in (run, gradients, grad(penalty, wrt)):
        got = vmap(function, dims)(x, scale, shift)
        for a, b in zip(got if isinstance(got, tuple) else (got,), loop(function, dims, x, scale, shift), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@of_granularities
def test_gradient_through_vmap(granularity: tuple) -> None:
    """Parameters shared by the batch get the sum of its gradients."""
    run = quantizer(granularity, "zero_point")
    inputs = [X.clone(), *parameters(granularity[0])]
    leaves = [t.clone().requires_grad_() for t in inputs]
    got = torch.autograd.grad(vmap(run, (0, None, None))(*leaves).square().sum(), leaves)
    leaves = [t.clone().requires_grad_() for t in inputs]
    want = torch.autograd.grad(torch.stack([run(x, *leaves[1:]) for x in leaves[0]]).square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@of_granularities
@pytest.mark.parametrize("shift_name", SHIFTS)
def test_func_grad_is_autograd(granularity: tuple, shift_name: str | None) -> None:
    """torch.func.grad gives the bits of backward()."""
    loss = loss_of(quantizer(granularity, shift_name))
    leaves = [t.clone().requires_grad_() for t in (X[0], *parameters(granularity[0]))]
    loss(*leaves).backward()
    got = grad(loss, (0, 1, 2))(*(t.detach() for t in leaves))
    for a, leaf in zip(got, leaves, strict=True):
        assert torch.equal(a, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def test_functional_call() -> None:
    """A module with other parameters is the function with these parameters."""
    module = FakeQuant(3, axis=0, symmetric=False, learn="scale+zero_point")
    module(X[0])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    scale, zero_point = parameters((4,))
    swapped = {"scale": scale, "zero_point": zero_point}
    run = quantizer(((4,), 0, None), "zero_point", eps=1e-8)
    assert torch.equal(functional_call(module, swapped, X[0]), run(X[0], scale, zero_point))
    got = grad(lambda p: loss_of(lambda x: functional_call(module, p, x))(X[0]))(swapped)
    want = grad(loss_of(run), (1, 2))(X[0], scale, zero_point)
    assert torch.equal(got["scale"], want[0]) and torch.equal(got["zero_point"], want[1])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@of_granularities
@pytest.mark.parametrize("shift_name", SHIFTS)
def test_compiled_is_eager(granularity: tuple, shift_name: str | None) -> None:
    """Without a graph break: value and gradients to the bit."""
    torch._dynamo.reset()
    run = quantizer(granularity, shift_name, grad_scale="lsq")
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (X[0], *parameters(granularity[0]))]
        y = function(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves if t.grad is not None)])
    assert len(results[0]) == len(results[1]) == (4 if shift_name else 3)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Net(nn.Module):
    """Two layers, one of them quantized in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(2)))
        self.of_weight = FakeQuant(4, axis=0, group_size=3, learn="scale", grad_scale="lsq")
        self.of_input = FakeQuant(4, symmetric=False, range="running_minmax")

    def forward(self, x: Tensor) -> Tensor:
        return self.of_input(x) @ self.of_weight(self.weight).t()


def has_compiler() -> bool:
    """True if inductor finds the C++ compiler that it needs on the CPU."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(not has_compiler(), reason="no C++ compiler for inductor"))


@pytest.mark.parametrize("backend", ("aot_eager", INDUCTOR))
def test_one_graph_for_all_bit_widths_and_steps(backend: str) -> None:
    """Training while the bit-widths change: never compiled again, and equal to the same training in eager."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        net = Net()
        net(X[0])
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        run = torch.compile(net, fullgraph=True, backend=backend) if compiled else net
        outputs = []
        for step, bits in enumerate((4, 1, 2, 3, 5, 6, 7, 8)):
            net.of_weight.bits, net.of_input.bits = bits, 9 - bits
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                y = run(X[step % 5])
                y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(y.detach())
        results.append([*outputs, *(t.clone() for t in net.state_dict().values())])
    assert len({tuple(y.flatten().tolist()) for y in results[0][:8]}) == 8
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", (False, True))
def test_export(strict: bool, tmp_path: Any) -> None:
    """Saved, loaded and run, the graph gives eager's bits; of fastqat it holds neutral ops only."""
    net = Net()
    net(X[0])
    net.eval()
    program = torch.export.export(net, (X[0],), strict=strict)
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    assert torch.equal(loaded.module()(X[1]), net(X[1]))
    graphs = [m.graph for m in loaded.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {n.target for graph in graphs for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {str(t) for t in called if t.namespace != "aten"} == {"fastqat.fake_quantize.default"}


def test_traced_training_holds_neutral_ops_only() -> None:
    """The graphs of forward and backward of a compiled step name no backend."""
    torch._dynamo.reset()
    seen: set[str] = set()

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Any:
        seen.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph)

    run = torch.compile(
        quantizer(GRANULARITIES["axis0"], "zero_point"),
        fullgraph=True,
        backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=keep),
    )
    leaves = [t.clone().requires_grad_() for t in (X[0], *parameters((4,)))]
    run(*leaves).sum().backward()
    ours = {t for t in seen if "fastqat" in t}
    assert ours == {"fastqat.fake_quantize.default", "fastqat.fake_quantize_backward.default"}


def test_uninitialized_quantizer_does_not_compile() -> None:
    """The message says what to do."""
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"FakeQuant: wanted an initialized range.*fastqat\.calibrate"):
        torch.compile(FakeQuant(4), fullgraph=True, backend="eager")(X)


def test_autocast() -> None:
    """The weight of a prepared layer comes in the dtype of autocast from one pass; gradients are float32."""
    layer = fastqat.prepare(nn.Sequential(nn.Linear(6, 4)), fastqat.QConfig(activation=None))[0]
    quantized = layer.weight_fake_quant(layer.weight).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.quantized_weight("cpu"), quantized)
        y = layer(X)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, nn.functional.linear(X.bfloat16(), quantized, layer.bias.bfloat16()))
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and bool(layer.weight.grad.any())
