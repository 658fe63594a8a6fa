"""Activation quantizers: bits instead of tensors for the backward pass, PACT, ReLU in the same pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, functional, one_tensor

pytestmark = pytest.mark.usefixtures("one_thread")
X = 3 * torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0))
X.view(-1)[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6.0])
G = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6}
of_activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def fixed(bits: int = 4, scale: float = 0.5, zero_point: float | None = None, **options: Any) -> FakeQuant:
    """A quantizer of a given scale, and zero point if it has one."""
    shift = None if zero_point is None else torch.tensor([zero_point])
    spec = {"signed": False, "symmetric": shift is None, **options}
    return FakeQuant(bits, range="fixed", scale=torch.tensor([scale]), zero_point=shift, **spec)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t in other strides."""
    return {
        "contiguous": t,
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "transposed": t.transpose(0, 2),
        "strided": t[:, ::2],
        "expanded": t[:1, :1].expand(4, 6, 5, 3),
    }[layout]


def run(function: Any, x: Tensor, g: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The value of a function, and the gradients of x and of parameters."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    for p in parameters:
        p.grad = None
    y = function(leaf)
    y.backward(g.expand_as(y).to(y.dtype))
    return [y.detach(), leaf.grad, *(p.grad for p in parameters)]


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, but for the sign of zero and the payload of NaN; the same strides."""
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def saved_by(function: Any, x: Tensor) -> list[Tensor]:
    """What autograd keeps for the backward pass of a function."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(x)
    return saved


GRIDS: dict[str, dict[str, Any]] = {
    "unsigned": {},
    "signed": {"signed": True},
    "restricted": {"signed": True, "restricted": True},
    "zero_point": {"zero_point": 3.6},
    "two_bits": {"bits": 2, "scale": 1.7},
    "eight_bits": {"bits": 8, "scale": 0.03},
    "floor": {"scale": 1e-3, "eps": 0.4},
}


@pytest.mark.parametrize("ste_mask", ("rounded", "unrounded"))
@pytest.mark.parametrize("name", GRIDS)
def test_bits_give_what_the_tensor_gives(name: str, ste_mask: str) -> None:
    """A range that is not learned: the values and gradients of the functional, which reads x again; NaN included."""
    fq = fixed(**GRIDS[name], ste_mask=ste_mask)
    qmin, qmax = fq.codes

    def direct(x: Tensor) -> Tensor:
        return functional.fake_quantize(
            x, fq.scale.detach(), fq.zero_point, qmin=qmin, qmax=qmax, eps=fq.eps, ste_mask=ste_mask
        )

    for got, want in zip(run(fq, X, G), run(direct, X, G), strict=True):
        assert same(got, want)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "transposed", "strided", "expanded"))
