"""What leaves a model with remove(keep="quantized") equals what was evaluated, or is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrizations import weight_norm

import fastqat
from fastqat import Oscillation, QConfig, QSpec
from fastqat.quantizers import dorefa_weight

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = QConfig(QSpec(4, 0), None)
QUANTIZED = "keep='quantized'"


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return fastqat.prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), CONFIG)  # type: ignore[return-value]


def assert_as_it_was(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert any(isinstance(m, fastqat.FakeQuant) for m in model.modules()) and model.training


def refused(model: nn.Module, message: str, **options: Any) -> None:
    """It is refused, and leaves everything as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fastqat.remove(model, keep="quantized", **options)
    assert_as_it_was(model, before)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 6, padding_idx=1), (5,)),
}
SPECS = {
    "mse": QSpec(3, 0),
    "tensor": QSpec(4),
    "groups": QSpec(4, 0, group_size=3),
    "affine": QSpec(3, 0, symmetric=False),
    "offset": QSpec(3, 0, symmetric=False, learn="scale+offset"),
    "minmax": QSpec(3, 0, range="minmax"),
    "trs": QSpec(4, 0, range="std_open", restricted=True, learn="scale", normalize="range"),
    "dorefa": dorefa_weight(4),
    "stochastic": QSpec(3, 0, estimator="stochastic"),
    "frozen": QSpec(3, 0, oscillation=Oscillation(momentum=0.25, freeze_threshold=0.5)),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_what_was_evaluated(kind: str, spec: str) -> None:
    """After training, from either mode, element by element; with example inputs nothing is found."""
    torch.manual_seed(1)
    make, shape = KINDS[kind]
    net = fastqat.prepare(nn.Sequential(make()), QConfig(SPECS[spec], None))
    x = torch.arange(5) if kind == "embedding" else torch.randn(shape)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    expected = net.eval()(x)
    removed = fastqat.remove(net.train(), keep="quantized", example_inputs=x)
    assert type(removed[0]) is type(make()) and removed.training
    assert torch.equal(removed(x), expected)


def test_a_weight_frozen_in_the_very_step_before() -> None:
    """Its frozen code, as evaluation gives it."""
    spec = QSpec(3, oscillation=Oscillation(momentum=0.25, freeze_threshold=0.5))
    net = fastqat.prepare(nn.Sequential(nn.Linear(4, 1, bias=False)), QConfig(spec, None))
    quantizer: Any = net[0].weight_fake_quant
    quantizer.set_grid(torch.ones(1))
    for value in (0.2, 0.8, 0.2, 0.8, 0.2, 0.8):
        with torch.no_grad():
            net[0].weight.fill_(value)
        net(torch.eye(4))
        fastqat.step(net)
        if bool(quantizer.tracker.frozen().any()):
            break
    assert bool(quantizer.tracker.frozen().all())
    with torch.no_grad():
        net[0].weight.fill_(3.2)
    expected = net.eval()(torch.eye(4))
    assert not torch.equal(expected, torch.full((4, 1), 3.0))
    fastqat.remove(net, keep="quantized")
    assert torch.equal(net(torch.eye(4)), expected)


HOOKS: dict[str, tuple[Callable[[nn.Module], Any], str, Callable[[nn.Module], Any]]] = {
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        r"prune\.remove\(layer, 'weight'\) first.*got one that L1Unstructured of torch",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "weight_norm": (
        old_weight_norm,
        r"remove_weight_norm\(layer\) first.*got one that WeightNorm in a hook",
        torch.nn.utils.remove_weight_norm,
    ),
    "spectral_norm": (
        spectral_norm,
        r"remove_spectral_norm\(layer\) first.*got one that SpectralNorm in a hook",
        torch.nn.utils.remove_spectral_norm,
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_computes_the_weight(name: str) -> None:
    """What is written would be a temporary; with the cure it is what was evaluated."""
    apply, message, cure = HOOKS[name]
    net, x = linear(), torch.randn(3, 6)
    apply(net[1])
    net(x)
    refused(net, f"{QUANTIZED}, layer '1': wanted a weight that is a Parameter .*{message}")
    cure(net[1])
    expected = net.eval()(x)
    assert torch.equal(fastqat.remove(net, keep="quantized")(x), expected)


def test_a_hook_leaves_with_the_float_weights() -> None:
    net = linear()
    prune.l1_unstructured(net[1], "weight", 0.5)
    fastqat.remove(net)
    assert type(net[1]) is nn.Linear and int((net[1].weight == 0).sum()) == 18


def test_a_parametrized_layer() -> None:
    net = linear()
    weight_norm(net[0])
    refused(net, "layer '0': wanted the class that prepare gave it; got ParametrizedLinear")


@pytest.mark.parametrize("shared", ("Parameter", "memory"))
def test_weights_tied_after_prepare(shared: str) -> None:
    """Two quantizers for one weight: no value is that of both."""
    net = linear()
    weight = net[0].weight
    net[1]._parameters["weight"] = weight if shared == "Parameter" else nn.Parameter(weight.detach())
    refused(
        net, f"{QUANTIZED}: wanted one quantizer for 0.weight .*tie weights before prepare.*got a second one in .*'1'"
    )


class Holder(nn.Module):
    """Computes with a table that another module looks up."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.T


@pytest.mark.parametrize("kind", ("layer", "module", "activation"))
def test_a_float_module_that_holds_the_weight(kind: str) -> None:
    """It was evaluated with the float values, and would silently get others."""
    table = nn.Embedding(5, 6)
    head: nn.Module = nn.Linear(6, 5, bias=False) if kind != "module" else Holder(table.weight)
    if kind != "module":
        head.weight = table.weight
    overrides = {"1": None if kind == "layer" else QConfig(None, QSpec(8))} if kind != "module" else None
    net = fastqat.prepare(nn.Sequential(table, head), CONFIG, overrides=overrides)
    net(torch.arange(5))
    refused(net, f"{QUANTIZED}: wanted a quantizer in each module that holds 0.weight .*got .* '1', which reads it")


class Model(nn.Module):
    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.body, self.read = nn.Embedding(5, 6), nn.Linear(6, 6), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.body(self.table(x)), self.table.weight)


READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "linear": (lambda h, w: F.linear(h, w), "linear"),
    "matmul": (lambda h, w: h @ w.t(), "matmul"),
    "slice": (lambda h, w: h * w[2], "mul"),
    "stack": (lambda h, w: torch.cat([h, w.detach()]), "cat"),
}


@pytest.mark.parametrize("name", READS)
def test_a_function_that_reads_the_weight(name: str) -> None:
    """A head on the table of an embedding, by way of views too; it takes example inputs to see it."""
    read, function = READS[name]
    net = fastqat.prepare(Model(read), CONFIG)
    message = f"{QUANTIZED}: wanted weights that are read through their quantizers .*got table.weight, which Model "
    refused(net, f"{message}hands to {function} as it is", example_inputs=torch.arange(5))


def test_shapes_and_layers_are_no_readers() -> None:
    """Neither what a module asks of a weight, nor a layer that is called, quantized with others or alone."""
    net = fastqat.prepare(Model(lambda h, w: h * w.shape[0] + w.dim()), CONFIG)
    fastqat.quantize_weights_together(net)
    expected = net.eval()(torch.arange(5))
    fastqat.remove(net, keep="quantized", example_inputs={"x": torch.arange(5)})
    assert torch.equal(net(torch.arange(5)), expected)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fastqat.prepare(encoder, CONFIG)
    x = torch.randn(2, 3, 8)
    expected = encoder(x)
    fastqat.remove(encoder, keep="quantized", example_inputs=x)
    torch.testing.assert_close(encoder(x), expected)  # by the fused kernel, in another order


def test_a_table_with_max_norm() -> None:
    """A lookup bounds rows before they are quantized: what is written is bounded, and must not be shortened again."""
    table = nn.Embedding(3, 2, max_norm=1.0)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[3.0, 0.0], [0.6, 0.6], [0.2, 0.1]]))
    net = fastqat.prepare(nn.Sequential(table), CONFIG)
    quantizer: Any = net[0].weight_fake_quant
    quantizer.set_grid(torch.full((3,), 0.25))
    expected = copy.deepcopy(net).eval()(torch.arange(3))
    fastqat.remove(net, keep="quantized")
    assert torch.equal(net(torch.arange(3)), expected)
    fastqat.prepare(net, CONFIG)
    quantizer = net[0].weight_fake_quant
    quantizer.set_grid(torch.full((3,), 0.7))  # (0.75, 0.75) -> (0.7, 0.7) is within, (1, 0) -> (0.7, 0)
    quantizer.set_grid(torch.full((3,), 1.1))  # (1, 0) -> (1.1, 0)
    refused(net, f"{QUANTIZED}, layer '0': wanted quantized rows within its max_norm of 1.0")


# Assigning a weight.


@pytest.mark.parametrize("kind", ("convolution", "linear"))
def test_layers_are_not_fused_with_the_old_range(kind: str) -> None:
    """The range of a weight says nothing of the one that is scaled by a batch norm."""
    torch.manual_seed(0)
    norm: Any = nn.BatchNorm2d(4) if kind == "convolution" else nn.BatchNorm1d(4)
    layer: Any = nn.Conv2d(3, 4, 1) if kind == "convolution" else nn.Linear(3, 4)
    nn.init.uniform_(norm.weight, 5, 10)
    net = fastqat.prepare(nn.Sequential(layer, norm), CONFIG).eval()
    x = torch.randn(2, 3, 4, 4) if kind == "convolution" else torch.randn(5, 3)
    fuse: Any = fuse_conv_bn_eval if kind == "convolution" else fuse_linear_bn_eval
    with pytest.raises(ValueError, match="weight of layer '0': wanted the Parameter whose range .*keep='quantized'"):
        fuse(*net)
    expected = net(x)
    fastqat.remove(net, keep="quantized")
    torch.testing.assert_close(fuse(*net)(x), expected, rtol=1e-4, atol=1e-4)


def test_assigning_another_weight() -> None:
    """Refused where the range is set, in an attention module too; other values go into the Parameter that there is."""
    net = linear()
    weight = net[1].weight
    for other in (net[0].weight, nn.Parameter(weight.detach().clone())):
        with pytest.raises(ValueError, match="weight of layer '1': wanted the Parameter .*copy_.*; got another Param"):
            net[1].weight = other
    assert net[1].weight is weight
    net[1].weight = weight
    net[1].bias = nn.Parameter(torch.ones(6))
    attention: Any = fastqat.prepare(nn.Sequential(nn.MultiheadAttention(4, 2)), CONFIG)[0]
    with pytest.raises(ValueError, match="in_proj_weight of layer '0'"):
        attention.in_proj_weight = nn.Parameter(torch.ones(12, 4))


def test_ways_that_bring_their_range() -> None:
    """Checkpoints, copies, function calls, moves, pruning and parametrizations assign as they did."""
    net, x = linear(), torch.randn(3, 6)
    expected = net(x)
    other = linear()
    other.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    assert torch.equal(other(x), expected) and torch.equal(copy.deepcopy(net)(x), expected)
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert torch.equal(torch.func.functional_call(net, values, x), expected)
    for layer in other:
        prune.identity(layer, "weight")
        prune.remove(layer, "weight")
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(other.to(torch.float64).to(torch.float32)(x), expected)
    with pytest.raises(ValueError, match="weight of layer '0'"):  # after a load, too
        other[0].weight = nn.Parameter(torch.ones(6, 6))
    fresh = nn.Linear(2, 2)
    nn.init.zeros_(fresh.weight)
    fastqat.prepare(fresh, CONFIG)
    fresh.weight = nn.Parameter(torch.ones(2, 2))  # no range is set
    assert torch.equal(fresh(torch.ones(2)), 2 + fresh.bias)


@pytest.mark.usefixtures("process_group")
def test_sharded_weights_come_and_go() -> None:
    """FSDP2 assigns the part and the whole of a weight in turn."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, x = linear(), torch.randn(4, 6)
    sharded: Any = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (1,)))
    for net in (plain, sharded):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(plain(x), sharded(x))
