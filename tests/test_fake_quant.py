"""``FakeQuant`` in every place where a user of PyTorch would put a module."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fastqat import FakeQuant

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def plain(x: Tensor, s: Tensor | float, low: int, high: int, z: Tensor | float = 0.0) -> Tensor:
    """Fake quantization in five torch operations, written here."""
    return s * (torch.clamp(torch.round(x / s) + z, low, high) - z)


def fixed(scale: float = 0.25, bits: int = 4, **options: Any) -> FakeQuant:
    """A per-tensor quantizer of a given scale."""
    return FakeQuant(bits, range="fixed", scale=torch.tensor([scale]), **options)


def on_grid(y: Tensor, fq: FakeQuant) -> bool:
    """y is a multiple of the scale, within the codes."""
    k = y / fq.scale.detach()
    return (
        bool(((k - k.round()).abs() < 1e-3).all()) and fq.codes[0] <= k.round().min() and k.round().max() <= fq.codes[1]
    )


def test_bare_call() -> None:
    """Shape and dtype of x; a per-tensor scale of shape [1], made at once and initialized at the first call."""
    fq = FakeQuant(bits=3)
    assert fq.scale.shape == (1,) and not fq.initialized
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = fq(X.to(dtype))
        assert y.shape == X.shape and y.dtype == dtype and fq.scale.dtype == torch.float32
        assert torch.equal(y, plain(X.to(dtype).float(), fq.scale.detach(), -4, 3).to(dtype))
    assert fq.initialized
    assert fq(X, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, data, codes",
    (
        ({}, X, (-8, 7)),
        ({}, X.abs(), (0, 15)),
        ({"signed": True}, X.abs(), (-8, 7)),
        ({"signed": False}, X, (0, 15)),
        ({"restricted": True}, X.abs(), (-7, 7)),
        ({"symmetric": False}, X, (0, 15)),
        ({"symmetric": False, "signed": True}, X, (-8, 7)),
        ({"bits": 1, "signed": True}, X, (-1, 0)),
        ({"bits": 8}, X.abs(), (0, 255)),
    ),
    ids=str,
)
def test_codes(options: dict[str, Any], data: Tensor, codes: tuple[int, int]) -> None:
    """The sign is the user's, or that of the first tensor; an affine grid is unsigned unless told."""
    fq = FakeQuant(**{"bits": 4, **options})
    fq(data)
    assert fq.codes == codes and fq.qrange.tolist() == list(codes)
    fq(-X.abs())  # a later tensor decides nothing
    assert fq.codes == codes
    scale, zero_point = fq.calculate_qparams()
    assert torch.equal(scale, fq.scale) and zero_point.dtype == torch.int32
    assert codes[0] <= zero_point.item() <= codes[1] if not fq.symmetric else zero_point.item() == 0