@pytest.mark.parametrize(
    "dtypes", ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.float16, None)), ids=str
)
def test_layouts_and_dtypes(layout: str, dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
    """Of x and g: those of x for the gradient, those that empty_like gives for the result."""
    dtype, out_dtype = dtypes
    fq, x = fixed(), laid_out(X.to(dtype), layout)
    direct = lambda t: functional.fake_quantize(t, fq.scale.detach(), qmin=0, qmax=15, out_dtype=out_dtype)  # noqa: E731
    for g in (laid_out(G, layout), torch.ones(())):
        leaf = x.clone(memory_format=torch.preserve_format)
        for got, want in zip(run(lambda t: fq(t, out_dtype), leaf, g), run(direct, leaf, g), strict=True):
            assert same(got, want)


def test_gradient_by_float64_autograd() -> None:
    """dx = g within [qmin - z, qmax - z] s, else 0; PACT: ds = qmax * sum of g above it (unrounded mask)."""
    x = torch.where(X.isfinite(), X, 1.0)
    fq = fixed(learn="scale", estimator="pact", ste_mask="unrounded")
    got = run(fq, x, G, fq.scale)
    leaf, scale = x.double().requires_grad_(), fq.scale.detach().double().requires_grad_()
    torch.minimum(leaf.relu(), 15 * scale).backward(G.double())
    inside = leaf.detach() != 0  # where relu and the mask, which holds 0, disagree
    assert torch.equal(got[1].double()[inside], leaf.grad[inside])
    torch.testing.assert_close(got[2].double(), scale.grad, rtol=0, atol=1e-6 * 15 * G.abs().sum().item())


ALPHA_X = torch.tensor([-1.0, 0.2, 0.4, 1.0, 1.3, 1.9, 2.5])


@pytest.mark.parametrize(
    "estimator, dalpha",
    (
        ("pact", [0, 0, 0, 0, 0, 0, 1]),
        ("ste", [0, -0.1, 0.13333333, 0.16666667, 0.01666667, 0.05, 1]),  # CG-PACT of SAT
    ),
)
def test_literal_vector_of_pact(estimator: str, dalpha: list[float]) -> None:
    """alpha = 2, k = 2: values, and the gradient of alpha element by element; s = alpha / (2^k - 1)."""
    fq = fixed(2, 2 / 3, learn="scale", estimator=estimator, ste_mask="unrounded", grad_scale=1 / 3)
    y = fq(ALPHA_X)
    torch.testing.assert_close(y.detach(), torch.tensor([0, 0, 2 / 3, 4 / 3, 4 / 3, 2, 2]))
    each = [run(fq, ALPHA_X, g, fq.scale) for g in torch.eye(7)]
    torch.testing.assert_close(
        torch.cat([r[2] for r in each]), torch.tensor(dalpha, dtype=torch.float32), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(torch.stack([r[1] for r in each]).diagonal(), torch.tensor([0.0, 1, 1, 1, 1, 1, 0]))


@pytest.mark.parametrize(
    "options", ({}, {"ste_mask": "unrounded"}, {"grad_scale": 0.1}, {"grad_scale": "lsq"}), ids=str
)
def test_pact_in_two_bits(options: dict[str, Any]) -> None:
    """The values and gradients of the multi-tensor op, which signed codes still take and which reads x again."""
    fq, x = fixed(learn="scale", estimator="pact", **options), torch.where(X.isnan(), X, X + 2)
    got, reads = run(fq, x, G, fq.scale), saved_by(fq, x.requires_grad_())
    assert (sum(t.nbytes for t in reads) < x.nbytes / 4) == (options.get("grad_scale") != "lsq")
    fq.has_pact_gradients = False
    want = run(fq, x, G, fq.scale)
    assert same(got[0], want[0]) and same(got[1], want[1])
    factor = options.get("grad_scale", 1)
    torch.testing.assert_close(
        got[2], want[2], rtol=0, atol=1e-6 * 15 * G.abs().sum().item() * (1 if factor == "lsq" else factor)
    )
    signed = fixed(signed=True, learn="scale", estimator="pact")
    assert run(signed, x, G, signed.scale)[2].isfinite() and not signed.fits_one_pass()


UNLEARNED: dict[str, tuple[int, Any]] = {
    "fixed": (1, fixed),
    "symmetric": (1, lambda: FakeQuant(4)),
    "running_minmax": (1, lambda: FakeQuant(4, range="running_minmax", symmetric=False)),
    "in_hindsight": (1, lambda: FakeQuant(4, range="in_hindsight", symmetric=False)),
    "fused": (1, lambda: FakeQuant(4, activation="relu")),
    "pact": (2, lambda: fixed(learn="scale", estimator="pact")),
    "frozen": (1, lambda: fixed(learn="scale").requires_grad_(False)),
}


@pytest.mark.parametrize("name", UNLEARNED)
def test_what_is_saved(name: str) -> None:
    """One bit of each element, two for PACT, and the code range; not x, though nothing else keeps it alive."""
    bits, make = UNLEARNED[name]
    fq, x = make(), (2 * X[1:]).requires_grad_()
    fq(x)
    saved = saved_by(fq, x)
    size = (x.numel() + 7) // 8
    assert sorted(t.nbytes for t in saved if t.numel()) == sorted([8] + bits * [size])
    assert saved_by(fq, x.detach()) == [] or name == "pact"
    learned = FakeQuant(4, learn="scale")
    learned(x)
    assert any(t is x or t.data_ptr() == x.data_ptr() for t in saved_by(learned, x))


def test_a_weight_is_kept_as_it_is() -> None:
    """A Parameter is alive anyway: a bit of each element would be memory on top."""
    fq, weight = fixed(signed=True), nn.Parameter(X[1:].clone())
    assert any(t.data_ptr() == weight.data_ptr() for t in saved_by(fq, weight))


RANGES: dict[str, dict[str, Any]] = {
    "mse": {},
    "lsq": {"learn": "scale", "grad_scale": "lsq"},
    "lsq+": {"learn": "scale+offset", "grad_scale": "lsq"},
    "zero_point": {"learn": "scale+zero_point", "symmetric": False},
    "pact": {"learn": "scale", "estimator": "pact", "signed": False},
    "signed_pact": {"learn": "scale", "estimator": "pact", "signed": True},
    "minmax": {"range": "minmax"},
    "running_minmax": {"range": "running_minmax", "symmetric": False},
    "in_hindsight": {"range": "in_hindsight"},
    "per_channel": {"learn": "scale", "axis": 1},
    "per_channel_in_hindsight": {"range": "in_hindsight", "axis": 1},
    "ewgs": {"estimator": "ewgs", "learn": "scale"},
}


@of_activations
@pytest.mark.parametrize("name", RANGES)
def test_activation_function_in_the_same_pass(name: str, activation: str) -> None:
    """Bit for bit what torch's function before the quantizer gives: values, gradients, ranges, calibration."""
    results = []
    for fused in (True, False):
        fq = FakeQuant(3, activation=activation if fused else None, **RANGES[name])
        before = (lambda x: x) if fused else ACTIVATIONS[activation]
        found = []
        if name == "mse":
            fastqat.calibrate(
                fq
                if fused
                else nn.Sequential(getattr(nn, activation.replace("r", "R", 1).replace("elu", "eLU"))(), fq),
                [X, 2 * X],
                progress=False,
            )
        for factor in (1.0, 0.5, 3.0):
            x = X.clone()
            if "lsq" in name:  # sums of gradients leave out NaN in both, but torch's ReLU keeps it
                x = torch.where(x.isnan(), 0.25, x)
            leaf = (factor * x).requires_grad_()
            y = fq(before(leaf))
            y.backward(G)
            found += [y.detach(), leaf.grad, *(p.grad.clone() for p in fq.parameters() if p.grad is not None)]
        results.append([*found, *fq.state_dict().values()])
        assert fq.codes[0] == 0 or name == "signed_pact"
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*results, strict=True))