@pytest.mark.parametrize(
    "options, shape",
    (
        ({"axis": 0}, (16,)),
        ({"axis": -1}, (6,)),
        ({"axis": 0, "group_size": 3}, (16, 2)),
        ({"axis": 1, "group_size": 8}, (6, 2)),
        ({"axis": 1, "channels": 6}, (6,)),
        ({"axis": 0, "group_size": 2, "channels": (16, 3)}, (16, 3)),
        ({"axis": 0, "symmetric": False}, (16,)),
        ({"axis": 0, "learn": "scale+offset"}, (16,)),
    ),
    ids=str,
)
def test_shapes_of_the_parameters(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Unknown until the first tensor, unless given."""
    fq = FakeQuant(4, **options)
    assert is_lazy(fq.scale) == ("channels" not in options)
    y = fq(X)
    assert all(p.shape == shape for p in fq.parameters()) and y.shape == X.shape
    assert {n for n, _ in fq.named_parameters()} == {"scale"} | (
        {"offset"} if "learn" in options else {"zero_point"} if "symmetric" in options else set()
    )
    with pytest.raises(ValueError, match=r"FakeQuant\.scale: wanted shape \[.*; got \["):
        fq(torch.zeros(24, 24))


BAD_OPTIONS = (
    ({"bits": 0}, ValueError, "bits: wanted 1 to 8; got 0"),
    ({"bits": 9}, ValueError, "bits: wanted 1 to 8; got 9"),
    ({"bits": 4.0}, TypeError, "bits: wanted an int from 1 to 8; got 4.0"),
    ({"bits": 1, "restricted": True}, ValueError, "bits: wanted 2 to 8; got 1"),
    ({"axis": "0"}, TypeError, "axis: wanted None or an int; got '0'"),
    ({"group_size": 3}, ValueError, "group_size: wanted an axis beside it; got group_size=3, axis=None"),
    ({"group_size": 3.0, "axis": 0}, TypeError, "group_size: wanted None or an int; got 3.0"),
    ({"range": "max"}, ValueError, "range: wanted one of 'minmax',"),
    ({"learn": "offset"}, ValueError, "learn: wanted one of None, 'scale',"),
    ({"learn": "scale+zero_point"}, ValueError, "learn: wanted symmetric=False"),
    ({"ste_mask": "soft"}, ValueError, "ste_mask: wanted one of 'rounded', 'unrounded'; got 'soft'"),
    ({"grad_scale": "l2"}, ValueError, "grad_scale: wanted one of 'lsq'; got 'l2'"),
    ({"restricted": True, "signed": False}, ValueError, "restricted: wanted a signed symmetric grid; got signed=False"),
    ({"restricted": True, "symmetric": False}, ValueError, "restricted: wanted a signed symmetric grid"),
    ({"momentum": 1.0}, ValueError, "momentum: wanted 0 <= momentum < 1; got 1.0"),
    ({"percentile": 50}, ValueError, "percentile: wanted 50 < percentile <= 100; got 50"),
    ({"eps": 0.0}, ValueError, "eps: wanted a positive number; got 0.0"),
    ({"channels": 3}, ValueError, "channels: wanted none with axis=None"),
    ({"channels": 3, "axis": 0, "group_size": 2}, ValueError, "channels: wanted (channels, groups) with group_size"),
    ({"scale": torch.ones(1)}, ValueError, "scale, zero_point: wanted none with range='mse'"),
    ({"range": "fixed"}, ValueError, "scale: wanted a float32 tensor of shape [1], [C] or [C, groups]"),
    ({"range": "fixed", "scale": torch.ones(2)}, ValueError, "scale: wanted shape [1]; got [2]"),
    ({"range": "fixed", "scale": -torch.ones(1)}, ValueError, "scale: wanted positive finite values; got -1.0"),
    ({"range": "fixed", "scale": torch.ones(1), "zero_point": torch.ones(1)}, ValueError, "zero_point: wanted one if"),
    ({"range": "fixed", "scale": torch.ones(1), "symmetric": False}, ValueError, "zero_point: wanted one if"),
)


@pytest.mark.parametrize("options, exception, message", BAD_OPTIONS, ids=[m[:40] for *_, m in BAD_OPTIONS])
def test_bad_option(options: dict[str, Any], exception: type[Exception], message: str) -> None:
    """The message names the option, what was wanted and what came."""
    with pytest.raises((TypeError, ValueError)) as caught:
        FakeQuant(**options)
    assert type(caught.value) is exception and str(caught.value).startswith(message)


def test_bad_tensor_and_bad_grid() -> None:
    """Errors of the forward pass and of set_grid."""
    with pytest.raises(TypeError, match="x: wanted float32, bfloat16 or float16; got torch.int64"):
        fixed()(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="unknown"):
        FakeQuant(4, unknown=1)
    fq = FakeQuant(4, axis=0, channels=3, symmetric=False)
    for bad in (torch.ones(1), torch.full((3,), torch.nan)):
        with pytest.raises(ValueError, match="zero_point: wanted finite values of shape"):
            fq.set_grid(torch.ones(3), bad)
    assert not fq.initialized


def test_parametrization_trains() -> None:
    """Registered with strict shapes; the layer's own Parameter learns, through the quantized weight."""
    layer = nn.Conv2d(3, 8, 3)
    weight = layer.weight
    parametrize.register_parametrization(layer, "weight", FakeQuant(4, axis=0, learn="scale"))
    fq = layer.parametrizations.weight[0]
    assert layer.parametrizations.weight.original is weight and fq.initialized and fq.scale.shape == (8,)
    assert torch.equal(layer.weight, plain(weight, fq.scale.view(-1, 1, 1, 1), -8, 7))
    optimizer = torch.optim.SGD(layer.parameters(), 1e-4)
    before = weight.detach().clone(), fq.scale.detach().clone()
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before[0]) and not torch.equal(fq.scale, before[1])
    assert torch.equal(layer.weight, plain(weight, fq.scale.view(-1, 1, 1, 1), -8, 7))
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight is weight