@of_activations
def test_activation_function_stays_where_the_quantizer_is_off(activation: str) -> None:
    """Switched off, calibrating, or without a range: the function alone."""
    fq, want = FakeQuant(4, activation=activation), ACTIVATIONS[activation](X)
    negative = -X[1:].abs()
    assert torch.equal(fq(negative), torch.zeros_like(negative)) and not fq.initialized  # all zeros
    fq.begin_calibration()
    assert same(fq(X), want)
    fq.end_calibration()
    assert fq.codes == (0, 15)
    fq.fake_quant_enabled = False
    assert same(fq(X), want) and not fq.is_idle() and fq(X, torch.bfloat16).dtype == torch.bfloat16
    assert f"activation={activation}" in repr(fq)


@of_activations
def test_functional_with_an_activation(activation: str) -> None:
    """Of one scale and of many, with gradients of all parameters, under vmap, into a given tensor."""
    x, apply = torch.where(X.isfinite(), X, 0.25), ACTIVATIONS[activation]
    for shape, axis, group in (((1,), None, None), ((6,), 1, None), ((4, 2), 0, 45)):
        scale, shift = torch.full(shape, 0.4), torch.full(shape, 2.0)
        for name in ("zero_point", "offset"):
            results = []
            for fused in (True, False):
                leaves = [t.clone().requires_grad_() for t in (x, scale, shift)]
                y = functional.fake_quantize(
                    leaves[0] if fused else apply(leaves[0]),
                    leaves[1],
                    **{name: leaves[2]},
                    qmin=0,
                    qmax=7,
                    axis=axis,
                    group_size=group,
                    activation=activation if fused else None,
                )
                y.backward(G)
                results.append([y.detach(), *(t.grad for t in leaves)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    s = torch.tensor([0.4])

    def quantized(t: Tensor) -> Tensor:
        return functional.fake_quantize(t, s, qmin=0, qmax=7, activation=activation)

    want = functional.fake_quantize(apply(x), s, qmin=0, qmax=7)
    assert torch.equal(vmap(quantized)(x), want)
    assert torch.equal(grad(lambda t: (quantized(t) * G).sum())(x), run(quantized, x, G)[1])
    out = torch.empty_like(x)
    assert functional.fake_quantize(x, s, qmin=0, qmax=7, activation=activation, out=out) is out
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match="activation: wanted one of None, 'relu', 'relu6'; got 'gelu'"):
        functional.fake_quantize(x, s, qmin=0, qmax=7, activation="gelu")
    with pytest.raises(ValueError, match="activation: wanted one of None, 'relu', 'relu6'; got 'gelu'"):
        QSpec(activation="gelu")
    with pytest.raises(ValueError, match="weight: wanted a QSpec without activation"):
        QConfig(weight=QSpec(activation="relu"))


def second_derivatives(function: Any, x: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients by g and the parameters of a scalar made of the first gradients."""
    leaf, g = x.clone().requires_grad_(), G.clone().requires_grad_()
    firsts = torch.autograd.grad(function(leaf), (leaf, *parameters), g, create_graph=True)
    weights = [torch.linspace(-1, 1, f.numel()).view(f.shape) for f in firsts]
    loss = sum((f * w).sum() for f, w in zip(firsts, weights, strict=True))
    return list(torch.autograd.grad(loss, [g, *parameters], allow_unused=True, materialize_grads=True))


def test_double_backward() -> None:
    """dx is linear in g: from bits as from the tensor, through a fused function, and PACT's from the equations."""
    x = torch.where(X.isfinite(), X, 0.25)
    for activation in (None, "relu6"):
        fq, before = fixed(activation=activation), ACTIVATIONS.get(activation, lambda t: t)
        direct = lambda t: functional.fake_quantize(before(t), fq.scale.detach(), qmin=0, qmax=15)  # noqa: B023, E731
        assert torch.equal(*(second_derivatives(f, x, ())[0] for f in (fq, direct)))
        scale, zero_point = (torch.tensor([v], requires_grad=True) for v in (0.3, 2.0))
        learned = (
            lambda t: functional.fake_quantize(t, scale, zero_point, qmin=0, qmax=7, activation=activation),  # noqa: B023
            lambda t: functional.fake_quantize(before(t), scale, zero_point, qmin=0, qmax=7),  # noqa: B023
        )
        for a, b in zip(*(second_derivatives(f, x, (scale, zero_point)) for f in learned), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    fq = fixed(learn="scale", estimator="pact", ste_mask="unrounded", grad_scale=0.5)
    dg = second_derivatives(fq, x, (fq.scale,))[0]
    inside, above = (x >= 0) & (x <= 7.5), x > 7.5
    want = inside * torch.linspace(-1, 1, x.numel()).view(x.shape) - 0.5 * 15 * above  # the weight of ds is -1
    torch.testing.assert_close(dg, want)


def test_function_transforms_take_the_way_of_old() -> None:
    """torch.func knows no bits: the same gradient, from x itself."""
    fq, x = fixed(activation="relu"), X[1:]
    assert torch.equal(grad(lambda t: (fq(t) * G[1:]).sum())(x), run(fq, x, G[1:])[1])
    assert torch.equal(vmap(fq)(x), fq(x))


@pytest.mark.parametrize("name", ("mse", "pact", "lsq", "running_minmax"))
def test_compiled_without_another_graph_per_step(name: str) -> None:
    """One graph for all steps, another bit-width included: values, gradients and ranges of eager."""
    outputs, counter = [], CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        fq = FakeQuant(4, activation="relu", **RANGES[name])
        net = nn.Sequential(nn.Linear(3, 5), fq)
        net(X[1])
        fq.follows(net[0].weight)
        call = torch.compile(net, fullgraph=True, backend=counter) if compiled else net
        optimizer, ys = torch.optim.SGD(net.parameters(), 0.05), []
        for step in range(4):
            fq.bits = 4 - step // 2
            y = call((1 + step) * X[1])
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ys.append(y.detach().clone())
        outputs.append([*ys, *net.state_dict().values()])
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("name", ("mse", "pact", "lsq"))
def test_checkpointing_and_autocast(name: str, use_reentrant: bool) -> None:
    """What is computed again gives the same gradients, in bfloat16 too."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), FakeQuant(4, activation="relu6", **RANGES[name]), nn.Linear(5, 2))
        net(X[1])
        x = X[1].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(net, x, use_reentrant=use_reentrant) if recompute else net(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def opcheck_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of the ops on one tensor."""
    x, qrange = X[0], torch.tensor([0, 3], dtype=torch.int32)
    scale, zero = torch.tensor([0.5]), torch.tensor([1.0])
    bits, codes = (torch.zeros((x.numel() * k + 7) // 8, dtype=torch.uint8) for k in (1, 2))
    one, step = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    count = lambda: torch.zeros(1, dtype=torch.int64)  # noqa: E731
    grid = (scale, zero, None, qrange, 1e-8)
    observed = (one.clone(), one.clone(), count())
    return {
        "fake_quantize_tensor": (
            *(x, *grid, 6.0, True, 3, 1, step, one, 2, *observed),
            *(bits.clone(), bits.clone(), codes.clone(), torch.empty_like(x)),
        ),
        "fake_quantize_tensor_backward": (G[0], bits, bits.clone(), qrange, torch.empty_like(x), one.clone()),
        "dequantize_tensor": (codes, *grid, 2, torch.empty_like(x)),
        "advance_range": (
            qrange,
            step,
            True,
            0.9,
            *(torch.full((1,), float(k)) for k in range(4)),
            count(),
            scale.clone(),
            zero.clone(),
        ),
    }


@pytest.mark.parametrize("name", opcheck_calls())
def test_opcheck(name: str) -> None:
    """torch.library.opcheck of the ops that activation quantizers call."""
    torch.library.opcheck(getattr(torch.ops.fastqat, name).default, opcheck_calls()[name])


def test_codes_are_those_of_the_values() -> None:
    """Packed codes give back the quantized tensor, in its layout, and are those of functional.quantize."""
    for layout in ("contiguous", "channels_last", "strided"):
        x = laid_out(torch.where(X.isnan(), 0.0, X), layout)
        for options in (GRIDS["signed"], GRIDS["zero_point"], GRIDS["two_bits"]):
            fq = fixed(**options)
            grid = one_tensor.Grid(fq.scale.detach(), fq.zero_point, None, fq.qrange)
            settings = one_tensor.Options(fq.eps, code_bits=fq.bits)
            y, codes = one_tensor.fake_quantize_tensor(x, grid, None, settings)
            assert same(one_tensor.dequantized(codes, grid, settings, (y.shape, y.stride()), y.dtype), y)
            qmin, qmax = fq.codes
            want = functional.quantize(x, grid.scale, grid.zero_point, qmin=qmin, qmax=qmax)
            order = sorted(range(4), key=lambda d: -want.stride(d))
            unpacked = functional.unpack(codes, fq.bits, want.permute(order).shape, signed=qmin < 0)
            assert torch.equal(unpacked, want.permute(order))