def test_with_args_in_torch_ao() -> None:
    """In a torch.ao QConfig the module quantizes weights and activations of a QAT model."""
    make = FakeQuant.with_args(bits=4)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.qconfig = torch.ao.quantization.QConfig(activation=make.with_args(bits=8), weight=make.with_args(axis=0))
        net = torch.ao.quantization.prepare_qat(net.train())
    y = net(X)
    y.square().sum().backward()
    assert isinstance(net[0].weight_fake_quant, FakeQuant) and net[0].weight.grad is not None
    assert [net[2].weight_fake_quant.bits, net[2].activation_post_process.bits] == [4, 8]
    assert net[0].weight_fake_quant.scale.shape == (8,) and net[2].activation_post_process.initialized
    assert on_grid(y, net[2].activation_post_process)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """A forward that is computed again gives the same gradients and moves no range."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), FakeQuant(4, range="running_minmax"), nn.ReLU())
        net[1].follows(net[0].weight)
        net(X)
        torch.optim.SGD(net.parameters()).step()  # no gradient yet; a step all the same
        x = X.clone().requires_grad_()
        y = checkpoint(net, 3 * x, use_reentrant=use_reentrant) if recompute else net(3 * x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, net[0].weight.grad, net[1].scale.detach(), net[1].range_low])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    """One process of DDP: the same gradients as without."""
    net = nn.Sequential(nn.Linear(6, 4), FakeQuant(4, learn="scale"))
    net(X)
    twin = copy.deepcopy(net)
    parallel = nn.parallel.DistributedDataParallel(net)
    for module in (parallel, twin):
        module(X).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    assert {"step", "qrange"} <= {n.split(".")[-1] for n, _ in net.named_buffers()}


def test_switches() -> None:
    """Without fake quantization x passes as it is; without observation the range stays."""
    fq = FakeQuant(4, range="running_minmax")
    fq(X)
    fq.fake_quant_enabled = False
    before = fq.scale.detach().clone()
    assert fq(2 * X) is not None and torch.equal(fq(2 * X), 2 * X) and fq(X, torch.bfloat16).dtype == torch.bfloat16
    assert bool(fq.scale > before)  # it went on observing
    fq.fake_quant_enabled, fq.observer_enabled = True, False
    before = fq.scale.detach().clone()
    assert torch.equal(fq(9 * X), plain(9 * X, before, -8, 7)) and torch.equal(fq.scale, before)


def test_bits_can_be_set() -> None:
    """New codes, the old scale; the dtype of qrange and its memory stay."""
    fq = fixed(bits=4, restricted=True)
    fq(X)
    memory = fq.qrange.data_ptr()
    fq.bits = 2
    assert fq.codes == (-1, 1) and fq.qrange.tolist() == [-1, 1] and fq.qrange.data_ptr() == memory
    assert torch.equal(fq(X), plain(X, 0.25, -1, 1))
    with pytest.raises(ValueError, match="bits: wanted 2 to 8; got 1"):
        fq.bits = 1
    assert fq.bits == 2 and fq.qrange.tolist() == [-1, 1]


def test_extra_repr() -> None:
    """Bits, codes, grid, granularity, range and whether it is initialized."""
    fq = FakeQuant(3, axis=0, group_size=3, symmetric=False, range="minmax", learn="scale")
    text = "bits=3, codes=0..7, grid=affine, axis=0, group_size=3, range=minmax, learn=scale, scale="
    assert repr(fq) == f"FakeQuant({text}?, not initialized)"
    fq(X)
    assert repr(fq) == f"FakeQuant({text}[16, 2], initialized)"
    assert "grid=offset" in repr(FakeQuant(learn="scale+offset")) and "grid=symmetric" in repr(FakeQuant())


@pytest.mark.parametrize("learn", ("scale", "scale+zero_point", "scale+offset"))
@pytest.mark.parametrize("axis", (None, 1))
def test_learning_a_range(learn: str, axis: int | None) -> None:
    """From a poor range, gradient descent finds one with less error; only what is learned requires a gradient."""
    fq = FakeQuant(3, axis, learn=learn, symmetric=learn != "scale+zero_point", range="minmax", grad_scale="lsq")
    data = X + 1.5
    fq(4 * data)
    assert [n for n, p in fq.named_parameters() if p.requires_grad] == learn.split("+")
    before = [p.detach().clone() for p in fq.parameters()]
    optimizer = torch.optim.Adam(fq.parameters(), 0.1)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (fq(data) - data).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, fq.parameters(), strict=True))


def test_negative_scale_recovers() -> None:
    """Below its floor the scale still has a gradient, and comes back."""
    fq = FakeQuant(4, learn="scale", range="minmax")
    fq(X)
    with torch.no_grad():
        fq.scale.fill_(-0.05)
    optimizer = torch.optim.Adam(fq.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (fq(X) - X).square().sum().backward()
        optimizer.step()
    assert fq.scale.item() > 0.05
    assert (fq(X) - X).square().mean() < 0.05


def test_first_call_in_inference_mode() -> None:
    """What it makes there can be trained afterwards."""
    for options in ({"axis": 0, "learn": "scale"}, {"axis": 0, "range": "running_minmax"}):
        fq = FakeQuant(4, **options)
        with torch.inference_mode():
            fq(X)
        x = X.clone().requires_grad_()
        fq(x).sum().backward()
        assert x.grad is not None and fq.scale.shape == (16,)


@pytest.mark.parametrize("first", [torch.empty(0, 4), torch.full((2, 4), torch.nan)], ids=["empty", "nan"])
def test_a_first_tensor_without_values_sets_no_range(first: torch.Tensor) -> None:
    quantizer = FakeQuant(bits=4)
    torch.testing.assert_close(quantizer(first), first, equal_nan=True)
    assert not quantizer.initialized
    quantizer(torch.tensor([-1.0, 2.0]))
    assert quantizer.initialized and quantizer.codes == (-8, 7)
